"""A pool, and rows that do not depend on their neighbours: every implementation that runs here, as
in `test_reroute`, against the definition in plain loops, and what users rely on."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sere.kernels import COUNTERS, Batch, Plan, new_counters, reroute
from sere.kernels.implementations import load_vote
from sere.kernels.plan import NO_TOLERANCE, OFF, Substitution
from sere.kernels.pool import joining_order
from sere.policy import Policy, PolicyError
from sere.statistics import LayerStatistics
from sere.table import Table
from tests.kernels.test_reroute import (
    EXACT,
    FAST,
    HALVES,
    INDEPENDENT,
    SHARE,
    VOID,
    batch,
    by_hand,
    cases,
    keeping,
    losses_of,
    run_all,
    same,
)

Case = tuple[Tensor, Tensor, Plan, Policy, list[int], Tensor]


@st.composite
def pooled(draw: st.DrawFn) -> Case:
    """Batches of `cases` under a policy with a pool, S = 0 among them, and all row classes."""
    ids, weights, similarity, policy, _ = draw(cases())
    (T, K), E = ids.shape, len(similarity)
    members = draw(st.integers(K, E))
    S = draw(st.integers(0, K))
    ceiling = policy.max_active and max(policy.max_active, members)
    own = {"S": S, "pool": members, "max_active": ceiling}
    policy = Policy.from_dict({**policy.to_dict(), **own})
    classes = st.sampled_from([FAST, FAST, INDEPENDENT, INDEPENDENT, EXACT, VOID, keeping(1)])
    rows = draw(st.lists(classes, min_size=T, max_size=T))
    return ids, weights, plan_with_pool(similarity, policy, K), policy, rows, similarity


def plan_with_pool(similarity: Tensor, policy: Policy, K: int) -> Plan:
    calls = torch.rand(len(similarity), generator=torch.Generator().manual_seed(K))
    losses = losses_of(len(similarity), policy.scales)
    return Plan.build(similarity, policy, K=K, substitution=losses, calls=calls / calls.sum())


def members_of(plan: Plan) -> frozenset[int]:
    joins = plan.pool[0].tolist()
    return frozenset(e for e, place in enumerate(joins) if place < int(plan.settings[5]))


def named_by(new: Tensor, rows: list[int], E: int) -> set[int]:
    return {e for t, row in enumerate(new.tolist()) if rows[t] != VOID for e in row if 0 <= e < E}


@settings(max_examples=120 // SHARE, deadline=None)
@given(pooled())
def test_equals_the_definition(case: Case) -> None:
    ids, weights, plan, policy, rows, similarity = case
    E = len(similarity)
    for t, kind in enumerate(rows):  # a row that names an expert twice has no definition by expert
        if kind == INDEPENDENT and len({*ids[t].tolist()}) < ids.shape[1]:
            rows[t] = EXACT
    kinds, counters = torch.tensor(rows, dtype=torch.int8), new_counters()
    defined = by_hand(ids, weights, similarity, policy, rows, members_of(plan))
    assert run_all(ids, weights, plan, kinds).tolist() == defined.ids
    new, scaled = reroute(ids, weights, plan, kinds, counters)
    assert same(scaled, defined.weights)
    assert counters[COUNTERS.index("slots_rerouted")] == defined.moved
    assert counters[COUNTERS.index("active_after")] == len(named_by(new, rows, E)) * int(
        counters[0] > 0
    )


@settings(max_examples=120 // SHARE, deadline=None)
@given(pooled(), st.integers(0, 4), st.booleans())
def test_an_independent_row_is_the_same_alone_and_in_any_company(
    case: Case, off: int, together: bool
) -> None:
    """Whatever the others are, whatever the step's policy is for them (another batch size's,
    stock), in every implementation, at T = 1, and with other ranks' votes."""
    ids, weights, plan, _, rows, _ = case
    plan = Plan(*(part.clone() for part in vars(plan).values()))
    if off == 1:
        plan.settings[0] = OFF
    elif off == 2:
        plan.settings[:4] = torch.tensor([1, 3, 4, NO_TOLERANCE])
        plan.settings[5] = 0
    kinds = torch.tensor(rows, dtype=torch.int8)
    new, scaled = reroute(ids, weights, plan, kinds)
    run_all(ids, weights, plan, kinds)
    if together and len(ids):
        votes = load_vote("reference")(Batch(ids, weights, kinds.clamp(max=EXACT).abs()), plan)
        for vote, run in HALVES.values():
            own = weights.clone()
            both = torch.minimum(vote(Batch(ids, weights, kinds), plan), votes)
            again = run(Batch(ids, own, kinds), plan, None, both)
            mine = kinds == INDEPENDENT
            assert torch.equal(again[mine], new[mine]) and same(own[mine], scaled[mine])
    for t, kind in enumerate(rows):
        if kind == INDEPENDENT:
            alone = slice(t, t + 1)
            run_all(ids[alone], weights[alone], plan, kinds[alone])
            one, weight = reroute(ids[alone], weights[alone], plan, kinds[alone])
            assert torch.equal(one[0], new[t]) and same(weight[0], scaled[t])


