"""The CUDA kernel's own source, compiled for the CPU (see cuda_on_host.cpp) and called here."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sere
from sere.kernels import Batch, Plan
from sere.kernels.reference import NEVER

COMPILER = shutil.which("g++")
HERE = Path(__file__).parent
C_TYPES = {
    torch.int16: "short",
    torch.int32: "int",
    torch.int64: "long long",
    torch.float32: "float",
    torch.float64: "double",
}


def one_block(*arguments: Any) -> Tensor:
    """The launch for decode-sized batches."""
    return _run(*arguments, rows_per_block=0)


def many_blocks(*arguments: Any) -> Tensor:
    """The launches for large batches, with only three rows a block; with votes that were given,
    only the second of them."""
    return _run(*arguments, rows_per_block=3)


def vote(batch: Batch, plan: Plan) -> Tensor:
    """The first of these launches."""
    votes = torch.full((2 * plan.num_experts + 1,), NEVER, dtype=torch.int32)
    if len(batch.ids):
        read = _readable(batch)
        library(read.ids.dtype, read.weights.dtype).host_vote(
            *(3, _threads(read.ids), _pointer(votes)),
            *_arguments(read, plan),
            *(_pointer(plan.settings), _pointer(plan.pool)),
        )
    return votes


def _run(
    batch: Batch,
    plan: Plan,
    counters: Tensor | None,
    votes: Tensor | None = None,
    *,
    rows_per_block: int,
) -> Tensor:
    out = torch.full_like(batch.ids, -7, memory_format=torch.contiguous_format)  # all is written
    read = _readable(batch)
    if len(batch.ids):
        library(read.ids.dtype, read.weights.dtype).host_reroute(
            *(rows_per_block, _threads(read.ids), _pointer(votes)),
            *_arguments(read, plan),
            *(_pointer(plan.neighbours), _pointer(plan.errors), _pointer(plan.scales)),
            *map(_pointer, (plan.settings, plan.pool, out, counters)),
        )
    if read.weights is not batch.weights:
        batch.weights.copy_(read.weights)
    return out


def _threads(topk_ids: Tensor) -> int:
    return 1 + sum(topk_ids.shape) % 3


def _readable(batch: Batch) -> Batch:
    if batch.weights.dtype in C_TYPES:
        return batch
    return batch._replace(weights=batch.weights.float())


def _arguments(batch: Batch, plan: Plan) -> tuple[Any, ...]:
    ids, weights, rows = batch
    return (
        *(_pointer(ids), *map(ctypes.c_longlong, ids.stride())),
        *(_pointer(weights), *map(ctypes.c_longlong, weights.stride())),
        *(_pointer(rows), *ids.shape, plan.num_experts),
    )


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


@functools.cache
def library(ids: torch.dtype, weights: torch.dtype) -> Any:
    """The compiled functions for types of ids and weights."""
    target = Path(tempfile.mkdtemp()) / "reroute.so"
    build(target, ids, weights, "-shared", "-fPIC")
    return ctypes.CDLL(str(target))


def build(
    target: Path, ids: torch.dtype, weights: torch.dtype, *options: str, include: str = ""
) -> None:
    """Compile the kernel (or another, found by `include`) in its host harness."""
    assert COMPILER
    macros = [f"-DID={C_TYPES[ids]}", f"-DWEIGHT={C_TYPES[weights]}"]
    kernels = f"-I{Path(sere.__file__).parent / 'kernels'}"
    flags = [
        "-std=c++20",
        "-O1",
        "-g",
        "-pthread",
        "-ffp-contract=off",
        *macros,
        *options,
        include or kernels,
    ]
    harness = str(HERE / "cuda_on_host.cpp")
    subprocess.run([COMPILER, *flags, include or kernels, harness, "-o", str(target)], check=True)
