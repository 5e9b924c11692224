"""What the programs of `triton_kernel` do.

One program holds a value for every expert in registers, so nothing is shared but the answer: votes
are found by comparing slots with experts, and looked up with `tl.gather`.
"""

from __future__ import annotations

import functools

import triton
import triton.language as tl

from sere.kernels import reference
from sere.kernels.plan import FRACTION, OFF
from sere.kernels.reference import COUNTERS, LARGEST_WEIGHT, WEIGHT_FRACTION, RowClass

VOID, FAST = tl.constexpr(int(RowClass.VOID)), tl.constexpr(int(RowClass.FAST))
EXACT = tl.constexpr(int(RowClass.EXACT))
_OFF = tl.constexpr(OFF)
NAMED, NEVER = tl.constexpr(reference.NAMED), tl.constexpr(reference.NEVER)
RESCUED = tl.constexpr(-1)  # `first_rank` of an expert that rule 5 made primary
_FRACTION = tl.constexpr(FRACTION)
_WEIGHT_FRACTION, _LARGEST_WEIGHT = tl.constexpr(WEIGHT_FRACTION), tl.constexpr(LARGEST_WEIGHT)

VARYING = ("T", "share", "ids_row", "weights_row")
POINTERS = (
    *("ids", "weights", "rows", "votes", "neighbours", "errors", "scales", "settings"),
    *("out", "counters"),
)
# Compiled once, whatever a batch's size is and wherever its tensors begin: a server must not wait
# for a compiler. Rows of E - 1 entries are not aligned anyway.
launched = functools.partial(
    triton.jit, do_not_specialize=VARYING, do_not_specialize_on_alignment=POINTERS
)