@settings(max_examples=60 // SHARE, deadline=None)
@given(pooled())
def test_a_row_names_no_expert_twice_and_a_pool_alone_loads_nothing_else(case: Case) -> None:
    ids, weights, plan, policy, rows, similarity = case
    E, kinds = len(similarity), torch.tensor(rows, dtype=torch.int8)
    new, _ = reroute(ids, weights, plan, kinds)
    for before, after in zip(ids.tolist(), new.tolist(), strict=True):
        own = [e for e in before if 0 <= e < E]
        if len(set(own)) == len(own):
            now = [e for e in after if 0 <= e < E]
            assert len(set(now)) == len(now)
    bound = policy.tau is None and policy.rho == 0 and (policy.min_active or 0) <= policy.pool_of(E)
    if policy.S == 0 and bound and set(rows) <= {FAST, INDEPENDENT, VOID}:
        assert named_by(new, rows, E) <= members_of(plan)


def test_without_a_pool_an_independent_row_is_left_alone() -> None:
    ids, weights, similarity = batch(3, 6, 4, 16)
    plan = plan_with_pool(similarity, Policy(S=1), 4)
    kinds = torch.full((6,), INDEPENDENT, dtype=torch.int8)
    assert torch.equal(run_all(ids, weights, plan, kinds), ids)


def test_a_share_is_rescued_exactly_where_it_would_lose_more_than_tau() -> None:
    """The plan says a least share where the definition says a loss: the same to the last unit."""
    from sere.kernels.plan import LOSS_FRACTION
    from sere.kernels.pool import FRACTION, _least_share

    for error in (1, 7, 333, 8192, 65535):
        for tau in (0, 1, round(0.001 * LOSS_FRACTION), round(0.3 * LOSS_FRACTION)):
            least = _least_share(error, tau)
            lost = [share * share * error // FRACTION > tau for share in (least - 1, least)]
            assert lost == [False, True] or (least == FRACTION + 1 and not lost[0])


# --- who is in it ---------------------------------------------------------------------------------


def left_to_lose(members: tuple[int, ...], error: Tensor, calls: Tensor) -> float:
    rest = [u for u in range(len(error)) if u not in members]
    return float(sum(calls[u] * error[u, list(members)].min() for u in rest))


@pytest.mark.parametrize("seed", range(5))
def test_the_pool_loses_little_more_than_the_best_of_its_size(seed: int) -> None:
    """What it spares is at least 1 - 1/e of what the best set spares, found by trying all."""
    g = torch.Generator().manual_seed(seed)
    error, calls = torch.rand(9, 9, generator=g), torch.rand(9, generator=g)
    whole = (error * 8192).round().long()
    joins = joining_order(-whole.double(), whole, calls, 4)
    chosen = tuple(e for e in range(9) if joins[e] < 4)
    worst = float((calls * whole.fill_diagonal_(0).amax(1)).sum())
    best = min(left_to_lose(c, whole, calls) for c in combinations(range(9), 4))
    spared = worst - left_to_lose(chosen, whole, calls)
    assert spared >= (1 - 1 / 2.718281828) * (worst - best)
    fewer = joining_order(-whole.double(), whole, calls, 3)
    assert {e for e in range(9) if fewer[e] < 3} == {e for e in range(9) if joins[e] < 3}


def test_the_pool_is_not_merely_the_most_frequent() -> None:
    """Two experts that say the same need one place, however often both are called."""
    error = torch.tensor([[0, 0, 9, 9], [0, 0, 9, 9], [9, 9, 0, 9], [9, 9, 9, 0]])
    joins = joining_order(-error.double(), error, torch.tensor([0.4, 0.35, 0.15, 0.1]), 3)
    assert {e for e in range(4) if joins[e] < 3} == {0, 2, 3}


def test_where_nobody_stands_in_the_pool_is_a_sort() -> None:
    """Under linear maps what is lost does not depend on the others."""
    lost = torch.tensor([5, 1, 8, 3])
    error, calls = lost[:, None].expand(4, 4), torch.tensor([0.1, 0.6, 0.1, 0.2])
    joins = joining_order(torch.zeros(4, 4), error, calls, 4)
    assert joins.tolist() == [3, 1, 0, 2] or joins.tolist() == [3, 2, 0, 1]  # .5 .6 .8 .6


# --- the policy -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings_", "complaint"),
    [
        ({"S": 0}, "S=0: expected a whole number >= 1, or 0 with a pool"),
        ({"S": 1, "pool": 0}, "pool=0: expected a share"),
        ({"S": 1, "pool": 1.5}, "pool=1.5: expected a share"),
        ({"S": 1, "pool": True}, "pool=True: expected a share"),
        ({"S": 1, "batches": {8: {"S": 0}}}, "S=0"),
    ],
)
def test_a_pool_that_cannot_be_meant_is_refused(settings_: dict, complaint: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(PolicyError, match=complaint):
        Policy.from_dict(settings_)


@pytest.mark.parametrize(
    ("policy", "complaint"),
    [
        (Policy(S=0, pool=3), r"pool=3 \(3 of 16 experts\): with S=0 .* at least 4"),
        (Policy(S=1, pool=17), "pool=17 exceeds this model's 16"),
        (Policy(S=1, pool=0.5, max_active=6), r"pool=0.5 \(8 of 16 experts\) exceeds max_active=6"),
    ],
)
def test_a_pool_that_does_not_fit_the_model_is_refused(policy: Policy, complaint: str) -> None:
    with pytest.raises(PolicyError, match=complaint):
        policy.check_against(K=4, E=16)


def test_a_table_knows_who_is_in_the_pool_at_every_batch_size(table: Table) -> None:
    """The lists are the same, the pool grows by its settings alone."""
    E, K = table.fingerprint.E, table.fingerprint.K
    policy = Policy(S=1, batches={8: {"S": 0, "pool": K}, 32: {"S": 0, "pool": 0.75}})
    index = next(iter(table.layers))
    plan = table.plan(index, policy)
    for rows, members in ((1, 0), (8, K), (32, round(0.75 * E))):
        own = policy.at(rows)
        assert own is not None
        settings_ = table.settings(index, own)
        assert settings_[5] == members == int((plan.pool[0] < settings_[5]).sum())


def test_a_layer_without_statistics_has_no_pool() -> None:
    layer = LayerStatistics.without_text(torch.eye(8))
    plan = Plan.build(layer.similarity, Policy(S=1, rho=2.0), K=2)
    assert not (plan.pool[0] < plan.settings[5]).any()


def test_where_nobody_stands_in_a_slot_outside_the_pool_is_freed() -> None:
    """A stand-in that takes over nothing frees the slot, of an INDEPENDENT row as of a FAST one."""
    E, K = 16, 4
    ids, weights, similarity = batch(1, 1, K, E)
    nothing = Substitution(torch.ones(E, E), torch.zeros(E, E))
    policy = Policy(S=0, pool=8, weights="scale")
    plan = Plan.build(similarity, policy, K=K, substitution=nothing)
    for kind in (FAST, INDEPENDENT):
        rows = torch.tensor([kind], dtype=torch.int8)
        new, scaled = reroute(ids, weights, plan, rows)
        for k in range(K):
            member = int(ids[0, k]) in members_of(plan)
            assert (scaled[0, k] == weights[0, k] and new[0, k] == ids[0, k]) == member
            assert member or scaled[0, k] == 0
