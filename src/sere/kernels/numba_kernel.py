"""The specification as plain loops, compiled for CPUs by numba (which every vLLM brings along).

The reference needs some sixty small tensor operations for a decode batch, a tenth of a small
model's step; one pass over the slots needs none. Same rules, same order, same results.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numba import carray, cfunc, njit, types
from torch import Tensor

from sere.kernels.plan import FRACTION, OFF, Plan
from sere.kernels.reference import COUNTERS, LARGEST_WEIGHT, WEIGHT_FRACTION, RowClass

VOID, FAST, EXACT = (int(c) for c in RowClass)
_TYPES = {
    torch.int16: types.int16,
    torch.int32: types.int32,
    torch.int64: types.int64,
    torch.float32: types.float32,
    torch.float64: types.float64,
}
_KEPT: list[Any] = []
_UNKNOWN = -2  # a place that was not looked up yet
_RESCUED = -1  # the rank of an expert that rule 5 made primary


def run(
    topk_ids: Tensor, topk_weights: Tensor, plan: Plan, rows: Tensor | None, counters: Tensor | None
) -> Tensor:
    """New ids [T, K] (see `sere.kernels.reference.run`); all tensors on the CPU."""
    T, K = topk_ids.shape
    weights = topk_weights
    if weights.dtype not in _TYPES:
        weights = weights.float()  # numpy has no bfloat16; order and zeros are kept
    weights = weights.contiguous()
    out = topk_ids.clone(memory_format=torch.contiguous_format)
    if rows is None:
        rows = torch.full((T,), FAST, dtype=torch.int8)
    rows = rows.contiguous()
    _entry(out.dtype, weights.dtype)(
        out.data_ptr(),
        weights.data_ptr(),
        plan.neighbours.data_ptr(),
        plan.errors.data_ptr(),
        plan.scales.data_ptr(),
        plan.settings.data_ptr(),
        rows.data_ptr(),
        None if counters is None else counters.data_ptr(),
        T,
        K,
        plan.neighbours.shape[0],
        0 if counters is None else len(COUNTERS),
    )
    if weights is not topk_weights:
        topk_weights.copy_(weights)
    return out


@functools.cache
def _entry(ids: torch.dtype, weights: torch.dtype) -> Callable[..., None]:
    """The compiled loops behind plain pointers: numba takes microseconds to unpack arrays, which
    in an engine, its caches full of weights, become tens of microseconds."""
    plan = [types.int32, types.int32, types.float32, types.int32]
    pointers = [_TYPES[ids], _TYPES[weights], *plan, types.int8, types.int64]
    signature = types.void(*map(types.CPointer, pointers), *[types.intp] * 4)

    def entry(
        ids: Any,
        weights: Any,
        neighbours: Any,
        errors: Any,
        scales: Any,
        settings: Any,
        rows: Any,
        counters: Any,
        T: int,
        K: int,
        E: int,
        C: int,
    ) -> None:
        _reroute(
            carray(ids, (T, K)),
            carray(weights, (T, K)),
            carray(neighbours, (E, E - 1)),
            carray(errors, (E, E - 1)),
            carray(scales, (E, E - 1)),
            carray(settings, (5,)),
            carray(rows, (T,)),
            carray(counters, (C,)),
        )

    try:
        compiled = cfunc(signature, cache=True)(entry)
    except RuntimeError:  # nowhere to keep a cache: a read-only image without a home
        compiled = cfunc(signature)(entry)
    _KEPT.append(compiled)  # its machine code lives as long as it does
    called = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 8, *[ctypes.c_ssize_t] * 4)
    return called(compiled.address)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    try:
        compiled: Callable[..., Any] = njit(cache=True, nogil=True)(function)
    except RuntimeError:  # nowhere to keep a cache: a read-only image without a home
        compiled = njit(nogil=True)(function)
    return compiled


@_compiled
def _reroute(
    ids: Any,  # [T, K], rewritten in place
    weights: Any,  # [T, K], scaled in place
    neighbours: Any,  # [E, E-1]
    errors: Any,  # [E, E-1]
    scales: Any,  # [E, E-1]
    settings: Any,  # [5]
    rows: Any,  # [T]
    counters: Any,  # [8], or [0]: count nothing
) -> None:
    K, E = ids.shape[1], neighbours.shape[0]
    S, tau = settings[0], settings[3]
    before = _active(ids, rows, E)
    first_rank = _first_ranks(ids, weights, rows, E)
    s = _choose_s(first_rank, S, settings[1], settings[2], K)
    moved = critical = 0
    if tau >= 0 and S < K:
        _keep(ids, weights, neighbours, errors, rows, first_rank, s, settings[2], tau)
    lowest = E
    for e in range(E - 1, -1, -1):
        if first_rank[e] < s:
            lowest = e
    if lowest < E and S < K:
        if settings[4] == 0:
            scales = scales[:0]
        moved, critical = _move(ids, weights, neighbours, scales, rows, first_rank, s, lowest)
    if counters.size > 0 and S != OFF:
        _count(counters, rows, before, _active(ids, rows, E), moved, critical)


@_compiled
def _is_fast(kind: int) -> bool:
    return kind == FAST or kind > EXACT


@_compiled
def _first_ranks(ids: Any, weights: Any, rows: Any, E: int) -> Any:
    """[E]: rules 1 to 3; K where nobody chose the expert."""
    T, K = ids.shape
    first = np.full(E, K, np.int64)
    for t in range(T):
        for k in range(K):
            e = ids[t, k]
            if rows[t] == VOID or e < 0 or e >= E:
                continue
            if rows[t] == EXACT:
                first[e] = 0
            elif weights[t, k] != 0:
                rank = _rank(ids[t], weights[t], k, E)
                first[e] = min(first[e], rank if rank >= rows[t] - EXACT else 0)
    return first


@_compiled
def _rank(ids: Any, weights: Any, k: int, E: int) -> int:
    """How many counting slots of the row come before slot k."""
    rank = 0
    for j in range(len(ids)):
        if 0 <= ids[j] < E and weights[j] != 0:
            tie = weights[j] == weights[k] and j < k
            rank += weights[j] > weights[k] or tie
    return rank


@_compiled
def _choose_s(first_rank: Any, S: int, min_active: int, max_active: int, K: int) -> Any:
    """Rule 4."""
    sizes = np.zeros(K + 1, np.int64)
    for rank in first_rank:
        sizes[rank] += 1
    sizes = np.cumsum(sizes[:K])
    grown = min(np.sum(sizes < min_active) + 1, K)
    capped = max(np.sum(sizes <= max_active), 1)
    return min(max(S, grown), capped)


@_compiled
def _keep(
    ids: Any,
    weights: Any,
    neighbours: Any,
    errors: Any,
    rows: Any,
    first_rank: Any,
    s: int,
    max_active: int,
    tau: int,
) -> None:
    """Rule 5: marks the experts that become primary in `first_rank`."""
    E = len(first_rank)
    shares = _largest_shares(ids, weights, rows, E)
    loss = np.full(E, -1, np.int64)
    primaries = 0
    for u in range(E):
        if first_rank[u] < s:
            primaries += 1
        elif shares[u] > 0:
            place = _place(neighbours[u], first_rank, s)
            if place >= 0:
                loss[u] = shares[u] * shares[u] * np.int64(errors[u, place]) // FRACTION
    while primaries < max_active:
        largest = np.argmax(loss)  # the first of equals
        if loss[largest] <= tau:
            return
        first_rank[largest] = _RESCUED
        loss[largest] = -1
        primaries += 1


@_compiled
def _largest_shares(ids: Any, weights: Any, rows: Any, E: int) -> Any:
    """[E], in units of 1 / FRACTION."""
    T, K = ids.shape
    largest = np.zeros(E, np.int64)
    whole = np.zeros(K, np.int64)
    for t in range(T):
        if not _is_fast(rows[t]):
            continue
        total = 0
        for k in range(K):
            counts = 0 <= ids[t, k] < E and weights[t, k] != 0
            whole[k] = 0
            if counts:
                whole[k] = np.int64(min(abs(weights[t, k]), LARGEST_WEIGHT) * WEIGHT_FRACTION)
            total += whole[k]
        for k in range(K):
            if whole[k] > 0:
                e = ids[t, k]
                largest[e] = max(largest[e], whole[k] * FRACTION // total)
    return largest


@_compiled
def _move(
    ids: Any,
    weights: Any,
    neighbours: Any,
    scales: Any,
    rows: Any,
    first_rank: Any,
    s: int,
    lowest: int,
) -> tuple[int, int]:
    """Rules 6 and 7, in place; (slots of real rows that moved, critical slots)."""
    E = len(first_rank)
    places = np.full(E, _UNKNOWN, np.int64)
    moved = critical = 0
    for t in range(ids.shape[0]):
        for k in range(ids.shape[1]):
            e = ids[t, k]
            if rows[t] == EXACT or e < 0 or e >= E:
                continue
            idle = not _is_fast(rows[t]) or weights[t, k] == 0
            if first_rank[e] < s:
                critical += first_rank[e] == _RESCUED and not idle
                continue
            if idle:
                ids[t, k] = lowest
                moved += _is_fast(rows[t])
                continue
            if places[e] == _UNKNOWN:
                places[e] = _place(neighbours[e], first_rank, s)
            if places[e] < 0:
                critical += 1
            else:
                ids[t, k] = neighbours[e, places[e]]
                if len(scales) > 0:
                    weights[t, k] *= scales[e, places[e]]
                moved += 1
    return moved, critical


@_compiled
def _place(listed: Any, first_rank: Any, s: int) -> int:
    """Where the first primary stands in a neighbour list, or -1."""
    for place in range(len(listed)):
        v = listed[place]
        if v < 0:
            return -1
        if first_rank[v] < s:
            return place
    return -1


@_compiled
def _active(ids: Any, rows: Any, E: int) -> int:
    """Distinct experts that the real rows name."""
    seen = np.zeros(E, np.bool_)
    for t in range(ids.shape[0]):
        for e in ids[t]:
            if rows[t] != VOID and 0 <= e < E:
                seen[e] = True
    return int(np.sum(seen))


@_compiled
def _count(counters: Any, rows: Any, before: int, after: int, moved: int, critical: int) -> None:
    """Add one step, in the order of `COUNTERS`."""
    exact, void = np.sum(rows == EXACT), np.sum(rows == VOID)
    fast = len(rows) - exact - void
    decoding = fast > 0
    counters += np.array(
        [decoding, decoding * before, decoding * after, moved, critical, fast, exact, void],
        np.int64,
    )


assert len(COUNTERS) == 8, "_count lists them by hand"
