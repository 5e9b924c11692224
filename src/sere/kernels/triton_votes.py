"""Rules 1 to 5 for a program of `triton_programs`: votes, primaries, and where each expert goes.

One program holds a value for every expert in registers, so nothing is shared but the answer: votes
are found by comparing slots with experts, and looked up with `tl.gather`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sere.kernels import reference
from sere.kernels.plan import FRACTION, OFF
from sere.kernels.reference import LARGEST_WEIGHT, WEIGHT_FRACTION, RowClass

VOID, FAST = tl.constexpr(int(RowClass.VOID)), tl.constexpr(int(RowClass.FAST))
EXACT = tl.constexpr(int(RowClass.EXACT))
INDEPENDENT = tl.constexpr(int(RowClass.INDEPENDENT))
_OFF = tl.constexpr(OFF)
NAMED, NEVER = tl.constexpr(reference.NAMED), tl.constexpr(reference.NEVER)
LEFT, ALWAYS = tl.constexpr(reference.LEFT), tl.constexpr(reference.ALWAYS)
RESCUED = tl.constexpr(-2)  # `first_rank` of an expert that rule 5 made primary
_FRACTION = tl.constexpr(FRACTION)
_WEIGHT_FRACTION, _LARGEST_WEIGHT = tl.constexpr(WEIGHT_FRACTION), tl.constexpr(LARGEST_WEIGHT)


@triton.jit
def _load(
    ids, ids_row, ids_slot, weights, weights_row, weights_slot, rows, T, start,
    E: tl.constexpr, K: tl.constexpr, K_PADDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Slots [ROWS, K_PADDED] from row `start` on, flat but for the weights: what every pass needs.

    Slots beyond the batch are VOID rows with the id -1.
    """
    t, k = start + tl.arange(0, ROWS), tl.arange(0, K_PADDED)
    inside = (t < T)[:, None] & (k < K)[None, :]
    t_wide = t.to(tl.int64)[:, None]
    chosen = tl.load(ids + t_wide * ids_row + k[None, :] * ids_slot, mask=inside, other=-1)
    weight = tl.load(
        weights + t_wide * weights_row + k[None, :] * weights_slot, mask=inside, other=0.0
    )
    if weight.dtype != tl.float64:
        weight = weight.to(tl.float32)
    if rows is None:
        kind = tl.where(t < T, FAST, VOID)
    else:
        kind = tl.load(rows + t, mask=t < T, other=0).to(tl.int32)
    keeps = kind - EXACT  # how many of its best slots a FAST row keeps whatever S is
    kind = tl.where(keeps > 0, FAST, kind)
    valid = (chosen >= 0) & (chosen < E)
    return t, k, inside, chosen, weight, kind, keeps, valid, valid & (weight != 0)


