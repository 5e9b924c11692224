"""Which model is this? A fingerprint read from a checkpoint's own files.

It is computed from the safetensors on disk, by the same code at calibration and at serving, so it
does not depend on how an engine fuses, renames, shards or quantises weights after loading.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# `model.layers.3.mlp.gate.weight`, `transformer.blocks.3...`, `backbone.h.3...`
_LAYER = re.compile(r"(?:^|\.)(?:layers?|blocks?|h)\.(\d+)\.")
# A routed expert's weight, of a layer that decodes text.
_ROUTED = re.compile(r"^(?!.*(?:shared|vision|visual|mtp)).*expert")
_SAMPLE_BYTES = 65536
_EXPERT_TENSORS_PER_LAYER = 4
_NUMBERS_OF_EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k")
# Other matrices of a layer, which may happen to have E rows (and are quantised; routers are not).
_NOT_A_ROUTER = re.compile(r"attn|attention|_proj\b")


@dataclass(frozen=True)
class Fingerprint:
    """What must be equal for a table to belong to a model.

    architecture: as in config.json, e.g. "Qwen3MoeForCausalLM".
    E, K: experts per layer and per token.
    layers: decoder layer indices that hold routed experts, ascending.
    router_hash, experts_hash: SHA-256 over the routers and over a sample of the expert weights;
        None where no checkpoint was there to read (random weights).
    """

    architecture: str
    E: int
    K: int
    layers: tuple[int, ...]
    router_hash: str | None = None
    experts_hash: str | None = None

    def differences(self, model: Fingerprint) -> list[str]:
        """What keeps a table with this fingerprint from serving `model`, in plain words."""
        found = [
            f"{what}: the table has {mine}, the model has {other}"
            for what, mine, other in [
                ("architecture", self.architecture, model.architecture),
                ("experts per layer", self.E, model.E),
                ("experts per token", self.K, model.K),
            ]
            if mine != other
        ]
        missing = sorted(set(model.layers) - set(self.layers))
        if missing:
            found.append(f"MoE layers of the model that the table lacks: {missing}")
        if found:  # hashes of other sizes' weights tell nothing more
            return found
        for what, mine, other in [
            ("router weights", self.router_hash, model.router_hash),
            ("expert weights", self.experts_hash, model.experts_hash),
        ]:
            if mine and other and mine != other:
                found.append(f"{what}: hash {mine[:12]} in the table, {other[:12]} in the model")
        return found


def layer_index(name: str) -> int:
    """Decoder layer index in a parameter or module name; ValueError if it has none."""
    match = _LAYER.search(name + ".")
    if match is None:
        raise ValueError(f"{name!r} names no decoder layer (expected e.g. 'layers.3.')")
    return int(match.group(1))


def weight_hashes(
    folder: str | Path, layers: Iterable[int], E: int
) -> tuple[str | None, str | None]:
    """(router hash, experts hash) of the checkpoint in `folder`.

    Routers are the 2-D tensors [E, *] of a MoE layer outside its experts, hashed whole; of the
    experts, the first bytes of the first few tensors (by name) of every layer. (None, None) if
    the folder has no safetensors files. A quantised checkpoint has no hash of its experts: they are
    stored otherwise than the original's, whose table serves it as well.
    """
    routers, experts = hashlib.sha256(), hashlib.sha256()
    wanted, sampled = set(layers), dict.fromkeys(layers, 0)
    found = False
    for name, entry in sorted(_tensors(Path(folder)), key=lambda item: item[0]):
        match = _LAYER.search(name)
        if match is None or int(match.group(1)) not in wanted:
            continue
        layer = int(match.group(1))
        if "expert" in name and "shared" not in name:
            if sampled[layer] < _EXPERT_TENSORS_PER_LAYER:
                sampled[layer] += 1
                _update(experts, name, entry, _SAMPLE_BYTES)
                found = True
        elif _is_router(name, entry["shape"], E):
            _update(routers, name, entry, None)
            found = True
    if not found:
        return None, None
    return routers.hexdigest(), None if _is_quantised(Path(folder)) else experts.hexdigest()


def expert_layers(folder: str | Path) -> tuple[int, ...]:
    """Decoder layers that the checkpoint in `folder` has routed experts for, ascending.

    Those of drafters (MTP), which some models number as further layers, are among them; empty where
    there are no safetensors, or none that is called an expert's.
    """
    names = (name for name, _ in _tensors(Path(folder)) if _ROUTED.search(name))
    return tuple(sorted({int(match.group(1)) for name in names if (match := _LAYER.search(name))}))


def configured(folder: str | Path) -> tuple[int | None, int | None]:
    """(E, K) as the model's config.json has them, None where it has no such number."""
    try:
        config = json.loads((Path(folder) / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None, None
    parts = [config, *(config[key] for key in ("text_config", "llm_config") if key in config)]

    def found(names: Sequence[str]) -> int | None:
        values = [part[name] for part in parts for name in names if name in part]
        return next((value for value in values if isinstance(value, int)), None)

    return found(_NUMBERS_OF_EXPERTS), found(_EXPERTS_PER_TOKEN)


def _is_quantised(folder: Path) -> bool:
    config = folder / "config.json"
    return config.is_file() and "quantization_config" in json.loads(config.read_text("utf-8"))


def _is_router(name: str, shape: list[int], E: int) -> bool:
    return len(shape) == 2 and shape[0] == E and not _NOT_A_ROUTER.search(name)


def _tensors(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, header entry with file and absolute offset) of every tensor in the folder."""
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        if "sere" in header.get("__metadata__", {}):
            continue  # a table that lies beside the model
        for name, entry in header.items():
            if name != "__metadata__":
                yield name, {**entry, "path": path, "start": 8 + length + entry["data_offsets"][0]}


def _update(digest: Any, name: str, entry: dict[str, Any], limit: int | None) -> None:
    start, end = entry["data_offsets"]
    size = end - start if limit is None else min(end - start, limit)
    digest.update(f"{name} {entry['dtype']} {entry['shape']}\n".encode())
    with entry["path"].open("rb") as file:
        file.seek(entry["start"])
        digest.update(file.read(size))
