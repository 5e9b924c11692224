"""The specification for NVIDIA GPUs in CUDA C++ (reroute.cu), compiled when it is first used.

NVIDIA's own Python packages compile (NVRTC) and launch it: no toolkit, no build step at install.
One launch for decode-sized batches; three (a fill, the votes, the moves) for larger ones, and for
ranks that share their votes.
"""

from __future__ import annotations

import functools
import hashlib
import os
from ctypes import c_int
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sere.files import replaced
from sere.kernels.batch import Batch
from sere.kernels.plan import Plan
from sere.kernels.reference import NEVER

MAX_E, MAX_K = 1024, 32
ONE_BLOCK = 8192
"""Up to how many slots one block serves."""
THREADS = 1024
_SOURCES = ("reroute.cu", "distinct.cuh")
_C_TYPES = {
    torch.int16: "short",
    torch.int32: "int",
    torch.int64: "long long",
    torch.float32: "float",
    torch.float64: "double",
}


def run(batch: Batch, plan: Plan, counters: Tensor | None, votes: Tensor | None = None) -> Tensor:
    """New ids [T, K] (see `sere.kernels.reference.run`); all tensors on one NVIDIA GPU."""
    T, K = batch.ids.shape
    out = torch.empty((T, K), dtype=batch.ids.dtype, device=batch.ids.device)
    _check_sizes(plan.num_experts, K)
    if T == 0 or K == 0:
        return out
    read = _readable(batch)
    decision = (
        *(plan.neighbours.data_ptr(), plan.errors.data_ptr()),
        *(plan.scales.data_ptr(), plan.settings.data_ptr()),
        *(out.data_ptr(), _pointer(counters)),
    )
    kernels, arguments = _kernels_for(read), _arguments(read, plan)
    if votes is None and T * K <= ONE_BLOCK:
        kernels.launch("reroute_at_once", 1, *arguments, *decision)
    else:
        if votes is None:
            votes = vote(read, plan)
        elif counters is not None:
            votes = votes.clone()  # blocks tell each other what they counted
        share, blocks = _split(T, K)
        kernels.launch("reroute_move", blocks, *arguments, share, votes.data_ptr(), *decision)
    if read.weights is not batch.weights:
        batch.weights.copy_(read.weights)
    return out


def vote(batch: Batch, plan: Plan) -> Tensor:
    """[2 E + 1] int32 (see `sere.kernels.reference.vote`); all tensors on one NVIDIA GPU."""
    (T, K), E = batch.ids.shape, plan.num_experts
    _check_sizes(E, K)
    votes = torch.full((2 * E + 1,), NEVER, dtype=torch.int32, device=batch.ids.device)
    if T and K:
        read = _readable(batch)
        share, blocks = _split(T, K)
        shared_out = (share, votes.data_ptr(), plan.settings.data_ptr())
        _kernels_for(read).launch("reroute_vote", blocks, *_arguments(read, plan), *shared_out)
    return votes


def _check_sizes(E: int, K: int) -> None:
    if K > MAX_K or E > MAX_E:
        raise ValueError(f"E={E}, K={K}: the CUDA kernel goes to E={MAX_E}, K={MAX_K}; use triton")


def _readable(batch: Batch) -> Batch:
    """With weights of a type that the kernel has; order and zeros are kept."""
    if batch.weights.dtype in (torch.float32, torch.float64):
        return batch
    return batch._replace(weights=batch.weights.float())


def _arguments(batch: Batch, plan: Plan) -> tuple[Any, ...]:
    """The arguments of every launch that are the batch."""
    ids, weights, rows = batch
    T, K = ids.shape
    return (
        *(ids.data_ptr(), ids.stride(0), ids.stride(1)),
        *(weights.data_ptr(), weights.stride(0), weights.stride(1)),
        *(_pointer(rows), c_int(T), c_int(K), c_int(plan.num_experts)),
    )


def _split(T: int, K: int) -> tuple[c_int, int]:
    """How many rows each block of a large batch takes, and how many blocks there are."""
    share = max(1, THREADS // K)
    return c_int(share), -(-T // share)


def obstacle() -> str | None:
    """Why this machine cannot use the kernel, or None. Compiles and loads it."""
    try:
        _kernels(torch.device("cuda", torch.cuda.current_device()), torch.int32, torch.float32)
    except Exception as error:  # a compiler's, a driver's, a loader's
        return f"{type(error).__name__}: {error}"
    return None


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


class Kernels:
    """The loaded kernels of one device."""

    def __init__(self, device: torch.device, cubin: bytes) -> None:
        from cuda.core import Device, ObjectCode

        Device(device.index or 0).set_current()
        module = ObjectCode.from_cubin(cubin)
        names = ("reroute_at_once", "reroute_vote", "reroute_move")
        self._kernels = {name: module.get_kernel(name) for name in names}
        self._device = device

    def launch(self, name: str, blocks: int, *arguments: Any) -> None:
        """Launch on PyTorch's current stream."""
        from cuda.core import LaunchConfig, Stream, launch

        stream = Stream.from_handle(torch.cuda.current_stream(self._device).cuda_stream)
        launch(stream, LaunchConfig(grid=blocks, block=THREADS), self._kernels[name], *arguments)


def _kernels_for(batch: Batch) -> Kernels:
    return _kernels(batch.ids.device, batch.ids.dtype, batch.weights.dtype)


@functools.cache
def _kernels(device: torch.device, ids: torch.dtype, weights: torch.dtype) -> Kernels:
    major, minor = torch.cuda.get_device_capability(device)
    return Kernels(device, compiled(f"sm_{major}{minor}", ids, weights))


def compiled(architecture: str, ids: torch.dtype, weights: torch.dtype) -> bytes:
    """The cubin for an architecture ("sm_90") and types of ids and weights, from a cache on disk.

    Processes that compile at the same time write equal files, each in one piece.
    """
    from cuda.bindings import nvrtc

    source = source_text()
    macros = {"ID": _C_TYPES[ids], "WEIGHT": _C_TYPES[weights]}
    key = repr((source, architecture, macros, nvrtc.nvrtcVersion()))
    path = _cache_folder() / f"reroute-{hashlib.sha256(key.encode()).hexdigest()[:24]}.cubin"
    if path.exists():
        return path.read_bytes()
    cubin = _compile(source, architecture, macros)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced(path) as partial:
            partial.write_bytes(cubin)
    except OSError:
        pass  # a read-only home: compiled again next time, half a second
    return cubin


def source_text() -> str:
    """reroute.cu, with the file that it includes."""
    main, included = ((files("sere.kernels") / name).read_text() for name in _SOURCES)
    return main.replace(f'#include "{_SOURCES[1]}"', included)


def _compile(source: str, architecture: str, macros: dict[str, str]) -> bytes:
    from cuda.core import Program, ProgramOptions

    options = ProgramOptions(
        arch=architecture, std="c++17", define_macro=list(macros.items()), name="reroute.cu"
    )
    return bytes(Program(source, "c++", options).compile("cubin").code)


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "sere"
