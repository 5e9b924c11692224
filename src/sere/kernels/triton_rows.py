"""Rules 6 to 10 for a program of `triton_programs`: where slots go, no row to one expert twice.

A row is compared with itself, slot by slot, in tensors of [rows, slots, slots].
"""

from __future__ import annotations

import triton
import triton.language as tl

from sere.kernels.triton_votes import (
    _OFF,
    EXACT,
    FAST,
    INDEPENDENT,
    RESCUED,
    VOID,
    _in_order,
    _load,
    _shares,
)


@triton.jit
def _move(
    ids, ids_row, ids_slot, weights, weights_row, weights_slot, rows, T, start, stop,
    first_rank, s, target, place, active, in_order, certain, neighbours, scales, settings, pool,
    out, counters, E: tl.constexpr, K: tl.constexpr, E_PADDED: tl.constexpr,
    K_PADDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Rules 6 to 10 for some rows, and their part of the counters. Returns [E_PADDED]: 1 where a
    row names an expert that is not `certain` to be named."""
    S, scaling = tl.load(settings), tl.load(settings + 4) != 0
    m, pooled = tl.sum(active), tl.load(settings + 5) + tl.load(settings + 6) > 0
    standing, named = tl.cumsum(active, 0) - 1, tl.zeros([E_PADDED], tl.int32)
    own_pool, own_place, limit, own_target, member, own_standing, own_order = _own(
        neighbours, settings, pool, E, E_PADDED, K_PADDED
    )
    for begin in range(start, tl.minimum(stop, T), ROWS):
        t, k, inside, chosen, weight, kind, _, valid, counts = _load(
            ids, ids_row, ids_slot, weights, weights_row, weights_slot, rows, T, begin,
            E, K, K_PADDED, ROWS,
        )  # fmt: skip
        fast, own = (kind == FAST)[:, None], (kind == INDEPENDENT)[:, None]
        valid, mine, counts = valid & (kind != EXACT)[:, None], valid, counts & (fast | own)
        flat = tl.reshape(tl.where(valid, chosen, 0).to(tl.int32), [ROWS * K_PADDED])
        expert = tl.reshape(flat, [ROWS, K_PADDED])
        leaves = valid & (_of(active, flat, K_PADDED, ROWS) == 0)
        if own_pool > 0:
            kept = _shares(weight, counts) >= _of(limit, flat, K_PADDED, ROWS)
            leaves = tl.where(own, valid & (kept == 0), leaves)
        else:
            leaves = leaves & (own == 0)
        if m < K:
            stays = _stays(leaves, valid, counts, weight, k, m) & (own == 0)
            leaves, valid = leaves & (stays == 0), valid & (stays == 0)
        new = chosen
        if tl.max(leaves.to(tl.int32)) > 0:
            goes_to = _of(target, flat, K_PADDED, ROWS)
            goes_to = tl.where(own, _of(own_target, flat, K_PADDED, ROWS), goes_to)
            goes_to = tl.where(leaves, tl.where(counts, goes_to, -1), expert)
            if scaling:
                at = _of(place, flat, K_PADDED, ROWS)
                at = tl.where(own, _of(own_place, flat, K_PADDED, ROWS), at)
                at = expert * (E - 1) + tl.maximum(at, 0)
                weight *= tl.load(scales + at, mask=leaves & counts, other=1.0)
            new, carried, freed, carries = _distinct(
                goes_to, leaves, valid, weight, t, k, m, standing, in_order,
                own, own_pool, own_standing, own_order, K, K_PADDED, ROWS,
            )  # fmt: skip
            new = tl.where(freed | carries, new.to(chosen.dtype), chosen)
            slot = t.to(tl.int64)[:, None] * weights_row + k[None, :] * weights_slot
            tl.store(weights + slot, carried, mask=(freed | carries) & (fast | own))
        tl.store(out + t.to(tl.int64)[:, None] * K + k[None, :], new, mask=inside)
        if pooled | (m < K):
            now = tl.where(mine & (fast | own), new, -1).to(tl.int32)
            named = _also(named, now, E_PADDED, K_PADDED, ROWS)
        if counters is not None:
            rank = _of(first_rank, flat, K_PADDED, ROWS)
            spared = (_of(member, flat, K_PADDED, ROWS) == 0) & (own_pool > 0)
            outside = tl.where(own, spared, ((rank == RESCUED) | (rank >= s)) & (S < K))
            critical = outside & valid & counts & (leaves == 0)
            _count_turn(counters, settings, leaves & (fast | own), critical, kind, t < T)
    return tl.where(certain, 0, named)


@triton.jit
def _own(
    neighbours, settings, pool, E: tl.constexpr, E_PADDED: tl.constexpr, K_PADDED: tl.constexpr
):
    """What INDEPENDENT rows know: the size of their pool; [E_PADDED] each: place of the stand-in,
    least share of a slot that stays, stand-in, whether a member, where it stands; the members."""
    experts, own_pool = tl.arange(0, E_PADDED), tl.load(settings + 6)
    joins = tl.load(pool + experts, mask=experts < E, other=E)
    place = tl.load(pool + E + experts, mask=experts < E, other=-1)
    limit = tl.load(pool + 2 * E + experts, mask=experts < E, other=0)
    listed = experts * (E - 1) + place
    target = tl.load(neighbours + listed, mask=place >= 0, other=-1).to(tl.int32)
    member = ((joins < own_pool) & (experts < E)).to(tl.int32)
    standing = tl.where(member != 0, tl.cumsum(member, 0) - 1, K_PADDED)  # others: nowhere
    return own_pool, place, limit, target, member, standing, _in_order(member, E_PADDED)


@triton.jit
def _also(named, ids, E_PADDED: tl.constexpr, K_PADDED: tl.constexpr, ROWS: tl.constexpr):
    """`named` [E_PADDED], and 1 where one of the ids [ROWS, K_PADDED] is."""
    flat = tl.reshape(ids, [ROWS * K_PADDED])
    here = (flat[:, None] == tl.arange(0, E_PADDED)[None, :]).to(tl.int32)
    return tl.maximum(named, tl.max(here, 0))


@triton.jit
def _of(values, flat, K_PADDED: tl.constexpr, ROWS: tl.constexpr):
    """[ROWS, K_PADDED]: the values [E_PADDED] of each slot's expert."""
    return tl.reshape(tl.gather(values, flat, 0), [ROWS, K_PADDED])


@triton.jit
def _count_turn(counters, settings, moved, critical, kind, real):
    """The part of the counters that belongs to rows. moved, critical: [ROWS, K_PADDED]. kind, real:
    [ROWS], the class of each and whether there is such a row."""
    if _counts(settings):
        tl.atomic_add(counters + 3, tl.sum(moved.to(tl.int64)))
        tl.atomic_add(counters + 4, tl.sum(critical.to(tl.int64)))
        tl.atomic_add(counters + 5, tl.sum((kind == FAST).to(tl.int64)))
        tl.atomic_add(counters + 6, tl.sum((kind == EXACT).to(tl.int64)))
        tl.atomic_add(counters + 7, tl.sum(((kind == VOID) & real).to(tl.int64)))
        tl.atomic_add(counters + 8, tl.sum((kind == INDEPENDENT).to(tl.int64)))


@triton.jit
def _counts(settings):
    """Whether steps under these settings are counted: stock routing of all rows is not."""
    return (tl.load(settings) != _OFF) | (tl.load(settings + 6) > 0)


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
    own, own_pool, own_standing, own_order,
    K: tl.constexpr, K_PADDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """[ROWS, K_PADDED] each: ids and weights of a row that names no expert twice, and of which
    slots: those that are freed and those that carry. goes_to: an expert, or -1 for none. own:
    [ROWS, 1], INDEPENDENT rows, whose fillers are the members of their pool, lowest first."""
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
    start = tl.where(own, 0, (t % tl.maximum(m, 1))[:, None])
    m = tl.where(own, own_pool, m)
    flat = tl.reshape(tl.maximum(goes_to, 0), [ROWS * K_PADDED])
    distance = tl.reshape(tl.gather(standing, flat, 0), [ROWS, K_PADDED]) - start
    distance = tl.where(distance < 0, distance + m, distance)
    own_distance = tl.reshape(tl.gather(own_standing, flat, 0), [ROWS, K_PADDED])
    distance = tl.where(own, own_distance, distance)
    named = (distance[:, :, None] == k[None, None, :]) & carries[:, :, None]
    open = (tl.max(named.to(tl.int32), 1) == 0) & (k[None, :] < m)
    nth_open = tl.sum((open[:, :, None] & earlier).to(tl.int32), 1)
    nth_freed = tl.sum((freed[:, :, None] & earlier).to(tl.int32), 1)
    fits = open[:, :, None] & (nth_open[:, :, None] == nth_freed[:, None, :])
    at = start + tl.sum(tl.where(fits, k[None, :, None], 0), 1)
    at = tl.where(freed, tl.where(at < m, at, at - m), 0)
    at = tl.reshape(at, [ROWS * K_PADDED])
    filler = tl.reshape(tl.gather(in_order, at, 0), [ROWS, K_PADDED])
    filler = tl.where(own, tl.reshape(tl.gather(own_order, at, 0), [ROWS, K_PADDED]), filler)
    new = tl.where(freed, filler, goes_to)
    return new, carried, freed, carries
