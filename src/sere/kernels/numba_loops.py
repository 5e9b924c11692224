"""The specification as plain loops, compiled for CPUs by numba (which every vLLM brings along).

The reference needs some sixty small tensor operations for a decode batch, a tenth of a small
model's step; one pass over the slots needs none. Same rules, same order, same results.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit

from sere.kernels.plan import FRACTION, OFF
from sere.kernels.reference import (
    COUNTERS,
    LARGEST_WEIGHT,
    NAMED,
    NEVER,
    WEIGHT_FRACTION,
    RowClass,
)

VOID, FAST, EXACT = (int(c) for c in RowClass)
_RESCUED = -1  # the rank of an expert that rule 5 made primary
_NOWHERE, _APART = -1, -2  # where a slot goes: a freed one, and one that rule 9 leaves alone


def _compiled(function: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
    if function is None:
        return functools.partial(_compiled, **options)
    try:
        compiled: Callable[..., Any] = njit(cache=True, nogil=True, **options)(function)
    except RuntimeError:  # nowhere to keep a cache: a read-only image without a home
        compiled = njit(nogil=True, **options)(function)
    return compiled


@_compiled
def vote(
    ids: Any,  # [T, K]
    weights: Any,  # [T, K]
    settings: Any,  # [5]
    rows: Any,  # [T]
    votes: Any,  # [2 E + 1], written
) -> None:
    """What one batch says of each expert (see `sere.kernels.reference.vote`)."""
    E = len(votes) // 2
    votes[:] = NEVER
    _first_ranks(ids, weights, rows, votes[:E])
    for kind in rows:
        if _is_fast(kind):
            votes[E] = 0
    if settings[3] >= 0:
        _largest_shares(ids, weights, rows, votes[E + 1 :])


@_compiled
def reroute(
    ids: Any,  # [T, K], rewritten in place
    weights: Any,  # [T, K], scaled in place
    neighbours: Any,  # [E, E-1]
    errors: Any,  # [E, E-1]
    scales: Any,  # [E, E-1]
    settings: Any,  # [5]
    rows: Any,  # [T]
    given: Any,  # [2 E + 1] votes, or [0]: this batch's own
    counters: Any,  # [8], or [0]: count nothing
) -> None:
    """One batch."""
    K, E = ids.shape[1], neighbours.shape[0]
    S, tau = settings[0], settings[3]
    votes = np.empty(2 * E + 1, np.int32)
    if given.size > 0:
        votes[:] = given
    else:
        vote(ids, weights, settings, rows, votes)
    first_rank = votes[:E]
    s = _choose_s(first_rank, S, settings[1], settings[2], K)
    before = 0
    for rank in first_rank:
        before += rank < NEVER
    after = before
    moved = critical = 0
    if tau >= 0 and S < K:
        _keep(votes[E + 1 :], neighbours, errors, first_rank, s, settings[2], tau)
    if S < K and first_rank.min() < s:
        if settings[4] == 0:
            scales = scales[:0]
        places = np.full(E, -1, np.int64)
        active = np.empty(E, np.int64)
        after = 0
        for e in range(E):
            if s <= first_rank[e] < NAMED:
                places[e] = _place(neighbours[e], first_rank, s)
            if first_rank[e] < s or (first_rank[e] < NAMED and places[e] < 0):
                active[after] = e
                after += 1
        moved, critical, added = _move(
            ids, weights, neighbours, scales, rows, first_rank, s, active[:after], places
        )
        after += added
    if counters.size > 0 and S != OFF and len(ids) > 0:
        _count(counters, rows, votes[E] == 0, before, after, moved, critical)


@_compiled
def _is_fast(kind: int) -> bool:
    return kind == FAST or kind > EXACT


@_compiled
def _first_ranks(ids: Any, weights: Any, rows: Any, first: Any) -> None:
    """[E], NEVER so far: rules 1 to 3; NAMED where a real row names the expert and nobody votes for
    it."""
    T, K = ids.shape
    E = len(first)
    for t in range(T):
        kind = rows[t]
        if kind == VOID:
            continue
        for k in range(K):
            e = ids[t, k]
            if e < 0 or e >= E:
                continue
            rank = NAMED
            if kind == EXACT:
                rank = 0
            elif weights[t, k] != 0:
                rank = _rank(ids[t], weights[t], k, E)
                if rank < kind - EXACT:
                    rank = 0
            first[e] = min(first[e], rank)


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
        sizes[min(rank, K)] += 1
    size = too_few = within = 0
    for rank in range(K):
        size += sizes[rank]
        too_few += size < min_active
        within += size <= max_active
    return min(max(S, min(too_few + 1, K)), max(within, 1))


@_compiled
def _keep(
    shares: Any,
    neighbours: Any,
    errors: Any,
    first_rank: Any,
    s: int,
    max_active: int,
    tau: int,
) -> None:
    """Rule 5: marks the experts that become primary in `first_rank`; shares: as in a vote."""
    E = len(first_rank)
    loss = np.full(E, -1, np.int64)
    primaries = 0
    for u in range(E):
        if first_rank[u] < s:
            primaries += 1
        elif shares[u] < 0:
            place = _place(neighbours[u], first_rank, s)
            if place >= 0:
                share = np.int64(shares[u])
                loss[u] = share * share * np.int64(errors[u, place]) // FRACTION
    while primaries < max_active:
        largest = np.argmax(loss)  # the first of equals
        if loss[largest] <= tau:
            return
        first_rank[largest] = _RESCUED
        loss[largest] = -1
        primaries += 1


@_compiled
def _largest_shares(ids: Any, weights: Any, rows: Any, largest: Any) -> None:
    """[E], NEVER so far: minus the largest share, in units of 1 / FRACTION."""
    T, K = ids.shape
    E = len(largest)
    whole = np.zeros(K, np.int64)
    for t in range(T):
        if not _is_fast(rows[t]):
            continue
        total = 0
        for k in range(K):
            counts = 0 <= ids[t, k] < E and weights[t, k] != 0
            whole[k] = 0
            if counts:
                size = abs(weights[t, k])
                if not size < LARGEST_WEIGHT:
                    size = LARGEST_WEIGHT
                whole[k] = np.int64(size * WEIGHT_FRACTION)
            total += whole[k]
        for k in range(K):
            share = whole[k] * FRACTION // total if whole[k] > 0 else 0
            if share > 0:
                e = ids[t, k]
                largest[e] = min(largest[e], -share)


@_compiled
def _move(
    ids: Any,
    weights: Any,
    neighbours: Any,
    scales: Any,
    rows: Any,
    first_rank: Any,
    s: int,
    active: Any,
    places: Any,
) -> tuple[int, int, int]:
    """Rules 6 to 9, in place; (slots of FAST rows that moved, critical slots, experts that slots of
    FAST rows keep by staying). active: experts in ascending order. places: [E], where the stand-in
    of each expert with a vote is in its list, or -1."""
    E, K = len(first_rank), ids.shape[1]
    is_active, added = np.zeros(E, np.bool_), np.zeros(E, np.bool_)
    is_active[active] = True
    carried = np.full((2, E), -1)  # by expert the last row that carries it, and the slot
    goes, leaves = np.empty(K, np.int64), np.empty(K, np.bool_)
    moved = critical = 0
    for t in range(len(ids)):
        if rows[t] == EXACT:
            continue
        fast = _is_fast(rows[t])
        inside = leaving = 0
        for k in range(K):
            e = ids[t, k]
            here = 0 <= e < E
            goes[k] = e if here else _APART
            leaves[k] = here and not is_active[e]
            inside += here
            leaving += leaves[k]
            if here and is_active[e] and fast and weights[t, k] != 0:
                critical += first_rank[e] >= s or first_rank[e] == _RESCUED
        if leaving > 0 and inside > len(active):
            leaving -= _stay(weights[t], fast, inside - len(active), leaves, goes, added)
        if leaving == 0:
            continue
        moved += leaving * fast
        for k in range(K):
            if leaves[k]:
                goes[k] = _NOWHERE
                if fast and weights[t, k] != 0:
                    e = ids[t, k]
                    goes[k] = neighbours[e, places[e]]
                    if len(scales) > 0:
                        weights[t, k] *= scales[e, places[e]]
        _make_distinct(t, ids[t], weights[t], fast, goes, active, carried)
    return moved, critical, added.sum()


@_compiled
def _stay(weights: Any, fast: bool, surplus: int, leaves: Any, goes: Any, added: Any) -> int:
    """Rule 8 for a row: how many slots stay; they no longer leave, and take no part in rule 9."""
    stays = np.zeros(len(leaves), np.bool_)
    for k in range(len(leaves)):
        if leaves[k]:
            ahead = 0
            for j in range(len(leaves)):
                ahead += leaves[j] and _ahead(weights, fast, j, k)
            stays[k] = ahead < surplus
    for k in range(len(leaves)):
        if stays[k]:
            if fast:
                added[goes[k]] = True
            leaves[k], goes[k] = False, _APART
    return int(stays.sum())


@_compiled
def _ahead(weights: Any, fast: bool, j: int, k: int) -> bool:
    """Whether slot j is better than k: counting ones first."""
    first, second = fast and weights[j] != 0, fast and weights[k] != 0
    if first and second:
        return weights[j] > weights[k] or (weights[j] == weights[k] and j < k)
    return first or (not second and j < k)


@_compiled
def _make_distinct(
    t: int, ids: Any, weights: Any, fast: bool, goes: Any, active: Any, carried: Any
) -> None:
    """Rule 9 for row t, in place."""
    freed = np.empty(len(ids), np.int64)
    count = 0
    for k in range(len(ids)):
        e = goes[k]
        if e == _APART:
            continue
        if e == _NOWHERE or carried[0, e] == t:
            if e != _NOWHERE and fast:
                weights[carried[1, e]] += weights[k]
            freed[count] = k
            count += 1
        else:
            carried[0, e], carried[1, e] = t, k
            ids[k] = e
    at = t % len(active)
    for k in freed[:count]:
        while carried[0, active[at]] == t:
            at = (at + 1) % len(active)
        ids[k] = active[at]
        at = (at + 1) % len(active)
        if fast:
            weights[k] = 0


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
def _count(
    counters: Any, rows: Any, decoding: bool, before: int, after: int, moved: int, critical: int
) -> None:
    """Add one step, in the order of `COUNTERS`."""
    exact = void = 0
    for kind in rows:
        exact += kind == EXACT
        void += kind == VOID
    if decoding:
        counters[0] += 1
        counters[1] += before
        counters[2] += after
    counters[3] += moved
    counters[4] += critical
    counters[5] += len(rows) - exact - void
    counters[6] += exact
    counters[7] += void


assert len(COUNTERS) == 8, "_count lists them by hand"
