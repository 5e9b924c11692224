"""THE SPECIFICATION of re-routing, in plain PyTorch. Every other implementation equals it bit for
bit (`torch.equal`, no tolerance).

Letters: T rows (tokens) in the batch, K slots (experts per token), E experts, S primaries per
token. A row has a class (`RowClass`):

* FAST rows vote with their top-S slots and are re-routed;
* EXACT rows (prefill, a request that asked for it) vote with all K slots and are never touched:
  their experts are read anyway, so they are free primaries for the others;
* VOID rows (graph padding, dummy runs) do not vote and add no expert;
* `keeping(n)` makes a FAST row whose own n best slots are primary whatever S is, n >= 1: a request
  that asked for more than the batch gets;
* INDEPENDENT rows are re-routed by a rule of their own (10), so that what becomes of them is the
  same whoever else is in the batch.

The rules, in the order in which they apply:

1. A slot *counts* if its id is in [0, E) and its weight is not 0. A slot whose id is outside
   (padding marked -1, fused shared experts) is never changed and never votes.
2. In each row the counting slots are ranked by weight, largest first; ties: lower slot first.
3. `first_rank[e]` = the lowest rank at which any FAST row chose e, or -1 if an EXACT row chose it,
   a row that keeps n chose it at a rank below n, or an INDEPENDENT row chose it and stays with it.
   The primaries for a given s are the experts with `first_rank < s`, and the members of the *pool*:
   those that join it first (`Plan.pool`), as many as the settings say, and if there is an
   INDEPENDENT row at least as many as the pool of those holds.
4. s starts at S, grows until there are `min_active` primaries (at most to K), then shrinks (not
   below 1, or 0 where there is a pool) while there are more than `max_active`.
5. If the plan has a tolerance tau: the *share* of a FAST row's counting slot is its weight over the
   row's sum. The *loss* of an expert u that is chosen and not primary is the largest share of any
   row, squared, times the error of the first primary in u's neighbour list. The experts that would
   lose more than tau become primary too, largest loss first (ties: lowest id), while there are
   fewer than `max_active` primaries.
6. From here on only if S < K and there is a primary; otherwise nothing changes. An expert is
   *active* if it is primary, or *critical*: a FAST row chose it and no primary is in its neighbour
   list. In FAST and VOID rows a slot whose expert is not active *leaves* it. If it counts and its
   row is FAST it goes to the first primary in that list, its weight times that neighbour's scale
   if the plan scales weights.
7. A slot that leaves and carries nothing (a VOID row's, or weight 0 in a FAST row) has nowhere to
   go: rule 9 frees it, so that it keeps no expert busy.
8. If a row has n slots in [0, E) and n is more than the number of active experts (`min_active`
   below K allows that), the best n less that number of the slots that would leave *stay*: own
   expert, own weight, no part in rule 9. The best: counting ones in the order of rule 2, then the
   others in slot order. A row that no slot leaves is the same to the bit.
9. In every other FAST row the slots in [0, E) name distinct experts. The first slot, in slot order,
   that goes to an expert or names it still carries the sum of the weights that go there, added in
   slot order. Every other one is *freed*: weight 0 and a *filler*, an expert that is active anyway
   and that the row does not name. Fillers are the active experts in ascending order, from position
   (row of this call mod their number) on, wrapping, without those that the row carries; freed slots
   take them in slot order. VOID rows likewise, but their weights are left alone.
10. An INDEPENDENT row knows one set of experts, the members of its pool, in every batch. A slot in
   [0, E) stays with its expert if its share (0 if it does not count) is at least what the plan
   says: always with members and with experts that none of them can stand in for, else if it would
   lose more than tau. Any other slot leaves, if it counts for the first member in its expert's
   list, its weight scaled as in rule 6. If one leaves, rule 9 holds for all slots of the row in
   [0, E), but fillers are members, the lowest first. The pool holds K members or more; without one
   (0) the row is left alone.

Only a row that named an expert twice when it came may still do so, if it is left as it was or its
slots stay. Ids outside [0, E) are never written, and nothing becomes -1.

Rules 1 to 3 and the shares are a batch's `vote`: one number per expert, and the elementwise minimum
of several batches' votes is the vote of all their rows together. Data-parallel ranks that share
theirs before they go on have the same primaries; each re-routes its own rows.

Shares, errors and losses are whole numbers (see `plan.py`): sums and comparisons then come out the
same in any order of the rows, on any machine. Weights are scaled in float32, the product rounded to
it (no fused multiply-add), then added in float32 and rounded once to their own type; float64 stays
float64. Expert kernels are written for distinct experts, and several answer others with wrong
numbers, also for other rows: hence rule 9, which costs the mixture no more than rounding.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from sere.kernels.batch import Batch
from sere.kernels.distinct import NOWHERE, distinct
from sere.kernels.independent import Slots, independent
from sere.kernels.plan import FRACTION, OFF, Plan


class RowClass(IntEnum):
    """What a row of the batch is to the operator."""

    VOID = 0
    FAST = 1
    EXACT = 2
    INDEPENDENT = -1


def keeping(n: int) -> int:
    """The class of a FAST row that keeps its own n best slots, n >= 1."""
    return int(RowClass.EXACT) + n


# Names of the counters, in the order of the tensor that `reroute` adds to.
COUNTERS = (
    "steps",
    "active_before",
    "active_after",
    "slots_rerouted",
    "slots_critical",
    "rows_fast",
    "rows_exact",
    "rows_void",
    "rows_independent",
)


NAMED, LEFT, NEVER = 2**20, 2**20 + 1, 2**30
"""`first_rank` of an expert that nobody votes for: named by a real row; by INDEPENDENT ones only,
whose slots leave it; or by none."""
WEIGHT_FRACTION = 2**20
"""A weight as a whole number is this many times the weight, rounded down."""
ALWAYS = -1
"""`first_rank` of an expert that is primary whatever s is: of EXACT rows, of the pool."""
LARGEST_WEIGHT = 2.0**15
"""Larger ones, and what is not a number, count as this much towards shares."""


class Routing(NamedTuple):
    """What the specification decides for one batch."""

    ids: Tensor  # [T, K], dtype of the input
    weights: Tensor  # [T, K], dtype of the input
    primary: Tensor  # [E] bool, those of rule 5 and the pool's included
    moved: Tensor  # [T, K] bool: slots that left their expert, by rule 6, 7 or 10
    critical: Tensor  # [T, K] bool: slots kept because no primary could stand in for their expert
    before: Tensor  # scalar: distinct experts that the real rows name
    after: Tensor  # scalar: distinct experts that they name afterwards


def run(batch: Batch, plan: Plan, counters: Tensor | None, votes: Tensor | None = None) -> Tensor:
    """New ids [T, K]; scales the weights in place; counts the step if `counters` are given.

    votes: what `vote` said of this batch, the minimum with what it said of others; None: of this
        batch alone.
    """
    if votes is None:
        votes = vote(batch, plan)
    routing = route(batch, plan, votes)
    if counters is not None:
        count(counters, batch, routing, plan, votes)
    batch.weights.copy_(routing.weights)
    return routing.ids


def vote(batch: Batch, plan: Plan) -> Tensor:
    """[2 E + 1] int32, the smaller the stronger; NEVER where there is nothing to say.

    First E: `first_rank`, NAMED or LEFT. Then 0 if a row is FAST, -1 if one is INDEPENDENT. Then,
    where the plan has a tolerance, minus the largest share of each expert in FAST rows.
    """
    E, rows = plan.num_experts, _rows(batch)
    fast, exact = _fast(rows)[:, None], (rows == RowClass.EXACT)[:, None]
    real = (rows != RowClass.VOID)[:, None]
    valid, counts, expert = _slots(batch, E)

    ranks = _ranks(batch.weights, counts, counts)
    ranks = ranks.masked_fill(ranks < (rows - int(RowClass.EXACT))[:, None], ALWAYS)
    own = (rows == RowClass.INDEPENDENT)[:, None]
    shares = _shares(batch.weights, counts)
    own_ranks = torch.where(shares < plan.pool[2][expert], LEFT, ALWAYS)
    ranks = ranks.masked_fill(~counts, NAMED).masked_fill(exact, ALWAYS)
    ranks = torch.where(own, own_ranks, ranks)
    ranks = ranks.masked_fill(~(valid & real), NEVER)
    never = torch.full((E,), NEVER, device=expert.device)
    first_rank = never.scatter_reduce(0, expert.reshape(-1), ranks.reshape(-1), "amin")

    movable = torch.where(own.any(), -1, torch.where(fast.any(), 0, NEVER))[None]
    largest = _largest(shares.masked_fill(~fast, 0), expert, E)
    told = (largest > 0) & (plan.settings[3] >= 0)
    return torch.cat([first_rank, movable, torch.where(told, -largest, NEVER)]).to(torch.int32)


def route(batch: Batch, plan: Plan, votes: Tensor | None = None) -> Routing:
    """Re-route one batch and say why (see `run` for the arguments)."""
    if votes is None:
        votes = vote(batch, plan)
    K, E = batch.ids.shape[1], plan.num_experts
    S, min_active, max_active, tau, scaling, pool, own_pool = plan.settings.unbind()
    rows = _rows(batch)
    fast, void = _fast(rows)[:, None], (rows == RowClass.VOID)[:, None]
    valid, counts, expert = _slots(batch, E)

    named, shares = votes[:E].long(), (-votes[E + 1 :].long()).clamp(min=0)
    members = torch.where(votes[E] < 0, torch.maximum(pool, own_pool), pool)
    first_rank = torch.where(plan.pool[0] < members, ALWAYS, named)
    least = torch.where(members > 0, 0, 1)
    s = _choose_s(first_rank, S, min_active, max_active, least, K)
    elected = first_rank < s
    kept = _kept(shares, elected, max_active, tau, plan) & (S < K)
    primary = elected | kept
    works = (S < K) & primary.any()

    target, place = _targets(plan.neighbours, primary)
    lonely = target == torch.arange(E, device=target.device)
    active = primary | (lonely & (first_rank < NAMED))
    carries = counts & fast
    leaves = valid & (fast | void) & ~active[expert] & works
    surplus = valid.sum(1, keepdim=True) - active.sum()
    stays = leaves & (_ranks(batch.weights, carries, leaves) < surplus)
    moved = leaves & ~stays

    goes = torch.where(moved, torch.where(carries, target[expert], NOWHERE), expert)
    joins = valid & ~stays & moved.any(1, keepdim=True)
    weights = _wide(batch.weights)
    scaled = moved & carries & (scaling != 0)
    weights = torch.where(scaled, _scaled(weights, plan, place[expert], expert), weights)
    start = torch.arange(len(rows), device=expert.device)
    ids, weights = distinct(goes, weights, joins, active, start)
    ids = torch.where(joins, ids, batch.ids.long())
    weights = torch.where(joins & fast, weights.to(batch.weights.dtype), batch.weights)
    critical = carries & works & (kept | (active & ~primary))[expert]

    own_rows, shares = (rows == RowClass.INDEPENDENT)[:, None], _shares(batch.weights, counts)
    own = independent(_wide(batch.weights), plan, own_rows, Slots(valid, counts, expert, shares))
    ids = torch.where(own.joins, own.ids, ids)
    weights = torch.where(own.joins, own.weights.to(batch.weights.dtype), weights)
    critical, moved = critical | own.rescued, (moved & fast) | own.leaves

    before, after = (named < NEVER).sum(), (named <= NAMED) & (active | ~works)
    real = valid & (fast | own.joins)  # who may name what nobody named before
    after = after.long().scatter_reduce(
        0, ids.clamp(0, E - 1).reshape(-1), real.long().reshape(-1), "amax"
    )
    return Routing(ids.to(batch.ids.dtype), weights, primary, moved, critical, before, after.sum())


def _rows(batch: Batch) -> Tensor:
    """The rows' classes; all FAST where none were given."""
    if batch.rows is not None:
        return batch.rows
    fast, ids = int(RowClass.FAST), batch.ids
    return torch.full(ids.shape[:1], fast, dtype=torch.int8, device=ids.device)


