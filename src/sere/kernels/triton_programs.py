"""What the kernels of `triton_kernel` are launched as: the parts of `triton_votes` and
`triton_rows` for one program, or for many in two launches."""

from __future__ import annotations

import functools

import triton
import triton.language as tl

from sere.kernels.reference import COUNTERS
from sere.kernels.triton_rows import _move
from sere.kernels.triton_votes import _OFF, NEVER, _decide, _votes

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
def _count_step(counters, settings, decoding, before, after):
    """The part of the counters that belongs to the whole batch."""
    if counters is not None:  # noqa: SIM102
        if (tl.load(settings) != _OFF) & (decoding > 0):
            tl.atomic_add(counters, tl.full([], 1, tl.int64))
            tl.atomic_add(counters + 1, before.to(tl.int64))
            tl.atomic_add(counters + 2, after.to(tl.int64))


assert COUNTERS[:3] == ("steps", "active_before", "active_after")
