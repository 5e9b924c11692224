"""THE SPECIFICATION of re-routing, in plain PyTorch. Every other implementation equals it bit for
bit (`torch.equal`, no tolerance).

Letters: T rows (tokens) in the batch, K slots (experts per token), E experts, S primaries per
token. A row has a class (`RowClass`):

* FAST rows vote with their top-S slots and are re-routed;
* EXACT rows (prefill, a request that asked for it) vote with all K slots and are never touched:
  their experts are read anyway, so they are free primaries for the others;
* VOID rows (graph padding, dummy runs) do not vote and add no expert;
* `keeping(n)` makes a FAST row whose own n best slots are primary whatever S is, n >= 1: a request
  that asked for more than the batch gets.

The rules, in the order in which they apply:

1. A slot *counts* if its id is in [0, E) and its weight is not 0. A slot whose id is outside
   (padding marked -1, fused shared experts) is never changed and never votes.
2. In each row the counting slots are ranked by weight, largest first; ties: lower slot first.
3. `first_rank[e]` = the lowest rank at which any FAST row chose e, or 0 if an EXACT row chose it or
   a row that keeps n chose it at a rank below n.
   The primaries for a given s are the experts with `first_rank < s`.
4. s starts at S, grows until there are `min_active` primaries (at most to K), then shrinks (not
   below 1) while there are more than `max_active`.
5. If the plan has a tolerance tau: the *share* of a FAST row's counting slot is its weight over the
   row's sum. The *loss* of an expert u that is chosen and not primary is the largest share of any
   row, squared, times the error of the first primary in u's neighbour list. The experts that would
   lose more than tau become primary too, largest loss first (ties: lowest id), while there are
   fewer than `max_active` primaries.
6. A counting slot of a FAST row whose expert u is not primary goes to the first primary in u's
   neighbour list, its weight times that neighbour's scale if the plan scales weights; with none in
   the list, u is critical and stays.
7. A slot that carries nothing (a VOID row's, or weight 0 in a FAST row) and names an expert that
   is not primary goes to the lowest-numbered primary, so that it keeps no expert busy.
8. No primary at all, or S >= K: nothing changes.

Rules 1 to 3 and the shares are a batch's `vote`: one number per expert, and the elementwise minimum
of several batches' votes is the vote of all their rows together. Data-parallel ranks that share
theirs before they go on have the same primaries; each re-routes its own rows.

Shares, errors and losses are whole numbers (see `plan.py`): sums and comparisons then come out the
same in any order of the rows, on any machine. Where all scales are 1 the weights do not change by a
bit. Two slots of a row may end up naming one expert: the mixture then adds both weights, which is
exact.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from sere.kernels.plan import FRACTION, OFF, Plan


class RowClass(IntEnum):
    """What a row of the batch is to the operator."""

    VOID = 0
    FAST = 1
    EXACT = 2


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
)


NAMED, NEVER = 2**20, 2**30
"""`first_rank` of an expert that nobody votes for: named by a real row, or by none."""
WEIGHT_FRACTION = 2**20
"""A weight as a whole number is this many times the weight, rounded down."""
LARGEST_WEIGHT = 2.0**15
"""Larger ones count as this much towards shares."""


class Routing(NamedTuple):
    """What the specification decides for one batch."""

    ids: Tensor  # [T, K], dtype of the input
    weights: Tensor  # [T, K], dtype of the input
    primary: Tensor  # [E] bool, those of rule 5 included
    critical: Tensor  # [T, K] bool: slots kept because no primary could stand in for their expert
    before: Tensor  # scalar: distinct experts that the real rows name
    after: Tensor  # scalar: distinct experts that they name afterwards


def run(
    topk_ids: Tensor,
    topk_weights: Tensor,
    plan: Plan,
    rows: Tensor | None,
    counters: Tensor | None,
    votes: Tensor | None = None,
) -> Tensor:
    """New ids [T, K]; scales the weights in place; counts the step if `counters` are given.

    votes: what `vote` said of this batch, the minimum with what it said of others; None: of this
        batch alone.
    """
    if votes is None:
        votes = vote(topk_ids, topk_weights, plan, rows)
    routing = route(topk_ids, topk_weights, plan, rows, votes)
    if counters is not None:
        count(counters, topk_ids, routing, plan, rows, votes)
    topk_weights.copy_(routing.weights)
    return routing.ids


def vote(topk_ids: Tensor, topk_weights: Tensor, plan: Plan, rows: Tensor | None) -> Tensor:
    """[2 E + 1] int32, the smaller the stronger; NEVER where there is nothing to say.

    First E: `first_rank`, or NAMED. Then 0 if a row is FAST. Then, where the plan has a tolerance,
    minus the largest share of each expert.
    """
    E = plan.num_experts
    rows = _given(rows, topk_ids)
    fast, exact = _fast(rows)[:, None], (rows == RowClass.EXACT)[:, None]
    real = (rows != RowClass.VOID)[:, None]
    valid, counts, expert = _slots(topk_ids, topk_weights, E)

    ranks = _ranks(topk_weights, counts)
    ranks = ranks.masked_fill(ranks < (rows - int(RowClass.EXACT))[:, None], 0)
    ranks = (
        ranks.masked_fill(~counts, NAMED).masked_fill(exact, 0).masked_fill(~(valid & real), NEVER)
    )
    never = torch.full((E,), NEVER, device=expert.device)
    first_rank = never.scatter_reduce(0, expert.reshape(-1), ranks.reshape(-1), "amin")

    any_fast = torch.where(fast.any(), 0, NEVER)[None]
    shares = _largest_shares(topk_weights, expert, counts & fast, E)
    told = (shares > 0) & (plan.settings[3] >= 0)
    return torch.cat([first_rank, any_fast, torch.where(told, -shares, NEVER)]).to(torch.int32)


def route(
    topk_ids: Tensor,
    topk_weights: Tensor,
    plan: Plan,
    rows: Tensor | None,
    votes: Tensor | None = None,
) -> Routing:
    """Re-route one batch and say why (see `sere.kernels.reroute` for the arguments)."""
    if votes is None:
        votes = vote(topk_ids, topk_weights, plan, rows)
    K, E = topk_ids.shape[1], plan.num_experts
    S, min_active, max_active, tau, scaling = plan.settings.unbind()
    rows = _given(rows, topk_ids)
    fast, exact = _fast(rows)[:, None], (rows == RowClass.EXACT)[:, None]
    valid, counts, expert = _slots(topk_ids, topk_weights, E)

    first_rank, shares = votes[:E].long(), (-votes[E + 1 :].long()).clamp(min=0)
    s = _choose_s(first_rank, S, min_active, max_active, K)
    elected = first_rank < s
    kept = _kept(shares, elected, max_active, tau, plan) & (S < K)
    primary = elected | kept
    works = (S < K) & primary.any()

    target, place = _targets(plan.neighbours, primary)
    movable = valid & ~primary[expert] & works
    moved = torch.where(movable & counts & fast, target[expert], expert)
    idle = movable & (~(fast | exact) | (fast & ~counts))
    moved = torch.where(idle, primary.to(torch.int8).argmax(), moved)
    ids = torch.where(movable, moved.to(topk_ids.dtype), topk_ids)

    carried = movable & counts & fast & (ids != topk_ids) & (scaling != 0)
    weights = torch.where(carried, _scaled(topk_weights, plan, place[expert], expert), topk_weights)
    stayed = movable & counts & fast & (ids == topk_ids)
    spared = valid & kept[expert] & counts & fast

    wanted = ~primary & (first_rank < NAMED)
    lonely = wanted & (target == torch.arange(E, device=target.device))
    before = (first_rank < NEVER).sum()
    after = torch.where(works, primary.sum() + lonely.sum(), before)
    return Routing(ids, weights, primary, stayed | spared, before, after)


def _given(rows: Tensor | None, topk_ids: Tensor) -> Tensor:
    """The rows' classes; all FAST where none were given."""
    if rows is not None:
        return rows
    fast = int(RowClass.FAST)
    return torch.full(topk_ids.shape[:1], fast, dtype=torch.int8, device=topk_ids.device)


