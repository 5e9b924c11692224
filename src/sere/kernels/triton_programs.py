"""What the kernels of `triton_kernel` are launched as: the parts of `triton_votes` and
`triton_rows` for one program, or for many in two launches."""

from __future__ import annotations

import functools

import triton
import triton.language as tl

from sere.kernels.reference import COUNTERS
from sere.kernels.triton_rows import _counts, _move
from sere.kernels.triton_votes import NEVER, _decide, _votes

VARYING = ("T", "share", "ids_row", "weights_row")
POINTERS = (
    *("ids", "weights", "rows", "votes", "neighbours", "errors", "scales", "settings"),
    *("pool", "out", "counters"),
)
# Compiled once, whatever a batch's size is and wherever its tensors begin: a server must not wait
# for a compiler. Rows of E - 1 entries are not aligned anyway.
launched = functools.partial(
    triton.jit, do_not_specialize=VARYING, do_not_specialize_on_alignment=POINTERS
)


@launched
def _all_at_once(
    ids, ids_row, ids_slot, weights, weights_row, weights_slot, rows, T,
    neighbours, errors, scales, settings, pool, out, counters,
    E: tl.constexpr, K: tl.constexpr, E_PADDED: tl.constexpr, K_PADDED: tl.constexpr,
    ROWS: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    first_rank, largest, fast, own = _votes(
        ids, ids_row, ids_slot, weights, weights_row, weights_slot, rows, T, 0, T,
        settings, pool, E, K, E_PADDED, K_PADDED, ROWS,
    )  # fmt: skip
    first_rank, s, target, place, active, in_order, before, certain = _decide(
        first_rank, largest, own, neighbours, errors, settings, pool,
        E, K, E_PADDED, K_PADDED, LISTED,
    )  # fmt: skip
    named = _move(
        ids, ids_row, ids_slot, weights, weights_row, weights_slot, rows, T, 0, T,
        first_rank, s, target, place, active, in_order, certain,
        neighbours, scales, settings, pool, out, counters,
        E, K, E_PADDED, K_PADDED, ROWS,
    )  # fmt: skip
    after = tl.sum(certain.to(tl.int32)) + tl.sum(named)
    _count_step(counters, settings, fast + own, before, after)


@launched
def _vote(
    ids, ids_row, ids_slot, weights, weights_row, weights_slot, rows, T, votes, share, settings,
    pool,
    E: tl.constexpr, K: tl.constexpr, E_PADDED: tl.constexpr, K_PADDED: tl.constexpr,
    ROWS: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """votes: [2 E + 1]: first ranks, then 0 if there is a FAST row, -1 if an INDEPENDENT one, then
    the largest shares, negative so that the least is wanted everywhere."""
    start = tl.program_id(0) * share
    first_rank, largest, fast, own = _votes(
        ids, ids_row, ids_slot, weights, weights_row, weights_slot, rows, T, start, start + share,
        settings, pool, E, K, E_PADDED, K_PADDED, ROWS,
    )  # fmt: skip
    experts = tl.arange(0, E_PADDED)
    tl.atomic_min(votes + experts, first_rank, mask=first_rank < NEVER)
    tl.atomic_min(votes + E, tl.where(own > 0, -1, 0), mask=fast + own > 0)
    tl.atomic_min(votes + E + 1 + experts, -largest, mask=(largest > 0) & (experts < E))


@launched
def _decide_and_move(
    ids, ids_row, ids_slot, weights, weights_row, weights_slot, rows, T, votes, share,
    neighbours, errors, scales, settings, pool, out, counters,
    E: tl.constexpr, K: tl.constexpr, E_PADDED: tl.constexpr, K_PADDED: tl.constexpr,
    ROWS: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    experts = tl.arange(0, E_PADDED)
    first_rank = tl.load(votes + experts, mask=experts < E, other=NEVER)
    share_votes = votes + E + 1 + experts
    largest = tl.load(share_votes, mask=experts < E, other=0)
    largest = tl.where(largest < 0, -(largest | NEVER), 0)  # the bit is not a share's, see below
    movable = tl.load(votes + E)
    first_rank, s, target, place, active, in_order, before, certain = _decide(
        first_rank, largest, (movable < 0).to(tl.int32), neighbours, errors, settings, pool,
        E, K, E_PADDED, K_PADDED, LISTED,
    )  # fmt: skip
    start = tl.program_id(0) * share
    named = _move(
        ids, ids_row, ids_slot, weights, weights_row, weights_slot, rows, T, start, start + share,
        first_rank, s, target, place, active, in_order, certain,
        neighbours, scales, settings, pool, out, counters,
        E, K, E_PADDED, K_PADDED, ROWS,
    )  # fmt: skip
    if tl.program_id(0) == 0:
        after = tl.sum(certain.to(tl.int32))
        _count_step(counters, settings, (movable <= 0).to(tl.int32), before, after)
    if counters is not None:  # noqa: SIM102 (known when compiled)
        if _counts(settings) & (tl.sum(named) > 0):  # an expert counts once, where this bit goes
            untaken = tl.full([E_PADDED], ~NEVER, tl.int32)
            was = tl.atomic_and(share_votes, untaken, mask=named > 0)
            tl.atomic_add(counters + 2, tl.sum(((named > 0) & ((was & NEVER) != 0)).to(tl.int64)))


@triton.jit
def _count_step(counters, settings, decoding, before, after):
    """The part of the counters that belongs to the whole batch."""
    if counters is not None:  # noqa: SIM102
        if _counts(settings) & (decoding > 0):
            tl.atomic_add(counters, tl.full([], 1, tl.int64))
            tl.atomic_add(counters + 1, before.to(tl.int64))
            tl.atomic_add(counters + 2, after.to(tl.int64))


assert COUNTERS[:3] == ("steps", "active_before", "active_after")
