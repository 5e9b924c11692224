"""May this checkpoint be calibrated? What its files tell before it is loaded, and loading itself.

Nothing may be calibrated that is not what the model computes with: weights that are missing, packed
experts without their scales, scales that nobody applies.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sere.checkpoint import quantised
from sere.checkpoint.configured import EXPERTS_PER_TOKEN, NUMBERS_OF_EXPERTS, configured
from sere.checkpoint.names import experts_by_layer, is_expert_weight
from sere.checkpoint.stored import document, stored_tensors

# How much larger a checkpoint is once its weights are bf16. Others are refused.
DEQUANTISED = {"fp8": 2, "mxfp4": 4, "compressed-tensors": 4}
# Scales of activations and of the KV cache, which no weight is multiplied with.
_NO_WEIGHTS = re.compile(r"(?:input|output|activation|[kqv]|kv|prob)_scale(?:_inv)?$")
# Names that only some architectures have; elsewhere a config.json's top_k may be of sampling.
PER_TOKEN = (*EXPERTS_PER_TOKEN, "top_k_experts", "moe_top_k", "top_k")
_ORIGINAL = "Calibrate the original, unquantised checkpoint: its table serves the quantised one too"


class LoadError(ValueError):
    """A checkpoint that cannot be calibrated, and why."""


def check_stored(folder: str | Path) -> None:
    """Refuse what the checkpoint's files already tell, before anything is read or loaded.

    Raises `CheckpointError` for files that are not whole, `LoadError` for experts that would not
    be what the model computes with, or that differ in number between layers.
    """
    tensors, how = stored_tensors(folder), quantised.method(folder)
    _check_method(folder, how)
    if any(t.dtype == "F64" and is_expert_weight(name) for name, t in tensors.items()):
        raise LoadError(
            f"{folder}: its experts are stored in float64, which transformers does not compute "
            "their products in: convert them to bfloat16 or float32"
        )
    if packed := quantised.packed_experts(tensors):
        bare = packed if not how else quantised.without_scale(tensors)
        if bare:
            why = "no scale is beside them" if how else "nothing in config.json says how to unpack"
            raise LoadError(
                f"{folder}: {len(bare)} experts' weights are stored as {tensors[bare[0]].dtype} "
                f"({bare[0]} ...) and {why}, so that they would be taken for plain numbers. "
                f"{_ORIGINAL}"
            )
    parts, by_kind = _parts(folder)
    if not by_kind:  # ernie4_5_vl_moe: experts for text and for images, not in the same layers
        depth = max((part.get("num_hidden_layers") or 0 for part in parts), default=0)
        counts = experts_by_layer(tensors)  # drafters are numbered as layers behind the last
        check_even(folder, "experts", {i: n for i, n in counts.items() if i < depth or not depth})
    check_configured(folder)


def check_configured(folder: str | Path) -> None:
    """Refuse what the model's config alone tells. Raises as `check_stored`."""
    _check_method(folder, quantised.method(folder))
    E, K = configured(folder)
    if E and K is not None and not 1 <= K <= E:
        raise LoadError(f"{folder}: its config.json has {K} experts per token of {E}: mend it")
    parts, by_kind = _parts(folder)
    for names, what in ((NUMBERS_OF_EXPERTS, "experts"), (PER_TOKEN, "experts per token")):
        for part in parts:
            if not (by_kind and what == "experts"):
                check_even(folder, what, _by_layer(part, names))


def _parts(folder: str | Path) -> tuple[list[dict[str, Any]], bool]:
    """The config with those inside it; whether it counts experts of several kinds."""
    path = Path(folder) / "config.json"
    config = document(path) if path.is_file() else {}
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    by_kind = any(isinstance(part.get(name), list) for part in parts for name in NUMBERS_OF_EXPERTS)
    return parts, by_kind


def _by_layer(config: dict[str, Any], names: Sequence[str]) -> dict[int, int]:
    """What a config says of single layers, in a list, as transformers' `per_layer_config`, or as
    the `block_configs` of models that NVIDIA's Puzzle pruned; {} if it says nothing of the kind."""
    common = _first(config, names)
    if isinstance(common, list):
        return dict(enumerate(common))
    blocks = config.get("block_configs")
    said = {
        i: _first(each, names) for i, each in enumerate(blocks if isinstance(blocks, list) else [])
    }
    if isinstance(by_layer := config.get("per_layer_config"), dict):
        said = dict.fromkeys(range(config.get("num_hidden_layers") or 0), common)
        said |= {int(i): own for i, each in by_layer.items() if (own := _first(each, names))}
    return {i: number for i, number in said.items() if isinstance(number, int)}


def _first(config: Any, names: Sequence[str]) -> Any:
    return next((config[name] for name in names if name in config), None)


def check_even(folder: str | Path, what: str, counts: dict[int, int]) -> None:
    """Raise `LoadError` unless all layers have as many."""
    first = {count: layer for layer, count in reversed(counts.items()) if count}
    if len(first) > 1:
        seen = ", ".join(f"layer {i}: {n}" for n, i in sorted(first.items(), key=lambda x: x[1]))
        raise LoadError(
            f"{folder}: layers with different numbers of {what} ({seen}) are not supported: a "
            "table has one number for all of them. Calibrate and serve the model that this one "
            "was pruned from"
        )


def _check_method(folder: str | Path, method: str) -> None:
    if method and method not in DEQUANTISED and not quantised.in_pairs(folder):
        raise LoadError(
            f"{folder}: {method} experts cannot be turned back into weights here "
            f"(supported: {', '.join(DEQUANTISED)}, FP8 of modelopt). {_ORIGINAL}"
        )


def check_vocabulary(model: Any, token: int) -> None:
    """Raise `LoadError` for a token that the model has no row for: torch would name an index."""
    try:
        rows = getattr(model.get_input_embeddings(), "num_embeddings", None)
    except (NotImplementedError, AttributeError):  # some keep them elsewhere
        return
    if rows is not None and token >= rows:
        raise LoadError(
            f"the tokenizer gives token {token}, where the model has {rows}: is it another model's?"
        )


def refuse_unset(folder: str, unset: set[str]) -> None:
    """Raise `LoadError` if the checkpoint left these weights unset."""
    if unset:
        raise LoadError(
            f"{folder}: {len(unset)} weights are missing from the checkpoint or of another shape "
            f"({', '.join(sorted(unset)[:3])} ...) and would be random; calibrate the original, "
            "unquantised checkpoint"
        )


def refuse_unapplied(folder: str, unexpected: set[str]) -> None:
    """Raise `LoadError` if the model was given weights without the scales beside them."""
    idle = {key.rpartition(".")[0] for key in unexpected if "scale" not in key}
    scales = [key for key in sorted(unexpected) if "scale" in key.rpartition(".")[2]]
    lost = [
        key for key in scales if not (_NO_WEIGHTS.search(key) or key.rpartition(".")[0] in idle)
    ]
    if lost:
        raise LoadError(
            f"{folder}: {len(lost)} scales would not be applied to their weights ({lost[0]} ...): "
            f"transformers does not know them. {_ORIGINAL}"
        )