def _slots(batch: Batch, E: int) -> tuple[Tensor, Tensor, Tensor]:
    """[T, K] each: whether the id is an expert's, whether the slot counts (rule 1), and the expert,
    safe to index with and meaningless where there is none."""
    given = batch.ids.long()  # PyTorch compares no unsigned numbers but bytes
    valid = (given >= 0) & (given < E)
    return valid, valid & (batch.weights != 0), given.clamp(0, E - 1)


def _fast(rows: Tensor) -> Tensor:
    """[T] bool: FAST rows, those that keep some slots included."""
    return (rows == RowClass.FAST) | (rows > RowClass.EXACT)


def _ranks(weights: Tensor, counts: Tensor, among: Tensor) -> Tensor:
    """[T, K]: how many of the row's slots `among` come before each slot, counting ones (rule 2)
    before the others."""
    K, device = weights.shape[1], weights.device
    earlier = torch.ones(K, K, dtype=torch.bool, device=device).triu(1)  # [other slot, slot]
    mine, other = weights[:, None, :], weights[:, :, None]
    heavier = (other > mine) | ((other == mine) & earlier)
    ahead = torch.where(
        counts[:, None, :], heavier & counts[:, :, None], counts[:, :, None] | earlier
    )
    return (ahead & among[:, :, None]).sum(1)


