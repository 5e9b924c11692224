"""Are two checkpoints stored alike, to the byte? Copies of one model that were quantised by other
tools, or other settings, are not; `weight_hashes` takes them for one model, as a table does."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from pathlib import Path

from sere.checkpoint.names import is_expert_weight, text_layer
from sere.checkpoint.stored import stored_tensors

_TENSORS_A_LAYER = 8
_BYTES = 2**14  # of each, from its middle: the first rows may be padding


def sample_hash(folder: str | Path) -> str | None:
    """SHA-256 over every tensor's name, dtype and shape, and over some bytes of the first experts'
    weights and scales in each layer; None without safetensors. Raises `CheckpointError`."""
    tensors, digest = stored_tensors(folder), hashlib.sha256()
    sampled: dict[int, int] = defaultdict(int)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        layer = text_layer(name)
        of_experts = is_expert_weight(name) or ("expert" in name and "scale" in name)
        if layer is None or not of_experts or sampled[layer] == _TENSORS_A_LAYER:
            continue
        sampled[layer] += 1
        digest.update(tensor.read(max(0, tensor.size - _BYTES) // 2, min(_BYTES, tensor.size)))
    return digest.hexdigest() if tensors else None
