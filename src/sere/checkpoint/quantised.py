"""Is a checkpoint quantised, by which method, and are all scales of its experts there?"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sere.checkpoint.names import is_expert_weight, text_layer
from sere.checkpoint.stored import Stored, document, stored_tensors

FLOATS = ("F64", "F32", "F16", "BF16")
_IN_CONFIG = ("quantization_config", "compression_config")
# Where other tools say what they did, and what they call it.
_BESIDE = {
    "hf_quant_config.json": "modelopt",
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
}
_PACKED = ("_packed", "_blocks")
_MODELOPT_PAIRS = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN")
_UNPACKED = ("int-quantized", "naive-quantized")


def settings(folder: str | Path) -> dict[str, Any]:
    """What the model's config says of its quantisation, at its top or in a part of it, else, where
    experts are packed, what a tool has left beside it; {} if it has none. Raises
    `CheckpointError`."""
    folder = Path(folder)
    if (path := folder / "config.json").is_file() and (found := _within(document(path))):
        return found
    for name, method in _BESIDE.items():
        if (folder / name).is_file() and packed_experts(stored_tensors(folder)):
            return {"quant_method": method, **document(folder / name)}
    return {}


def method(folder: str | Path) -> str:
    """The quantisation method, "" if there is none (or nothing to be asked)."""
    found = settings(folder)
    return str(found.get("quant_method") or "of an unnamed method") if found else ""


def in_pairs(folder: str | Path) -> bool:
    """Whether weights lie there as int8 or float8 numbers, each beside its `weight_scale`, in a way
    that transformers does not read: ModelOpt's FP8, and int8 of compressed-tensors."""
    found = settings(folder)
    if found.get("quant_method") == "modelopt":
        inner = found.get("quantization")
        algorithm = {**(inner if isinstance(inner, Mapping) else {}), **found}.get("quant_algo")
        return str(algorithm).upper() in _MODELOPT_PAIRS
    groups = found.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        return False
    return all(_int8(group, found.get("format")) for group in groups.values())


def _int8(group: Any, form: Any) -> bool:
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping) or weights.get("actorder") == "group":
        return False
    unpacked = (group.get("format") or form) in _UNPACKED
    return unpacked and weights.get("num_bits") == 8 and weights.get("type") == "int"


def is_quantised(folder: str | Path, tensors: Mapping[str, Stored]) -> bool:
    """Whether it says so, or its experts are stored as what only a quantised model's are."""
    return bool(settings(folder)) or bool(packed_experts(tensors))


def packed_experts(tensors: Mapping[str, Stored]) -> list[str]:
    """Names of experts' weights that are no floating-point numbers of 16 bits or more."""
    return [
        name
        for name, tensor in tensors.items()
        if tensor.dtype not in FLOATS and is_expert_weight(name) and text_layer(name) is not None
    ]


def without_scale(tensors: Mapping[str, Stored]) -> list[str]:
    """Those of `packed_experts` beside which there is no scale."""
    stems = {_stem(name) for name in tensors if "scale" in name}
    return [name for name in packed_experts(tensors) if _weight(name) not in stems]


def _stem(scale: str) -> str:
    """The weight that a scale is of: `w` of `w_scale`, `w_scale_inv` and `w_scales`."""
    module, _, last = scale.rpartition(".")
    return f"{module}.{last.partition('_scale')[0]}"


def _weight(name: str) -> str:
    for end in _PACKED:
        name = name.removesuffix(end)
    return name


def _within(config: Mapping[str, Any]) -> dict[str, Any]:
    for name in _IN_CONFIG:
        if isinstance(found := config.get(name), Mapping) and found:
            return dict(found)
    for part in config.values():
        if isinstance(part, Mapping) and (found := _within(part)):
            return found
    return {}