def _choose_s(
    first_rank: Tensor, S: Tensor, min_active: Tensor, max_active: Tensor, least: Tensor, K: int
) -> Tensor:
    """Scalar s of rule 4. All union sizes come from one pass over `first_rank`."""
    s = torch.arange(K + 1, device=first_rank.device)
    sizes = (first_rank[None, :] < s[:, None]).sum(1)  # [K + 1], never decreasing
    grown = (sizes < min_active).sum().clamp(max=K)  # smallest s with enough primaries
    capped = torch.maximum((sizes <= max_active).sum() - 1, least)  # largest s within the ceiling
    return torch.minimum(torch.maximum(S.long(), grown), capped)


def _shares(weights: Tensor, counts: Tensor) -> Tensor:
    """[T, K] int64 in units of 1 / FRACTION: of each counting slot in its row; 0 of the others."""
    magnitude = _wide(weights).abs()
    magnitude = torch.where(magnitude < LARGEST_WEIGHT, magnitude, LARGEST_WEIGHT)
    whole = (magnitude * WEIGHT_FRACTION).long().masked_fill(~counts, 0)
    return whole * FRACTION // whole.sum(1, keepdim=True).clamp(min=1)


def _largest(shares: Tensor, expert: Tensor, E: int) -> Tensor:
    """[E] int64: the largest share of any row; 0 for none."""
    largest = torch.zeros(E, dtype=torch.int64, device=shares.device)
    return largest.scatter_reduce(0, expert.reshape(-1), shares.reshape(-1), "amax")