def _slots(topk_ids: Tensor, topk_weights: Tensor, E: int) -> tuple[Tensor, Tensor, Tensor]:
    """[T, K] each: whether the id is an expert's, whether the slot counts (rule 1), and the expert,
    safe to index with and meaningless where there is none."""
    valid = (topk_ids >= 0) & (topk_ids < E)
    return valid, valid & (topk_weights != 0), topk_ids.long().clamp(0, E - 1)


def _fast(rows: Tensor) -> Tensor:
    """[T] bool: FAST rows, those that keep some slots included."""
    return (rows == RowClass.FAST) | (rows > RowClass.EXACT)


def _ranks(weights: Tensor, counts: Tensor) -> Tensor:
    """[T, K]: how many counting slots of the row come before each slot (rule 2)."""
    K, device = weights.shape[1], weights.device
    earlier = torch.ones(K, K, dtype=torch.bool, device=device).triu(1)
    mine, other = weights[:, None, :], weights[:, :, None]  # [T, other slot, slot]
    ahead = (other > mine) | ((other == mine) & earlier)
    return (ahead & counts[:, :, None]).sum(1)


def _choose_s(
    first_rank: Tensor, S: Tensor, min_active: Tensor, max_active: Tensor, K: int
) -> Tensor:
    """Scalar s of rule 4. All union sizes come from one pass over `first_rank`."""
    s = torch.arange(1, K + 1, device=first_rank.device)
    sizes = (first_rank[None, :] < s[:, None]).sum(1)  # [K], never decreasing
    grown = ((sizes < min_active).sum() + 1).clamp(max=K)  # smallest s with enough primaries
    capped = (sizes <= max_active).sum().clamp(min=1)  # largest s within the ceiling
    return torch.minimum(torch.maximum(S.long(), grown), capped)


