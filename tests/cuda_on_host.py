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
    """The launches for large batches, with only three rows a block."""
    return _run(*arguments, rows_per_block=3)


def _run(
    topk_ids: Tensor,
    topk_weights: Tensor,
    plan: Plan,
    rows: Tensor | None,
    counters: Tensor | None,
    rows_per_block: int,
) -> Tensor:
    T, K = topk_ids.shape
    out = torch.full((T, K), -7, dtype=topk_ids.dtype)  # poisoned: every slot must be written
    weights = topk_weights if topk_weights.dtype in C_TYPES else topk_weights.float()
    threads = 1 + (T + K) % 3
    if T:
        library(topk_ids.dtype, weights.dtype)(
            *(rows_per_block, threads),
            *(_pointer(topk_ids), *map(ctypes.c_longlong, topk_ids.stride())),
            *(_pointer(weights), *map(ctypes.c_longlong, weights.stride())),
            *(_pointer(rows), T, K, plan.num_experts),
            *(_pointer(plan.neighbours), _pointer(plan.errors), _pointer(plan.scales)),
            *(_pointer(plan.settings), _pointer(out), _pointer(counters)),
        )
    if weights is not topk_weights:
        topk_weights.copy_(weights)
    return out


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


@functools.cache
def library(ids: torch.dtype, weights: torch.dtype) -> Any:
    """The compiled function for types of ids and weights."""
    target = Path(tempfile.mkdtemp()) / "reroute.so"
    build(target, ids, weights, "-shared", "-fPIC")
    return ctypes.CDLL(str(target)).host_reroute


def build(
    target: Path, ids: torch.dtype, weights: torch.dtype, *options: str, include: str = ""
) -> None:
    """Compile the kernel (or another, found by `include`) in its host harness."""
    assert COMPILER
    macros = [f"-DID={C_TYPES[ids]}", f"-DWEIGHT={C_TYPES[weights]}"]
    kernels = f"-I{Path(sere.__file__).parent / 'kernels'}"
    flags = ["-std=c++20", "-O1", "-g", "-pthread", *macros, *options, include or kernels]
    harness = str(HERE / "cuda_on_host.cpp")
    subprocess.run([COMPILER, *flags, harness, "-o", str(target)], check=True)