def _kept(shares: Tensor, elected: Tensor, max_active: Tensor, tau: Tensor, plan: Plan) -> Tensor:
    """[E] bool: rule 5."""
    target, place = _targets(plan.neighbours, elected)
    E = len(target)
    if E == 1:
        return torch.zeros_like(elected)
    error = plan.errors.long().gather(1, place[:, None]).squeeze(1)
    loss = (shares * shares * error) // FRACTION  # LOSS_FRACTION stands for 1
    candidate = ~elected & (target != torch.arange(E, device=target.device)) & (loss > tau)
    loss = loss.masked_fill(~candidate, -1)
    earlier = torch.ones(E, E, dtype=torch.bool, device=target.device).triu(1)
    ahead = (loss[:, None] > loss[None, :]) | ((loss[:, None] == loss[None, :]) & earlier)
    room = max_active - elected.sum()
    return candidate & ((ahead & candidate[:, None]).sum(0) < room) & (tau >= 0)


def _targets(neighbours: Tensor, primary: Tensor) -> tuple[Tensor, Tensor]:
    """[E] each: where a token of each expert goes, its first primary neighbour or else itself; and
    that neighbour's place in the list."""
    E = primary.shape[0]
    stay = torch.arange(E, device=primary.device)
    if E == 1:
        return stay, torch.zeros_like(stay)
    listed = neighbours.long()
    hit = (listed >= 0) & primary[listed.clamp(min=0)]
    place = hit.to(torch.int8).argmax(1)
    nearest = listed.gather(1, place[:, None]).squeeze(1)
    return torch.where(hit.any(1), nearest, stay), place


def _wide(weights: Tensor) -> Tensor:
    """In at least float32."""
    return weights if weights.dtype == torch.float64 else weights.float()


def _scaled(weights: Tensor, plan: Plan, place: Tensor, expert: Tensor) -> Tensor:
    """Weights [T, K] times the scale of each slot's target."""
    return weights if plan.num_experts == 1 else weights * plan.scales[expert, place]


def count(counters: Tensor, batch: Batch, routing: Routing, plan: Plan, votes: Tensor) -> None:
    """Add one step's figures to `counters` [len(COUNTERS)] int64, without a host sync.

    Steps and active experts count only where there is a FAST row: a step of prefill or of void
    rows alone (graph capture, dummy runs) adds nothing but its rows. They are of all rows that
    `votes` know of; slots and rows are this batch's. `Plan.off` counts nothing, and neither does a
    batch without any row.
    """
    if not len(batch.ids):
        return
    rows = _rows(batch)
    decoding = (votes[plan.num_experts] <= 0).long()
    figures = [
        decoding,
        decoding * routing.before,
        decoding * routing.after,
        routing.moved.sum(),
        routing.critical.sum(),
        _fast(rows).sum(),
        *((rows == kind).sum() for kind in (RowClass.EXACT, RowClass.VOID, RowClass.INDEPENDENT)),
    ]
    counters.add_(torch.stack(figures) * ((plan.settings[0] != OFF) | (plan.settings[6] > 0)))
