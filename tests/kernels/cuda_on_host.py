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
from sere.kernels import Plan
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


def vote(topk_ids: Tensor, topk_weights: Tensor, plan: Plan, rows: Tensor | None) -> Tensor:
    """The first of these launches."""
    votes = torch.full((2 * plan.num_experts + 1,), NEVER, dtype=torch.int32)
    if len(topk_ids):
        weights = _readable(topk_weights)
        library(topk_ids.dtype, weights.dtype).host_vote(
            *(3, _threads(topk_ids), _pointer(votes)),
            *_batch(topk_ids, weights, plan, rows),
            _pointer(plan.settings),
        )
    return votes


def _run(
    topk_ids: Tensor,
    topk_weights: Tensor,
    plan: Plan,
    rows: Tensor | None,
    counters: Tensor | None,
    votes: Tensor | None = None,
    *,
    rows_per_block: int,
) -> Tensor:
    out = torch.full(topk_ids.shape, -7, dtype=topk_ids.dtype)  # every slot must be written
    weights = _readable(topk_weights)
    if len(topk_ids):
        library(topk_ids.dtype, weights.dtype).host_reroute(
            *(rows_per_block, _threads(topk_ids), _pointer(votes)),
            *_batch(topk_ids, weights, plan, rows),
            *(_pointer(plan.neighbours), _pointer(plan.errors), _pointer(plan.scales)),
            *(_pointer(plan.settings), _pointer(out), _pointer(counters)),
        )
    if weights is not topk_weights:
        topk_weights.copy_(weights)
    return out


def _threads(topk_ids: Tensor) -> int:
    return 1 + sum(topk_ids.shape) % 3


def _readable(weights: Tensor) -> Tensor:
    return weights if weights.dtype in C_TYPES else weights.float()


def _batch(topk_ids: Tensor, weights: Tensor, plan: Plan, rows: Tensor | None) -> tuple[Any, ...]:
    return (
        *(_pointer(topk_ids), *map(ctypes.c_longlong, topk_ids.stride())),
        *(_pointer(weights), *map(ctypes.c_longlong, weights.stride())),
        *(_pointer(rows), *topk_ids.shape, plan.num_experts),
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
