"""The specification as plain loops, compiled for CPUs by numba (which every vLLM brings along).

The reference needs some sixty small tensor operations for a decode batch, a tenth of a small
model's step; one pass over the slots needs none. Same rules, same order, same results.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sere.kernels.numba_rows import (
    EXACT,
    INDEPENDENT,
    RESCUED,
    VOID,
    compiled,
    is_fast,
    move,
    move_independent,
    shares_of,
)
from sere.kernels.plan import FRACTION, OFF
from sere.kernels.reference import ALWAYS, COUNTERS, LEFT, NAMED, NEVER


@compiled
def vote(
    ids: Any,  # [T, K]
    weights: Any,  # [T, K]
    settings: Any,  # [7]
    pool: Any,  # [3, E]
    rows: Any,  # [T]
    votes: Any,  # [2 E + 1], written
) -> None:
    """What one batch says of each expert (see `sere.kernels.reference.vote`)."""
    E = len(votes) // 2
    votes[:] = NEVER
    _first_ranks(ids, weights, pool[2], rows, votes[:E])
    for kind in rows:
        if kind == INDEPENDENT:
            votes[E] = -1
        elif is_fast(kind):
            votes[E] = min(votes[E], 0)
    if settings[3] >= 0:
        _largest_shares(ids, weights, rows, votes[E + 1 :])


@compiled
def reroute(
    ids: Any,  # [T, K], rewritten in place
    weights: Any,  # [T, K], scaled in place
    neighbours: Any,  # [E, E-1]
    errors: Any,  # [E, E-1]
    scales: Any,  # [E, E-1]
    settings: Any,  # [7]
    pool: Any,  # [3, E]
    rows: Any,  # [T]
    given: Any,  # [2 E + 1] votes, or [0]: this batch's own
    counters: Any,  # [9], or [0]: count nothing
) -> None:
    """One batch."""
    K, E = ids.shape[1], neighbours.shape[0]
    S, tau = settings[0], settings[3]
    if settings[4] == 0:
        scales = scales[:0]
    votes = np.empty(2 * E + 1, np.int32)
    if given.size > 0:
        votes[:] = given
    else:
        vote(ids, weights, settings, pool, rows, votes)
    first_rank = votes[:E]
    before = 0
    certain = np.empty(E, np.bool_)  # named afterwards, whatever becomes of each row
    for e in range(E):
        before += first_rank[e] < NEVER
        certain[e] = first_rank[e] <= NAMED
    members = max(settings[5], settings[6]) if votes[E] < 0 else settings[5]
    if members > 0:
        for e in range(E):
            if pool[0, e] < members:
                first_rank[e] = ALWAYS
    s = _choose_s(first_rank, S, settings[1], settings[2], 0 if members > 0 else 1, K)
    moved = critical = 0
    if tau >= 0 and S < K:
        _keep(votes[E + 1 :], neighbours, errors, first_rank, s, settings[2], tau)
    if S < K and first_rank.min() < s:
        places = np.full(E, -1, np.int64)
        active = np.empty(E, np.int64)
        count = 0
        for e in range(E):
            if s <= first_rank[e] < NAMED:
                places[e] = _place(neighbours[e], first_rank, s)
            if first_rank[e] < s or (first_rank[e] < NAMED and places[e] < 0):
                active[count] = e
                count += 1
            else:
                certain[e] = False
        moved, critical = move(
            ids, weights, neighbours, scales, rows, first_rank, s, active[:count], places, certain
        )
    if settings[6] > 0 and votes[E] < 0:
        mine = move_independent(ids, weights, neighbours, scales, pool, settings[6], rows, certain)
        moved, critical = moved + mine[0], critical + mine[1]
    if counters.size > 0 and (S != OFF or settings[6] > 0) and len(ids) > 0:
        _count(counters, rows, votes[E] <= 0, before, certain.sum(), moved, critical)


@compiled
def _first_ranks(ids: Any, weights: Any, limit: Any, rows: Any, first: Any) -> None:
    """[E], NEVER so far: rules 1 to 3; NAMED or LEFT where a real row names the expert and nobody
    votes for it. limit: [E], of the plan's pool."""
    T, K = ids.shape
    E = len(first)
    shares = np.zeros(K, np.int64)
    for t in range(T):
        kind = rows[t]
        if kind == VOID:
            continue
        if kind == INDEPENDENT:
            shares_of(ids[t], weights[t], E, shares)
        for k in range(K):
            e = ids[t, k]
            if e < 0 or e >= E:
                continue
            rank = NAMED
            if kind == EXACT:
                rank = ALWAYS
            elif kind == INDEPENDENT:
                rank = LEFT if shares[k] < limit[e] else ALWAYS
            elif weights[t, k] != 0:
                rank = _rank(ids[t], weights[t], k, E)
                if rank < kind - EXACT:
                    rank = ALWAYS
            first[e] = min(first[e], rank)


@compiled
def _rank(ids: Any, weights: Any, k: int, E: int) -> int:
    """How many counting slots of the row come before slot k."""
    rank = 0
    for j in range(len(ids)):
        if 0 <= ids[j] < E and weights[j] != 0:
            tie = weights[j] == weights[k] and j < k
            rank += weights[j] > weights[k] or tie
    return rank


@compiled
def _choose_s(first_rank: Any, S: int, min_active: int, max_active: int, least: int, K: int) -> Any:
    """Rule 4."""
    sizes = np.zeros(K + 1, np.int64)
    size = 0  # of those that are primary whatever s is
    for rank in first_rank:
        if rank < 0:
            size += 1
        else:
            sizes[min(rank, K)] += 1
    too_few = within = 0
    for s in range(K + 1):
        too_few += size < min_active
        within += size <= max_active
        size += sizes[s]
    return min(max(S, min(too_few, K)), max(within - 1, least))


@compiled
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
        first_rank[largest] = RESCUED
        loss[largest] = -1
        primaries += 1


@compiled
def _largest_shares(ids: Any, weights: Any, rows: Any, largest: Any) -> None:
    """[E], NEVER so far: minus the largest share, in units of 1 / FRACTION."""
    T, K = ids.shape
    E = len(largest)
    shares = np.zeros(K, np.int64)
    for t in range(T):
        if not is_fast(rows[t]):
            continue
        shares_of(ids[t], weights[t], E, shares)
        for k in range(K):
            if shares[k] > 0:
                e = ids[t, k]
                largest[e] = min(largest[e], -shares[k])


@compiled
def _place(listed: Any, first_rank: Any, s: int) -> int:
    """Where the first primary stands in a neighbour list, or -1."""
    for place in range(len(listed)):
        v = listed[place]
        if v < 0:
            return -1
        if first_rank[v] < s:
            return place
    return -1


@compiled
def _count(
    counters: Any, rows: Any, decoding: bool, before: int, after: int, moved: int, critical: int
) -> None:
    """Add one step, in the order of `COUNTERS`."""
    exact = void = independent = 0
    for kind in rows:
        exact += kind == EXACT
        void += kind == VOID
        independent += kind == INDEPENDENT
    if decoding:
        counters[0] += 1
        counters[1] += before
        counters[2] += after
    counters[3] += moved
    counters[4] += critical
    counters[5] += len(rows) - exact - void - independent
    counters[6] += exact
    counters[7] += void
    counters[8] += independent


assert len(COUNTERS) == 9, "_count lists them by hand"
