"""The hashes in a fingerprint: of the values, whatever the files look like.

They are computed from the safetensors on disk, by the same code at calibration and at serving, so
they do not depend on how an engine fuses, renames, shards or quantises weights after loading. Nor
do they depend on what a model is called within another, on whether experts are stacked or apart, on
bf16 being kept in more bits, or on files that the model does not use.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from sere.checkpoint.fingerprint import HASHING
from sere.checkpoint.first_hashes import first_hashes
from sere.checkpoint.names import (
    is_expert_weight,
    is_router,
    is_stacked,
    one_of_them,
    text_layer,
)
from sere.checkpoint.quantised import is_quantised
from sere.checkpoint.stored import Stored, stored_tensors
from sere.threads import one_thread

_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Below this, float16 has fewer digits than bf16: such weights count as 0.
_SMALLEST = 2.0**-14
_SAMPLED = 2**27  # weights of experts that are read, as long as one expert has no more
_CHUNK = 2**24  # bytes at a time


def weight_hashes(
    folder: str | Path, layers: Iterable[int], E: int, hashing: int = HASHING
) -> tuple[str | None, str | None]:
    """(router hash, experts hash) of the checkpoint in `folder`, None for what cannot be compared.

    Routers are the matrices [E, *] of a MoE layer outside its experts, each as it stands, rounded
    to bf16: tools that quantise experts store the rest so. Of an expert it is counted how often it
    holds each value, as tools transpose and join its matrices: expert 0 of every layer, then expert
    1, until so many weights are read. Quantised experts are stored otherwise than the original's,
    whose table serves them as well: None, and for all where there are no safetensors.

    hashing: 1 computes what tables of format 2 hold. Raises `CheckpointError`.
    """
    if hashing == 1:
        return first_hashes(folder, layers, E)
    with one_thread():  # a server waits for it
        return _hashes(folder, set(layers), E)


def _hashes(folder: str | Path, wanted: set[int], E: int) -> tuple[str | None, str | None]:
    tensors = stored_tensors(folder)
    routers = []
    experts: dict[int, dict[int, list[_Part]]] = defaultdict(lambda: defaultdict(list))
    for name, tensor in tensors.items():
        if (layer := text_layer(name)) not in wanted or layer is None:
            continue
        if is_router(name, tensor.shape, E) and tensor.dtype in _FLOATS:
            routers.append(f"{layer:06} {_in_order(_Part(tensor, 0, tensor.size))}")
        for expert, part in _parts(name, tensor, E):
            experts[expert][layer].append(part)
    quantised = is_quantised(folder, tensors)
    return (
        hashlib.sha256("\n".join(sorted(routers)).encode()).hexdigest() if routers else None,
        None if quantised or not experts else _counted(experts),
    )


class _Part:
    """A stretch of a tensor's bytes: one expert's matrix."""

    def __init__(self, tensor: Stored, start: int, size: int) -> None:
        self._tensor, self._start, self._size = tensor, start, size
        self._dtype = _FLOATS[tensor.dtype]
        self.count = size // self._dtype.itemsize

    def __iter__(self) -> Iterator[Tensor]:
        """Its values as float32, a chunk at a time; the tiny are 0."""
        for start in range(0, self._size, _CHUNK):
            size = min(_CHUNK, self._size - start)
            data = bytearray(self._tensor.read(self._start + start, size))
            values = torch.frombuffer(data, dtype=self._dtype).float()
            yield values.masked_fill(values.abs() < _SMALLEST, 0)


def _parts(name: str, tensor: Stored, E: int) -> Iterator[tuple[int, _Part]]:
    """(expert, its part of a tensor): nothing of what is no expert's weight, or packed."""
    if tensor.dtype not in _FLOATS:
        return
    if is_expert_weight(name) and (expert := one_of_them(name)) is not None:
        if expert < E:  # ernie4_5_vl_moe: those above are for images
            yield expert, _Part(tensor, 0, tensor.size)
    elif is_stacked(name, tensor.shape, E):
        size = tensor.size // E
        for expert in range(E):
            yield expert, _Part(tensor, expert * size, size)


def _in_order(part: _Part) -> str:
    digest = hashlib.sha256()
    for values in part:
        digest.update(values.bfloat16().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def _counted(experts: dict[int, dict[int, list[_Part]]]) -> str:
    digest, read = hashlib.sha256(), 0
    for expert, layers in sorted(experts.items()):
        for layer, parts in sorted(layers.items()):
            count = sum(part.count for part in parts)
            if read and read + count > _SAMPLED:
                return digest.hexdigest()
            read += count
            digest.update(f"{layer} {expert} ".encode())
            digest.update(_histogram(parts).numpy().tobytes())
    return digest.hexdigest()


def _histogram(parts: list[_Part]) -> Tensor:
    """[2, 2**16] int64: how often an expert's values have each first and each last 16 bits."""
    counts = torch.zeros(2, 2**16, dtype=torch.int64)
    for part in parts:
        for values in part:
            bits = values.view(torch.int32)
            for half, own in zip(counts, (bits >> 16, bits & 0xFFFF), strict=True):
                half += torch.bincount(own & 0xFFFF, minlength=2**16)
    return counts
