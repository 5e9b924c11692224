"""The operator for CPUs: `numba_loops` on the memory of tensors."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from numba import carray, cfunc, types
from torch import Tensor

from sere.kernels import numba_loops, numba_rows
from sere.kernels.batch import Batch
from sere.kernels.numba_loops import reroute
from sere.kernels.numba_rows import FAST
from sere.kernels.plan import SETTINGS, Plan
from sere.kernels.reference import COUNTERS

_TYPES = {
    torch.int16: types.int16,
    torch.int32: types.int32,
    torch.int64: types.int64,
    torch.float32: types.float32,
    torch.float64: types.float64,
}
_KEPT: list[Any] = []
_BOUND_ROWS = 512  # larger batches have an output of their own


def run(batch: Batch, plan: Plan, counters: Tensor | None, votes: Tensor | None = None) -> Tensor:
    """New ids [T, K] (see `sere.kernels.reference.run`); all tensors on the CPU."""
    T, K = batch.ids.shape
    ids, weights, rows = _readable(batch)
    out = torch.empty((T, K), dtype=ids.dtype)
    _entry(out.dtype, weights.dtype)(
        *(ids.data_ptr(), weights.data_ptr(), out.data_ptr(), rows.data_ptr(), T, K),
        *_fixed(plan, counters, votes),
    )
    if weights is not batch.weights:
        batch.weights.copy_(weights)
    return out.to(batch.ids.dtype)


def vote(batch: Batch, plan: Plan) -> Tensor:
    """[2 E + 1] int32 (see `sere.kernels.reference.vote`); all tensors on the CPU."""
    votes = torch.empty(2 * plan.num_experts + 1, dtype=torch.int32)
    ids, weights, rows = _readable(batch)
    numba_loops.vote(*(t.numpy() for t in (ids, weights, plan.settings, plan.pool, rows, votes)))
    return votes


def _readable(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """What the loops can read: contiguous, and of a type that they know; no row class left out."""
    ids, weights, rows = batch
    if ids.dtype not in _TYPES:
        ids = ids.long()
    if weights.dtype not in _TYPES:
        weights = weights.float()  # numpy has no bfloat16; order and zeros are kept
    if rows is None:
        rows = torch.full(ids.shape[:1], FAST, dtype=torch.int8)
    return ids.contiguous(), weights.contiguous(), rows.contiguous()


def compile_for(ids: torch.dtype, weights: torch.dtype) -> None:
    """What `run` and `bound` call for batches of these dtypes."""
    _entry(ids if ids in _TYPES else torch.int64, weights if weights in _TYPES else torch.float32)


def bound(plan: Plan, counters: Tensor, rows: Tensor) -> Callable[[Tensor, Tensor, int], Tensor]:
    """`run` for one layer of an engine, on its first T rows: buffers that stay where they are, ids
    and weights that are of one dtype and K in every call.

    In an engine, its caches full of weights, looking things up costs more than the loops do. So
    addresses are taken once, and batches of a size share one output, good until the next of them.
    """
    fixed = _fixed(plan, counters)
    ready = dict[int, tuple[Callable[..., None], Tensor, tuple[Any, ...]]]()

    def run_bound(topk_ids: Tensor, topk_weights: Tensor, T: int) -> Tensor:
        readable = topk_ids.is_contiguous() and topk_weights.is_contiguous()
        known = ready.get(T) if readable else None
        if known is None:
            known_types = topk_ids.dtype in _TYPES and topk_weights.dtype in _TYPES
            if not (readable and known_types) or T > _BOUND_ROWS:
                return run(Batch(topk_ids, topk_weights, rows[:T]), plan, counters)
            out, K = torch.empty_like(topk_ids), topk_ids.shape[1]
            entry = _entry(topk_ids.dtype, topk_weights.dtype)
            known = ready[T] = (entry, out, (out.data_ptr(), rows.data_ptr(), T, K, *fixed))
        entry, out, others = known
        entry(topk_ids.data_ptr(), topk_weights.data_ptr(), *others)
        return out

    return run_bound


def _fixed(
    plan: Plan, counters: Tensor | None, votes: Tensor | None = None
) -> tuple[int | None, ...]:
    """The arguments of `_entry` that are a layer's, and the votes of others."""
    return (
        plan.neighbours.data_ptr(),
        plan.errors.data_ptr(),
        plan.scales.data_ptr(),
        plan.settings.data_ptr(),
        plan.pool.data_ptr(),
        None if counters is None else counters.data_ptr(),
        None if votes is None else votes.data_ptr(),
        plan.neighbours.shape[0],
        0 if counters is None else len(COUNTERS),
        0 if votes is None else len(votes),
    )


@functools.cache
def _entry(ids: torch.dtype, weights: torch.dtype) -> Callable[..., None]:
    """The compiled loops behind plain pointers: numba takes microseconds to unpack arrays, which
    in an engine, its caches full of weights, become tens of microseconds."""
    batch = [_TYPES[ids], _TYPES[weights], _TYPES[ids], types.int8]
    layer = [types.int32, types.int32, types.float32, *[types.int32] * 2, types.int64, types.int32]
    signature = types.void(
        *map(types.CPointer, batch),
        *[types.intp] * 2,
        *map(types.CPointer, layer),
        *[types.intp] * 3,
    )

    def entry(
        ids: Any,
        weights: Any,
        out: Any,
        rows: Any,
        T: int,
        K: int,
        neighbours: Any,
        errors: Any,
        scales: Any,
        settings: Any,
        pool: Any,
        counters: Any,
        votes: Any,
        E: int,
        C: int,
        V: int,
    ) -> None:
        given, moved = carray(ids, (T, K)), carray(out, (T, K))
        for t in range(T):
            for k in range(K):
                moved[t, k] = given[t, k]
        reroute(
            moved,
            carray(weights, (T, K)),
            carray(neighbours, (E, E - 1)),
            carray(errors, (E, E - 1)),
            carray(scales, (E, E - 1)),
            carray(settings, (len(SETTINGS),)),
            carray(pool, (3, E)),
            carray(rows, (T,)),
            carray(votes, (V,)),
            carray(counters, (C,)),
        )

    # numba takes a cached function for new where its own file is, whatever became of the loops'.
    loops = inspect.getsource(numba_loops) + inspect.getsource(numba_rows)
    entry.__qualname__ += hashlib.sha256(loops.encode()).hexdigest()[:8]
    try:
        compiled = cfunc(signature, cache=True)(entry)
    except RuntimeError:  # nowhere to keep a cache: a read-only image without a home
        compiled = cfunc(signature)(entry)
    _KEPT.append(compiled)  # its machine code lives as long as it does
    pointer, size = ctypes.c_void_p, ctypes.c_ssize_t
    # PYFUNCTYPE: for some microseconds' work, keep the interpreter's lock.
    called = ctypes.PYFUNCTYPE(None, *[pointer] * 4, *[size] * 2, *[pointer] * 7, *[size] * 3)
    return called(compiled.address)
