"""The specification for NVIDIA GPUs in CUDA C++ (reroute.cu), compiled when it is first used.

NVIDIA's own Python packages compile (NVRTC) and launch it: no toolkit, no build step at install.
One launch for decode-sized batches, in the form that was fastest where it was measured
(`cuda_choice`); three (a fill, the votes, the moves) for larger ones, and for ranks that share
their votes.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Mapping
from ctypes import c_int
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sere.files import replaced
from sere.kernels.batch import Batch
from sere.kernels.cuda_choice import Gpu, choices_for, variant_for, wants_short
from sere.kernels.cuda_variants import MEASURED, Variant
from sere.kernels.plan import Plan
from sere.kernels.reference import NEVER

MAX_E, MAX_K = 1024, 32
ONE_BLOCK = 8192
"""Up to how many slots one block serves."""
THREADS = 1024
_SOURCES = ("reroute.cu", "distinct.cuh", "row_lanes.cuh", "row_moves.cuh")
_C_TYPES = {
    torch.int16: "short",
    torch.int32: "int",
    torch.int64: "long long",
    torch.float32: "float",
    torch.float64: "double",
}


def run(batch: Batch, plan: Plan, counters: Tensor | None, votes: Tensor | None = None) -> Tensor:
    """New ids [T, K] (see `sere.kernels.reference.run`); all tensors on one NVIDIA GPU."""
    return _run(batch, plan, counters, votes, may_overwrite=False)


def run_in_place(batch: Batch, plan: Plan, counters: Tensor | None) -> Tensor:
    """As `run`; where that is faster the new ids are written over `batch.ids`, and are those."""
    return _run(batch, plan, counters, None, may_overwrite=True)


def _run(
    batch: Batch,
    plan: Plan,
    counters: Tensor | None,
    votes: Tensor | None,
    *,
    may_overwrite: bool,
) -> Tensor:
    (T, K), E = batch.ids.shape, plan.num_experts
    _check_sizes(E, K)
    if T == 0 or K == 0:
        return torch.empty_like(batch.ids)
    gapless = batch.ids.is_contiguous() and batch.weights.is_contiguous()
    variant = MEASURED
    if votes is None and gapless:
        variant = variant_for(_gpu(batch.ids.device), T, E, K)
    if may_overwrite and variant.in_place:
        out = batch.ids
    else:
        out = torch.empty((T, K), dtype=batch.ids.dtype, device=batch.ids.device)
    read = _readable(batch)
    if votes is None and (variant.lanes or T * K <= ONE_BLOCK):
        launch(variant, read, plan, counters, out)
    else:
        if votes is None:
            votes = vote(read, plan)
        elif counters is not None:
            votes = votes.clone()  # blocks tell each other what they counted
        share, blocks = _split(T, K)
        _kernels_for(read, plan, MEASURED).launch(
            "reroute_move",
            MEASURED,
            blocks,
            *(*_arguments(read, plan), share, votes.data_ptr()),
            *_decision(plan, counters, out),
        )
    if read.weights is not batch.weights:
        batch.weights.copy_(read.weights)
    return out


def launch(
    variant: Variant, batch: Batch, plan: Plan, counters: Tensor | None, out: Tensor
) -> None:
    """Re-route by one form of the kernel, in one launch.

    batch: without gaps if the form is `fixed`; weights float32 or float64. out: [T, K] without
    gaps; `batch.ids` themselves to work in place.
    """
    scratch = _scratch(plan) if variant.joined == "ticket" else None
    if variant.joined == "ticket" and scratch is None:
        variant = MEASURED
    kernels, arguments = _kernels_for(batch, plan, variant), _arguments(batch, plan)
    decision = _decision(plan, counters, out)
    if variant.lanes:
        share = c_int(-(-len(batch.ids) // variant.blocks))
        more = (share, _pointer(scratch))
        kernels.launch("reroute_lanes", variant, variant.blocks, *arguments, *more, *decision)
    else:
        kernels.launch("reroute_at_once", variant, 1, *arguments, *decision)


def prepared(plan: Plan, K: int) -> Plan:
    """The plan with neighbour lists of the type that its GPU reads fastest; K: of its layer."""
    if not wants_short(_gpu(plan.neighbours.device), plan.num_experts, K):
        return plan
    return replace(plan, neighbours=plan.neighbours.to(torch.int16))


_SCRATCH: dict[tuple[int, int], Tensor] = {}


def _scratch(plan: Plan) -> Tensor | None:
    """Votes and a ticket, which a launch leaves as it found them: one for each plan and stream,
    whose launches wait for each other. None if it would have to be made in a graph's capture."""
    settings = plan.settings
    key = settings.data_ptr(), torch.cuda.current_stream(settings.device).cuda_stream
    if key not in _SCRATCH and not torch.cuda.is_current_stream_capturing():
        made = torch.full((2 * plan.num_experts + 2,), NEVER, dtype=torch.int32)
        made[-1] = 0
        _SCRATCH[key] = made.to(settings.device)
    return _SCRATCH.get(key)


def _decision(plan: Plan, counters: Tensor | None, out: Tensor) -> tuple[int, ...]:
    """The arguments of launches that move slots."""
    return (
        *(plan.neighbours.data_ptr(), plan.errors.data_ptr()),
        *(plan.scales.data_ptr(), plan.settings.data_ptr(), plan.pool.data_ptr()),
        *(out.data_ptr(), _pointer(counters)),
    )