def _largest_shares(weights: Tensor, expert: Tensor, votes: Tensor, E: int) -> Tensor:
    """[E] int64 in units of 1 / FRACTION: the largest share of any voting row; 0 for no vote."""
    magnitude = weights if weights.dtype == torch.float64 else weights.float()
    magnitude = magnitude.abs().clamp(max=LARGEST_WEIGHT) * WEIGHT_FRACTION
    whole = magnitude.long().masked_fill(~votes, 0)
    shares = whole * FRACTION // whole.sum(1, keepdim=True).clamp(min=1)
    largest = torch.zeros(E, dtype=torch.int64, device=weights.device)
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


def _scaled(weights: Tensor, plan: Plan, place: Tensor, expert: Tensor) -> Tensor:
    """Weights [T, K] times the scale of each slot's target, in at least float32."""
    if plan.num_experts == 1:
        return weights
    scale = plan.scales[expert, place]
    exact = weights if weights.dtype == torch.float64 else weights.float()
    return (exact * scale).to(weights.dtype)


def count(
    counters: Tensor,
    topk_ids: Tensor,
    routing: Routing,
    plan: Plan,
    rows: Tensor | None,
    votes: Tensor,
) -> None:
    """Add one step's figures to `counters` [len(COUNTERS)] int64, without a host sync.

    Steps and active experts count only where there is a FAST row: a step of prefill or of void
    rows alone (graph capture, dummy runs) adds nothing but its rows. They are of all rows that
    `votes` know of; slots and rows are this batch's. `Plan.off` counts nothing, and neither does a
    batch without any row.
    """
    if not len(topk_ids):
        return
    rows = _given(rows, topk_ids)
    real = (rows != RowClass.VOID)[:, None]
    decoding = (votes[plan.num_experts] == 0).long()
    figures = [
        decoding,
        decoding * routing.before,
        decoding * routing.after,
        (real & (routing.ids != topk_ids)).sum(),
        routing.critical.sum(),
        *(of.sum() for of in (_fast(rows), rows == RowClass.EXACT, rows == RowClass.VOID)),
    ]
    counters.add_(torch.stack(figures) * (plan.settings[0] != OFF))