@launched
def _all_at_once(
    ids, ids_row, ids_slot, weights, weights_row, weights_slot, rows, T,
    neighbours, errors, scales, settings, out, counters,
    E: tl.constexpr, K: tl.constexpr, E_PADDED: tl.constexpr, K_PADDED: tl.constexpr,
    ROWS: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    first_rank, largest, fast = _votes(
        ids, ids_row, ids_slot, weights, weights_row, weights_slot, rows, T, 0, T,
        settings, E, K, E_PADDED, K_PADDED, ROWS,
    )  # fmt: skip
    first_rank, s, target, place, active, in_order, before, after = _decide(
        first_rank, largest, neighbours, errors, settings, E, K, E_PADDED, K_PADDED, LISTED
    )
    stayed = _move(
        ids, ids_row, ids_slot, weights, weights_row, weights_slot, rows, T, 0, T,
        first_rank, s, target, place, active, in_order, scales, settings, out, counters,
        E, K, E_PADDED, K_PADDED, ROWS,
    )  # fmt: skip
    _count_step(counters, settings, fast, before, after + tl.sum(stayed))


@launched
def _vote(
    ids, ids_row, ids_slot, weights, weights_row, weights_slot, rows, T, votes, share, settings,
    E: tl.constexpr, K: tl.constexpr, E_PADDED: tl.constexpr, K_PADDED: tl.constexpr,
    ROWS: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """votes: [2 E + 1]: first ranks, then 0 if there is a FAST row, then the largest shares,
    negative so that the least is wanted everywhere."""
    start = tl.program_id(0) * share
    first_rank, largest, fast = _votes(
        ids, ids_row, ids_slot, weights, weights_row, weights_slot, rows, T, start, start + share,
        settings, E, K, E_PADDED, K_PADDED, ROWS,
    )  # fmt: skip
    experts = tl.arange(0, E_PADDED)
    tl.atomic_min(votes + experts, first_rank, mask=first_rank < NEVER)
    tl.atomic_min(votes + E, 0, mask=fast > 0)
    tl.atomic_min(votes + E + 1 + experts, -largest, mask=(largest > 0) & (experts < E))


@launched
def _decide_and_move(
    ids, ids_row, ids_slot, weights, weights_row, weights_slot, rows, T, votes, share,
    neighbours, errors, scales, settings, out, counters,
    E: tl.constexpr, K: tl.constexpr, E_PADDED: tl.constexpr, K_PADDED: tl.constexpr,
    ROWS: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    experts = tl.arange(0, E_PADDED)
    first_rank = tl.load(votes + experts, mask=experts < E, other=NEVER)
    share_votes = votes + E + 1 + experts
    largest = tl.load(share_votes, mask=experts < E, other=0)
    largest = tl.where(largest < 0, -(largest | NEVER), 0)  # the bit is not a share's, see below
    first_rank, s, target, place, active, in_order, before, after = _decide(
        first_rank, largest, neighbours, errors, settings, E, K, E_PADDED, K_PADDED, LISTED
    )
    start = tl.program_id(0) * share
    stayed = _move(
        ids, ids_row, ids_slot, weights, weights_row, weights_slot, rows, T, start, start + share,
        first_rank, s, target, place, active, in_order, scales, settings, out, counters,
        E, K, E_PADDED, K_PADDED, ROWS,
    )  # fmt: skip
    if tl.program_id(0) == 0:
        _count_step(counters, settings, tl.load(votes + E) == 0, before, after)
    if counters is not None:  # noqa: SIM102 (known when compiled)
        if tl.sum(stayed) > 0:  # an expert counts once, in the program that takes this bit away
            untaken = tl.full([E_PADDED], ~NEVER, tl.int32)
            was = tl.atomic_and(share_votes, untaken, mask=stayed > 0)
            tl.atomic_add(counters + 2, tl.sum(((stayed > 0) & ((was & NEVER) != 0)).to(tl.int64)))


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
    E: tl.constexpr, K: tl.constexpr, E_PADDED: tl.constexpr, K_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """[E_PADDED] each: rules 1 to 3 over some rows, and the largest shares of rule 5 (0 where the
    plan has no tolerance); and how many of the rows are FAST."""
    tolerates = tl.load(settings + 3) >= 0
    largest = tl.zeros([E_PADDED], tl.int32)
    experts = tl.arange(0, E_PADDED)
    first_rank = tl.full([E_PADDED], NEVER, tl.int32)
    fast_rows = 0
    for begin in range(start, tl.minimum(stop, T), ROWS):
        _, k, _, chosen, weight, kind, keeps, valid, counts = _load(
            ids, ids_row, ids_slot, weights, weights_row, weights_slot, rows, T, begin,
            E, K, K_PADDED, ROWS,
        )  # fmt: skip
        tie = (weight[:, :, None] == weight[:, None, :]) & (k[:, None] < k[None, :])[None, :, :]
        ahead = ((weight[:, :, None] > weight[:, None, :]) | tie) & counts[:, :, None]
        rank = tl.sum(ahead.to(tl.int32), 1)
        vote = tl.where(counts, tl.where(rank < keeps[:, None], 0, rank), NAMED)
        vote = tl.where((kind == EXACT)[:, None], 0, vote)
        vote = tl.where(valid & (kind != VOID)[:, None], vote, NEVER)
        expert = tl.where(valid, chosen, 0).to(tl.int32)
        flat_vote = tl.reshape(vote, [ROWS * K_PADDED])
        flat_expert = tl.reshape(expert, [ROWS * K_PADDED])
        here = flat_expert[:, None] == experts[None, :]
        first_rank = tl.minimum(first_rank, tl.min(tl.where(here, flat_vote[:, None], NEVER), 0))
        fast_rows += tl.sum((kind == FAST).to(tl.int32))
        if tolerates:
            size = tl.minimum(tl.abs(weight), _LARGEST_WEIGHT) * _WEIGHT_FRACTION
            whole = tl.where(counts & (kind == FAST)[:, None], size.to(tl.int64), 0)
            total = tl.maximum(tl.sum(whole, 1), 1)
            share = (whole * _FRACTION // total[:, None]).to(tl.int32)
            flat_share = tl.reshape(share, [ROWS * K_PADDED])
            largest = tl.maximum(largest, tl.max(tl.where(here, flat_share[:, None], 0), 0))
    return first_rank, largest, fast_rows


@triton.jit
def _decide(
    first_rank, largest, neighbours, errors, settings,
    E: tl.constexpr, K: tl.constexpr, E_PADDED: tl.constexpr, K_PADDED: tl.constexpr,
    LISTED: tl.constexpr,
):  # fmt: skip
    """`first_rank` with what rule 5 adds; s of rule 4; each expert's target [E_PADDED] (-1: none)
    and its place in the list, of rule 6; which experts are active [E_PADDED], and in what order;
    distinct experts named before and after."""
    S, min_active = tl.load(settings), tl.load(settings + 1)
    max_active = tl.load(settings + 2)
    level = tl.arange(0, K_PADDED)
    sizes = tl.sum((first_rank[None, :] <= level[:, None]).to(tl.int32), 1)
    grown = tl.minimum(tl.sum(((sizes < min_active) & (level < K)).to(tl.int32)) + 1, K)
    capped = tl.maximum(tl.sum(((sizes <= max_active) & (level < K)).to(tl.int32)), 1)
    s = tl.minimum(tl.maximum(S, grown), capped)

    experts = tl.arange(0, E_PADDED)
    before = tl.sum((first_rank < NEVER).to(tl.int32))
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
    after = tl.where(movable, tl.sum(active), before)
    return first_rank, s, target, place, active, _in_order(active, E_PADDED), before, after


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


@triton.jit
def _move(
    ids, ids_row, ids_slot, weights, weights_row, weights_slot, rows, T, start, stop,
    first_rank, s, target, place, active, in_order, scales, settings, out, counters,
    E: tl.constexpr, K: tl.constexpr, E_PADDED: tl.constexpr, K_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Rules 6 to 9 for some rows, and their part of the counters. Returns [E_PADDED]: 1 where an
    expert is active only as a FAST row's slot stays with it."""
    S, scaling = tl.load(settings), tl.load(settings + 4) != 0
    m = tl.sum(active)
    standing = tl.cumsum(active, 0) - 1
    experts = tl.arange(0, E_PADDED)
    stayed = tl.zeros([E_PADDED], tl.int32)
    moved, critical, fast_rows, exact_rows, void_rows = 0, 0, 0, 0, 0
    for begin in range(start, tl.minimum(stop, T), ROWS):
        t, k, inside, chosen, weight, kind, _, valid, counts = _load(
            ids, ids_row, ids_slot, weights, weights_row, weights_slot, rows, T, begin,
            E, K, K_PADDED, ROWS,
        )  # fmt: skip
        fast, valid = (kind == FAST)[:, None], valid & (kind != EXACT)[:, None]
        counts = counts & fast
        flat = tl.reshape(tl.where(valid, chosen, 0).to(tl.int32), [ROWS * K_PADDED])
        expert = tl.reshape(flat, [ROWS, K_PADDED])
        leaves = valid & (tl.reshape(tl.gather(active, flat, 0), [ROWS, K_PADDED]) == 0)
        if m < K:
            stays = _stays(leaves, valid, counts, weight, k, m)
            leaves, valid = leaves & (stays == 0), valid & (stays == 0)
            here = tl.reshape((stays & fast).to(tl.int32), [ROWS * K_PADDED])
            named = (flat[:, None] == experts[None, :]) & (here != 0)[:, None]
            stayed = tl.maximum(stayed, tl.max(named.to(tl.int32), 0))
        new = chosen
        if tl.max(leaves.to(tl.int32)) > 0:
            goes_to = tl.reshape(tl.gather(target, flat, 0), [ROWS, K_PADDED])
            goes_to = tl.where(leaves, tl.where(counts, goes_to, -1), expert)
            if scaling:
                at = tl.reshape(tl.gather(place, flat, 0), [ROWS, K_PADDED])
                at = expert * (E - 1) + tl.maximum(at, 0)
                weight *= tl.load(scales + at, mask=leaves & counts, other=1.0)
            new, carried, freed, carries = _distinct(
                goes_to, leaves, valid, weight, t, k, m, standing, in_order, K, K_PADDED, ROWS
            )
            new = tl.where(freed | carries, new.to(chosen.dtype), chosen)
            slot = t.to(tl.int64)[:, None] * weights_row + k[None, :] * weights_slot
            tl.store(weights + slot, carried, mask=(freed | carries) & fast)
        tl.store(out + t.to(tl.int64)[:, None] * K + k[None, :], new, mask=inside)
        moved += tl.sum((leaves & fast).to(tl.int32))
        rank = tl.reshape(tl.gather(first_rank, flat, 0), [ROWS, K_PADDED])
        outside = valid & counts & (leaves == 0) & ((rank == RESCUED) | (rank >= s)) & (S < K)
        critical += tl.sum(outside.to(tl.int32))
        fast_rows += tl.sum((kind == FAST).to(tl.int32))
        exact_rows += tl.sum((kind == EXACT).to(tl.int32))
        void_rows += tl.sum(((kind == VOID) & (t < T)).to(tl.int32))
    if counters is not None:  # noqa: SIM102 (known when compiled)
        if S != _OFF:
            tl.atomic_add(counters + 3, moved.to(tl.int64))
            tl.atomic_add(counters + 4, critical.to(tl.int64))
            tl.atomic_add(counters + 5, fast_rows.to(tl.int64))
            tl.atomic_add(counters + 6, exact_rows.to(tl.int64))
            tl.atomic_add(counters + 7, void_rows.to(tl.int64))
    return stayed


@triton.jit
def _stays(leaves, valid, counts, weight, k, m):
    """Which of the slots that leave [ROWS, K_PADDED] stay: as many as the row has slots more than
    there are active experts, the best first."""
    excess = tl.sum(valid.to(tl.int32), 1)[:, None] - m
    earlier = (k[:, None] < k[None, :])[None, :, :]
    tie = (weight[:, :, None] == weight[:, None, :]) & earlier
    heavier = (weight[:, :, None] > weight[:, None, :]) | tie
    mine, other = counts[:, None, :], counts[:, :, None]
    ahead = tl.where(other, (mine == 0) | heavier, (mine == 0) & earlier)
    return leaves & (tl.sum((ahead & leaves[:, :, None]).to(tl.int32), 1) < excess)


@triton.jit
def _distinct(
    goes_to, leaves, valid, weight, t, k, m, standing, in_order,
    K: tl.constexpr, K_PADDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """[ROWS, K_PADDED] each: ids and weights of a row that names no expert twice, and of which
    slots: those that are freed and those that carry. goes_to: an expert, or -1 for none."""
    takes_part = valid & (tl.max(leaves.to(tl.int32), 1) > 0)[:, None]
    goes_to = tl.where(takes_part, goes_to, -1)
    earlier = (k[:, None] < k[None, :])[None, :, :]
    same = (goes_to[:, :, None] == goes_to[:, None, :]) & earlier
    again = tl.max(same.to(tl.int32), 1) > 0
    carries = (goes_to >= 0) & (again == 0)
    freed = takes_part & (carries == 0)

    carried = weight
    for j in range(1, K):  # in the order of the slots
        this = (k == j)[None, :]
        theirs = tl.sum(tl.where(this, goes_to, 0), 1)[:, None]
        if weight.dtype == tl.float64:
            bits = tl.sum(tl.where(this, weight.to(tl.int64, bitcast=True), 0), 1)
        else:
            bits = tl.sum(tl.where(this, weight.to(tl.int32, bitcast=True), 0), 1)
        added = carried + bits.to(weight.dtype, bitcast=True)[:, None]
        carried = tl.where((theirs == goes_to) & (k < j)[None, :], added, carried)
    carried = tl.where(freed, 0.0, carried)

    # A row needs no more experts than it has slots: fillers are among the first K from `start` on.
    start = (t % m)[:, None]
    flat = tl.reshape(tl.maximum(goes_to, 0), [ROWS * K_PADDED])
    distance = tl.reshape(tl.gather(standing, flat, 0), [ROWS, K_PADDED]) - start
    distance = tl.where(distance < 0, distance + m, distance)
    named = (distance[:, :, None] == k[None, None, :]) & carries[:, :, None]
    open = (tl.max(named.to(tl.int32), 1) == 0) & (k < m)[None, :]
    nth_open = tl.sum((open[:, :, None] & earlier).to(tl.int32), 1)
    nth_freed = tl.sum((freed[:, :, None] & earlier).to(tl.int32), 1)
    fits = open[:, :, None] & (nth_open[:, :, None] == nth_freed[:, None, :])
    at = start + tl.sum(tl.where(fits, k[None, :, None], 0), 1)
    at = tl.where(freed, tl.where(at < m, at, at - m), 0)
    filler = tl.gather(in_order, tl.reshape(at, [ROWS * K_PADDED]), 0)
    new = tl.where(freed, tl.reshape(filler, [ROWS, K_PADDED]), goes_to)
    return new, carried, freed, carries


@triton.jit
def _count_step(counters, settings, decoding, before, after):
    """The part of the counters that belongs to the whole batch."""
    if counters is not None:  # noqa: SIM102
        if (tl.load(settings) != _OFF) & (decoding > 0):
            tl.atomic_add(counters, tl.full([], 1, tl.int64))
            tl.atomic_add(counters + 1, before.to(tl.int64))
            tl.atomic_add(counters + 2, after.to(tl.int64))


assert COUNTERS[:3] == ("steps", "active_before", "active_after")