def vote(batch: Batch, plan: Plan) -> Tensor:
    """[2 E + 1] int32 (see `sere.kernels.reference.vote`); all tensors on one NVIDIA GPU."""
    (T, K), E = batch.ids.shape, plan.num_experts
    _check_sizes(E, K)
    votes = torch.full((2 * E + 1,), NEVER, dtype=torch.int32, device=batch.ids.device)
    if T and K:
        read = _readable(batch)
        share, blocks = _split(T, K)
        shared_out = (share, votes.data_ptr(), plan.settings.data_ptr(), plan.pool.data_ptr())
        kernels, arguments = _kernels_for(read, plan, MEASURED), _arguments(read, plan)
        kernels.launch("reroute_vote", MEASURED, blocks, *arguments, *shared_out)
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
        device = torch.device("cuda", torch.cuda.current_device())
        types = torch.int32, torch.float32, torch.int32
        _kernels(device, *types, MEASURED, 0, 0)
    except Exception as error:  # a compiler's, a driver's, a loader's
        return f"{type(error).__name__}: {error}"
    return None


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


class Kernels:
    """The loaded kernels of one device, in one form."""

    def __init__(self, device: torch.device, cubin: bytes, names: tuple[str, ...]) -> None:
        from cuda.core import Device, ObjectCode

        Device(device.index or 0).set_current()
        module = ObjectCode.from_cubin(cubin)
        self._kernels = {name: module.get_kernel(name) for name in names}
        self._device = device

    def launch(self, name: str, variant: Variant, blocks: int, *arguments: Any) -> None:
        """Launch on PyTorch's current stream."""
        from cuda.core import LaunchConfig, Stream, launch

        stream = Stream.from_handle(torch.cuda.current_stream(self._device).cuda_stream)
        config = LaunchConfig(**launch_options(variant, blocks))
        launch(stream, config, self._kernels[name], *arguments)


def launch_options(variant: Variant, blocks: int) -> dict[str, Any]:
    """Of `cuda.core.LaunchConfig`, whose grid counts clusters where there are any."""
    options: dict[str, Any] = {"grid": blocks, "block": variant.threads}
    if variant.joined == "cluster":
        options |= {"grid": 1, "cluster": blocks}
    if variant.pdl:
        options["programmatic_stream_serialization"] = True
    return options


def _kernels_for(batch: Batch, plan: Plan, variant: Variant) -> Kernels:
    """For these types and sizes. The first time, every form that this model may ask for is loaded:
    none later, in a graph's capture or while requests wait."""
    (_, K), E, device = batch.ids.shape, plan.num_experts, batch.ids.device
    types = batch.ids.dtype, batch.weights.dtype, plan.neighbours.dtype
    for each in _to_load(_gpu(device), E, K):
        _kernels(device, *types, each, *((E, K) if each.fixed else (0, 0)))
    return _kernels(device, *types, variant, *((E, K) if variant.fixed else (0, 0)))


@functools.cache
def _to_load(gpu: Gpu, E: int, K: int) -> frozenset[Variant]:
    chosen = {choice.variant for choice in choices_for(gpu, E, K)}
    return frozenset({MEASURED, *(v for v in chosen if v.fits(1, E, K, gpu[1]))})


@functools.cache
def _gpu(device: torch.device) -> Gpu:
    return torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)


@functools.cache
def _kernels(
    device: torch.device,
    ids: torch.dtype,
    weights: torch.dtype,
    lists: torch.dtype,
    variant: Variant,
    E: int,
    K: int,
) -> Kernels:
    major, minor = torch.cuda.get_device_capability(device)
    macros = variant.macros(E, K) | ({"NEIGHBOUR": "short"} if lists == torch.int16 else {})
    names = ("reroute_at_once", "reroute_vote", "reroute_move")
    cubin = compiled(f"sm_{major}{minor}", ids, weights, macros)
    return Kernels(device, cubin, ("reroute_lanes",) if variant.lanes else names)


def compiled(
    architecture: str,
    ids: torch.dtype,
    weights: torch.dtype,
    switches: Mapping[str, str] | None = None,
) -> bytes:
    """The cubin for an architecture ("sm_90"), types of ids and weights, and the compile-time
    switches of a form (see `Variant.macros`), from a cache on disk.

    Processes that compile at the same time write equal files, each in one piece.
    """
    from cuda.bindings import nvrtc

    source = source_text()
    macros = {"ID": _C_TYPES[ids], "WEIGHT": _C_TYPES[weights], **(switches or {})}
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
    """reroute.cu, with the files that it includes."""
    main, *others = ((files("sere.kernels") / name).read_text() for name in _SOURCES)
    for name, included in zip(_SOURCES[1:], others, strict=True):
        main = main.replace(f'#include "{name}"', included)
    return main


def _compile(source: str, architecture: str, macros: dict[str, str]) -> bytes:
    from cuda.core import Program, ProgramOptions

    options = ProgramOptions(
        arch=architecture, std="c++17", define_macro=list(macros.items()), name="reroute.cu"
    )
    return bytes(Program(source, "c++", options).compile("cubin").code)


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "sere"
