"""Rules 6 to 10 as plain loops: what becomes of a row's slots (see `numba_loops`)."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit

from sere.kernels.plan import FRACTION
from sere.kernels.reference import LARGEST_WEIGHT, WEIGHT_FRACTION, RowClass

VOID, FAST, EXACT = int(RowClass.VOID), int(RowClass.FAST), int(RowClass.EXACT)
INDEPENDENT = int(RowClass.INDEPENDENT)
RESCUED = -2  # the rank of an expert that rule 5 made primary
_NOWHERE, _APART = -1, -2  # where a slot goes: a freed one, and one that rule 9 leaves alone


# numba takes a cached function for new where its own file is, whatever became of those it calls.
_VERSION = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]


def compiled(function: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
    if function is None:
        return functools.partial(compiled, **options)
    function.__qualname__ += _VERSION
    try:
        found: Callable[..., Any] = njit(cache=True, nogil=True, **options)(function)
    except RuntimeError:  # nowhere to keep a cache: a read-only image without a home
        found = njit(nogil=True, **options)(function)
    return found


@compiled
def is_fast(kind: int) -> bool:
    return kind == FAST or kind > EXACT


@compiled
def shares_of(ids: Any, weights: Any, E: int, shares: Any) -> None:
    """[K], written: of a row's slots, in units of 1 / FRACTION; 0 of those that do not count."""
    total = 0
    for k in range(len(ids)):
        shares[k] = 0
        if 0 <= ids[k] < E and weights[k] != 0:
            size = abs(weights[k])
            if not size < LARGEST_WEIGHT:
                size = LARGEST_WEIGHT
            shares[k] = np.int64(size * WEIGHT_FRACTION)
        total += shares[k]
    for k in range(len(ids)):
        if shares[k] > 0:
            shares[k] = shares[k] * FRACTION // total


@compiled
def move(
    ids: Any,
    weights: Any,
    neighbours: Any,
    scales: Any,
    rows: Any,
    first_rank: Any,
    s: int,
    active: Any,
    places: Any,
    named: Any,
) -> tuple[int, int]:
    """Rules 6 to 9, in place; (slots of FAST rows that moved, critical slots). active: experts in
    ascending order. places: [E], where the stand-in of each expert with a vote is in its list, or
    -1. named: [E], set where a FAST row names an expert now."""
    E, K = len(first_rank), ids.shape[1]
    is_active = np.zeros(E, np.bool_)
    is_active[active] = True
    carried = np.full((2, E), -1)  # by expert the last row that carries it, and the slot
    goes, leaves = np.empty(K, np.int64), np.empty(K, np.bool_)
    moved = critical = 0
    for t in range(len(ids)):
        if rows[t] == EXACT or rows[t] == INDEPENDENT:
            continue
        fast = is_fast(rows[t])
        inside = leaving = 0
        for k in range(K):
            e = ids[t, k]
            here = 0 <= e < E
            goes[k] = e if here else _APART
            leaves[k] = here and not is_active[e]
            inside += here
            leaving += leaves[k]
            if here and is_active[e] and fast and weights[t, k] != 0:
                critical += first_rank[e] >= s or first_rank[e] == RESCUED
        if leaving > 0 and inside > len(active):
            leaving -= _stay(weights[t], fast, inside - len(active), leaves, goes, named)
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
        _make_distinct(t, t, ids[t], weights[t], fast, goes, active, carried)
        if fast:
            _mark(ids[t], named)
    return moved, critical


@compiled
def move_independent(
    ids: Any,
    weights: Any,
    neighbours: Any,
    scales: Any,
    pool: Any,
    own: int,
    rows: Any,
    named: Any,
) -> tuple[int, int]:
    """Rule 10, in place; (slots that moved, slots that tau keeps). named: as in `move`."""
    E, K = len(named), ids.shape[1]
    members = np.nonzero(pool[0] < own)[0]
    carried = np.full((2, E), -1)
    goes, shares = np.empty(K, np.int64), np.empty(K, np.int64)
    moved = rescued = 0
    for t in range(len(ids)):
        if rows[t] != INDEPENDENT:
            continue
        shares_of(ids[t], weights[t], E, shares)
        leaving = 0
        for k in range(K):
            e = ids[t, k]
            goes[k] = e if 0 <= e < E else _APART
            if goes[k] == _APART:
                continue
            if shares[k] < pool[2, e]:
                leaving += 1
                goes[k] = _NOWHERE
                if weights[t, k] != 0:
                    goes[k] = neighbours[e, pool[1, e]]
                    if len(scales) > 0:
                        weights[t, k] *= scales[e, pool[1, e]]
            elif weights[t, k] != 0 and pool[0, e] >= own:
                rescued += 1
        if leaving > 0:
            moved += leaving
            _make_distinct(t, 0, ids[t], weights[t], True, goes, members, carried)
        _mark(ids[t], named)
    return moved, rescued


@compiled
def _mark(ids: Any, named: Any) -> None:
    for e in ids:
        if 0 <= e < len(named):
            named[e] = True


@compiled
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


@compiled
def _ahead(weights: Any, fast: bool, j: int, k: int) -> bool:
    """Whether slot j is better than k: counting ones first."""
    first, second = fast and weights[j] != 0, fast and weights[k] != 0
    if first and second:
        return weights[j] > weights[k] or (weights[j] == weights[k] and j < k)
    return first or (not second and j < k)


@compiled
def _make_distinct(
    t: int, start: int, ids: Any, weights: Any, fast: bool, goes: Any, active: Any, carried: Any
) -> None:
    """Rule 9 for row t, in place; start: from which active expert on fillers are taken."""
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
    at = start % len(active)
    for k in freed[:count]:
        while carried[0, active[at]] == t:
            at = (at + 1) % len(active)
        ids[k] = active[at]
        at = (at + 1) % len(active)
        if fast:
            weights[k] = 0
