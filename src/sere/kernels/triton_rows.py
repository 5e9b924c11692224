"""Rules 6 to 9 for a program of `triton_programs`: where slots go, no row to one expert twice.

A row is compared with itself, slot by slot, in tensors of [rows, slots, slots].
"""

from __future__ import annotations

import triton
import triton.language as tl

from sere.kernels.triton_votes import _OFF, EXACT, FAST, RESCUED, VOID, _load


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