@triton.jit
def _votes(
    ids, ids_row, ids_slot, weights, weights_row, weights_slot, rows, T, start, stop, settings,
    pool,
    E: tl.constexpr, K: tl.constexpr, E_PADDED: tl.constexpr, K_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """[E_PADDED] each: rules 1 to 3 over some rows, and the largest shares of rule 5 (0 where the
    plan has no tolerance); and how many of the rows are FAST, and how many INDEPENDENT."""
    tolerates, owned = tl.load(settings + 3) >= 0, tl.load(settings + 6) > 0
    largest = tl.zeros([E_PADDED], tl.int32)
    experts = tl.arange(0, E_PADDED)
    first_rank = tl.full([E_PADDED], NEVER, tl.int32)
    limit = tl.load(pool + 2 * E + experts, mask=experts < E, other=0)
    fast_rows, own_rows = 0, 0
    for begin in range(start, tl.minimum(stop, T), ROWS):
        _, k, _, chosen, weight, kind, keeps, valid, counts = _load(
            ids, ids_row, ids_slot, weights, weights_row, weights_slot, rows, T, begin,
            E, K, K_PADDED, ROWS,
        )  # fmt: skip
        tie = (weight[:, :, None] == weight[:, None, :]) & (k[:, None] < k[None, :])[None, :, :]
        ahead = ((weight[:, :, None] > weight[:, None, :]) | tie) & counts[:, :, None]
        rank = tl.sum(ahead.to(tl.int32), 1)
        vote = tl.where(counts, tl.where(rank < keeps[:, None], ALWAYS, rank), NAMED)
        vote = tl.where((kind == EXACT)[:, None], ALWAYS, vote)
        expert = tl.where(valid, chosen, 0).to(tl.int32)
        flat_expert = tl.reshape(expert, [ROWS * K_PADDED])
        share = tl.zeros([ROWS, K_PADDED], tl.int32)
        if tolerates | owned:
            share = _shares(weight, counts)
        least = tl.reshape(tl.gather(limit, flat_expert, 0), [ROWS, K_PADDED])
        own_vote = tl.where(share < least, LEFT, ALWAYS)
        vote = tl.where((kind == INDEPENDENT)[:, None], own_vote, vote)
        vote = tl.where(valid & (kind != VOID)[:, None], vote, NEVER)
        flat_vote = tl.reshape(vote, [ROWS * K_PADDED])
        here = flat_expert[:, None] == experts[None, :]
        first_rank = tl.minimum(first_rank, tl.min(tl.where(here, flat_vote[:, None], NEVER), 0))
        fast_rows += tl.sum((kind == FAST).to(tl.int32))
        own_rows += tl.sum((kind == INDEPENDENT).to(tl.int32))
        if tolerates:
            told = tl.where((kind == FAST)[:, None], share, 0)
            flat_share = tl.reshape(told, [ROWS * K_PADDED])
            largest = tl.maximum(largest, tl.max(tl.where(here, flat_share[:, None], 0), 0))
    return first_rank, largest, fast_rows, own_rows


@triton.jit
def _shares(weight, counts):
    """[rows, slots] int32: of each counting slot in its row, in units of 1 / FRACTION."""
    size = tl.minimum(tl.abs(weight), _LARGEST_WEIGHT) * _WEIGHT_FRACTION
    whole = tl.where(counts, size.to(tl.int64), 0)
    total = tl.maximum(tl.sum(whole, 1), 1)
    return (whole * _FRACTION // total[:, None]).to(tl.int32)


@triton.jit
def _decide(
    first_rank, largest, own_rows, neighbours, errors, settings, pool,
    E: tl.constexpr, K: tl.constexpr, E_PADDED: tl.constexpr, K_PADDED: tl.constexpr,
    LISTED: tl.constexpr,
):  # fmt: skip
    """`first_rank` with the pool and what rule 5 adds; s of rule 4; each expert's target [E_PADDED]
    (-1: none) and its place in the list, of rule 6; which experts are active [E_PADDED], and in
    what order; how many are named before, and which are afterwards whatever becomes of each row."""
    experts = tl.arange(0, E_PADDED)
    before, certain = tl.sum((first_rank < NEVER).to(tl.int32)), first_rank <= NAMED
    members = tl.load(settings + 5)
    members = tl.where(own_rows > 0, tl.maximum(members, tl.load(settings + 6)), members)
    joins = tl.load(pool + experts, mask=experts < E, other=E)
    first_rank = tl.where((joins < members) & (experts < E), ALWAYS, first_rank)

    S, min_active = tl.load(settings), tl.load(settings + 1)
    max_active = tl.load(settings + 2)
    level = tl.arange(0, 2 * K_PADDED)
    sizes = tl.sum((first_rank[None, :] < level[:, None]).to(tl.int32), 1)
    grown = tl.minimum(tl.sum(((sizes < min_active) & (level <= K)).to(tl.int32)), K)
    within = tl.sum(((sizes <= max_active) & (level <= K)).to(tl.int32))
    capped = tl.maximum(within - 1, tl.where(members > 0, 0, 1))
    s = tl.minimum(tl.maximum(S, grown), capped)
    movable = (S < K) & (tl.sum((first_rank < s).to(tl.int32)) > 0)
    target, place = _look_up(first_rank, s, movable, neighbours, E, E_PADDED, LISTED)
    tau = tl.load(settings + 3)
    if (tau >= 0) & movable:
        first_rank = _rescued(
            first_rank, s, largest, place, tau, max_active, errors, E, E_PADDED, LISTED
        )
        target, place = _look_up(first_rank, s, movable, neighbours, E, E_PADDED, LISTED)
    critical = (first_rank >= s) & (first_rank < NAMED) & (target < 0)
    # Where nothing may move, every expert is active.
    active = (((first_rank < s) | critical | (movable == 0)) & (experts < E)).to(tl.int32)
    certain = certain & (active != 0)
    return first_rank, s, target, place, active, _in_order(active, E_PADDED), before, certain


@triton.jit
def _in_order(active, E_PADDED: tl.constexpr):
    """[E_PADDED]: the active experts, ascending; what is beyond them means nothing."""
    up_to = tl.cumsum(active, 0)
    wanted = tl.arange(0, E_PADDED) + 1
    found = tl.zeros([E_PADDED], tl.int32)  # how many experts there are before the wanted one
    step = E_PADDED // 2
    while step > 0:
        found = tl.where(tl.gather(up_to, found + step - 1, 0) < wanted, found + step, found)
        step //= 2
    return found


@triton.jit
def _look_up(
    first_rank, s, movable, neighbours,
    E: tl.constexpr, E_PADDED: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """[E_PADDED] each: the first primary in every secondary's list and its place there, or -1."""
    experts = tl.arange(0, E_PADDED)
    primary = (first_rank < s).to(tl.int32)
    target = tl.full([E_PADDED], -1, tl.int32)
    place = tl.full([E_PADDED], -1, tl.int32)
    wanting = tl.where((primary == 0) & (first_rank < NAMED) & movable, 1, 0)
    at = 0
    while (at < E - 1) & (tl.max(wanting) > 0):
        column = at + tl.arange(0, LISTED)
        listed = tl.load(
            neighbours + experts[:, None] * (E - 1) + column[None, :],
            mask=(wanting != 0)[:, None] & (column < E - 1)[None, :],
            other=-1,
        )
        index = tl.reshape(tl.maximum(listed, 0), [E_PADDED * LISTED])
        hit = tl.reshape(tl.gather(primary, index, 0), [E_PADDED, LISTED]) != 0
        # The first hit wins: its place is the high part of the code, the expert the low part.
        code = tl.where(
            hit & (listed >= 0),
            tl.arange(0, LISTED)[None, :] * E_PADDED + listed,
            LISTED * E_PADDED,
        )
        best = tl.min(code, 1)
        found = (wanting != 0) & (best < LISTED * E_PADDED)
        target = tl.where(found, best % E_PADDED, target)
        place = tl.where(found, at + best // E_PADDED, place)
        ended = tl.min(listed, 1) < 0
        wanting = tl.where(found | ended, 0, wanting)
        at += LISTED
    return target, place


@triton.jit
def _rescued(
    first_rank, s, largest, place, tau, max_active, errors,
    E: tl.constexpr, E_PADDED: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """`first_rank` after rule 5: what would lose more than tau becomes primary."""
    experts = tl.arange(0, E_PADDED)
    secondary = (first_rank >= s) & (first_rank < NAMED) & (place >= 0)
    at = experts * (E - 1) + tl.maximum(place, 0)
    error = tl.load(errors + at, mask=secondary, other=0).to(tl.int64)
    wide = largest.to(tl.int64)
    loss = tl.where(secondary, (wide * wide * error // _FRACTION).to(tl.int32), -1)
    room = max_active - tl.sum((first_rank < s).to(tl.int32))
    ahead = tl.zeros([E_PADDED], tl.int32)
    for begin in range(0, E_PADDED, LISTED):
        other = begin + tl.arange(0, LISTED)
        theirs = tl.gather(loss, other, 0)
        tie = (theirs[None, :] == loss[:, None]) & (other[None, :] < experts[:, None])
        ahead += tl.sum(((theirs[None, :] > loss[:, None]) | tie).to(tl.int32), 1)
    return tl.where((loss > tau) & (ahead < room), RESCUED, first_rank)
