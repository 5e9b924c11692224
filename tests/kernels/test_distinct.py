"""No row names an expert twice: what users and expert kernels rely on, worked examples of rules 6
to 9, and the types and odd batches in which they could break. Every implementation, as in
`test_reroute`, whose loops are the independent reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sere.kernels import COUNTERS, Batch, Plan, new_counters, reroute
from sere.kernels.plan import Substitution
from sere.kernels.reference import route
from sere.policy import Policy
from tests.kernels.test_reroute import (
    EXACT,
    FAST,
    INTERPRETED,
    SHARE,
    VOID,
    batch,
    by_hand,
    cases,
    keeping,
    mixture,
    plan_of,
    run_all,
)

Case = tuple[Tensor, Tensor, Tensor, Policy, list[int]]
# Triton's interpreter rounds sums to bfloat16 towards zero, where GPUs round to the nearest.
BFLOAT16 = () if INTERPRETED else (torch.bfloat16,)


def twice(row: list[int], E: int) -> bool:
    own = [e for e in row if 0 <= e < E]
    return len(set(own)) < len(own)


@settings(max_examples=300 // SHARE, deadline=None)
@given(cases())
def test_a_row_names_each_expert_once_and_freed_slots_add_none(case: Case) -> None:
    ids, weights, similarity, policy, rows = case
    E, K = len(similarity), ids.shape[1]
    kinds, counters = torch.tensor(rows, dtype=torch.int8), new_counters()
    plan = plan_of(similarity, policy, K)
    new, scaled = reroute(ids, weights, plan, kinds, counters)
    assert torch.equal(new < 0, ids < 0) and torch.equal(new >= E, ids >= E)
    foreign = (ids < 0) | (ids >= E)
    assert torch.equal(new[foreign], ids[foreign]) and torch.equal(
        scaled[foreign], weights[foreign]
    )
    for t, kind in enumerate(rows):
        same_ids = torch.equal(new[t], ids[t])
        if not twice(ids[t].tolist(), E):
            assert not twice(new[t].tolist(), E)
        if kind == EXACT:
            assert same_ids
        if kind == VOID or same_ids:
            assert torch.equal(scaled[t], weights[t])
    named = {e for t, row in enumerate(new.tolist()) if rows[t] != VOID for e in row if 0 <= e < E}
    assert counters[COUNTERS.index("active_after")] == len(named) * (counters[0] > 0)


@settings(max_examples=150 // SHARE, deadline=None)
@given(cases())
def test_the_sum_of_the_experts_outputs_is_what_rule_6_makes_it(case: Case) -> None:
    """Linear experts with random matrices, in float64: each slot by itself as rule 6 has it,
    against the re-routed batch as an expert kernel reads it."""
    ids, weights, similarity, policy, rows = case
    (T, K), E, H = ids.shape, len(similarity), 5
    g = torch.Generator().manual_seed(E + T)
    experts = torch.randn(E, H, H, generator=g).double()
    x = torch.randn(T, H, generator=g).double()
    outputs = torch.einsum("th,ehg->teg", x, experts)
    plan, kinds = plan_of(similarity, policy, K), torch.tensor(rows, dtype=torch.int8)
    routing = route(Batch(ids, weights, kinds), plan)
    defined = by_hand(ids, weights, similarity, policy, rows)
    wanted = torch.zeros(T, H, dtype=torch.float64)
    for t in range(T):
        for k in range(K):
            e, weight = int(ids[t, k]), weights[t, k].double()
            if not 0 <= e < E:
                continue
            if bool(routing.moved[t, k]) and weight != 0:
                place = next(
                    p for p, v in enumerate(plan.neighbours[e].tolist()) if v in defined.primary
                )
                if plan.settings[4]:
                    weight = weight * plan.scales[e, place].double()
                e = int(plan.neighbours[e, place])
            wanted[t] += weight * outputs[t, e]
    new, scaled = reroute(ids, weights, plan, kinds)
    got = torch.einsum("te,teg->tg", mixture(new, scaled.double(), E), outputs)
    real = kinds != VOID
    torch.testing.assert_close(got[real], wanted[real], rtol=1e-5, atol=1e-5)


# --- worked examples ------------------------------------------------------------------------------


def plan_for(active: list[int], goes: dict[int, int], E: int, K: int, **scale: float) -> Plan:
    """A plan under which expert u goes to goes[u]; EXACT rows make experts active."""
    similarity = torch.zeros(E, E)
    for u, v in goes.items():
        similarity[u, v] = 1.0
    policy = Policy(S=1, rho=0.5, min_active=1, weights="scale" if scale else None)
    factor = torch.full((E, E), scale.get("by", 1.0))
    return Plan.build(similarity, policy, K=K, substitution=Substitution(torch.zeros(E, E), factor))


def worked(
    active: list[int],
    goes: dict[int, int],
    row: list[int],
    weights: list[float],
    *,
    t: int,
    kind: int = FAST,
    dtype: torch.dtype = torch.float32,
    **scale: float,
) -> tuple[list[int], list[float]]:
    """What becomes of the row at place t of a batch whose other rows, EXACT ones, name what is
    active. (Its own best expert is primary, too.)"""
    E, K = 10, len(row)
    others = [active[i : i + K] for i in range(0, len(active), K)]
    others = [[*other, *[-1] * (K - len(other))] for other in others]
    assert len(others) <= 8
    others += [[-1] * K] * (8 - len(others))
    table = [*others[:t], row, *others[t:]]
    given_weights = torch.full((len(table), K), 0.5, dtype=dtype)
    given_weights[t] = torch.tensor(weights, dtype=dtype)
    kinds = torch.full((len(table),), EXACT, dtype=torch.int8)
    kinds[t] = kind
    plan = plan_for(active, goes, E, K, **scale)
    ids = torch.tensor(table, dtype=torch.int32)
    run_all(ids, given_weights, plan, kinds)
    new, scaled = reroute(ids, given_weights, plan, kinds)
    return new[t].tolist(), [round(w, 6) for w in scaled[t].tolist()]


def test_the_first_slot_that_goes_there_carries_the_sum() -> None:
    assert worked([0, 1], {3: 0}, [0, 3], [0.7, 0.3], t=0) == ([0, 1], [1.0, 0.0])
    assert worked([0, 1], {3: 0}, [3, 0], [0.3, 0.7], t=0) == ([0, 1], [1.0, 0.0])
    assert worked([0, 1], {3: 0}, [0, -1, 3], [0.6, 0.4, 0.2], t=0) == ([0, -1, 1], [0.8, 0.4, 0.0])


def test_fillers_start_at_the_rows_own_place_and_wrap() -> None:
    active, goes = [0, 1, 4, 6], {3: 0, 5: 0}
    row, weights = [0, 3, 5], [0.5, 0.3, 0.2]
    places = {t: worked(active, goes, row, weights, t=t)[0] for t in range(6)}
    assert list(places.values()) == [
        *([0, 1, 4], [0, 1, 4], [0, 4, 6]),
        *([0, 6, 1], [0, 1, 4], [0, 1, 4]),
    ]


def test_a_weightless_slot_is_freed_only_where_its_expert_is_not_active() -> None:
    assert worked([0, 1], {}, [0, 9], [0.6, 0.0], t=0) == ([0, 1], [0.6, 0.0])
    assert worked([0, 1], {}, [0, 1], [0.6, 0.0], t=0) == ([0, 1], [0.6, 0.0])
    # it comes first, so it carries what goes there
    assert worked([0, 1, 2], {9: 1}, [1, 9, 0], [0.0, 0.4, 0.6], t=0) == (
        [1, 2, 0],
        [0.4, 0.0, 0.6],
    )


def test_void_rows_are_spread_and_keep_their_weights() -> None:
    rows = {t: worked([0, 1, 2], {}, [5, 6], [0.5, 0.25], t=t, kind=VOID) for t in range(4)}
    assert [ids for ids, _ in rows.values()] == [[0, 1], [1, 2], [2, 0], [0, 1]]
    assert all(weights == [0.5, 0.25] for _, weights in rows.values())


def test_where_experts_run_out_the_best_slots_stay() -> None:
    """Alone in the world with S=1: its best expert is the only one active."""
    ids = torch.tensor([[0, 5, 6]], dtype=torch.int32)
    weights = torch.tensor([[0.5, 0.3, 0.2]])
    plan, counters = plan_for([], {5: 0, 6: 0}, 8, 3), new_counters()
    assert torch.equal(run_all(ids, weights, plan, None), ids)
    # Two rows, two active experts: one of three slots stays, the better.
    ids = torch.tensor([[0, 5, 6], [1, -1, -1]], dtype=torch.int32)
    weights = torch.tensor([[0.5, 0.3, 0.25], [1.0, 0.0, 0.0]])
    new, scaled = run_all(ids, weights, plan, None), reroute(ids, weights, plan, None, counters)[1]
    assert new.tolist() == [[0, 5, 1], [1, -1, -1]]
    assert scaled.tolist() == [[0.75, 0.30000001192092896, 0.0], [1.0, 0.0, 0.0]]
    counted = dict(zip(COUNTERS, counters.tolist(), strict=True))
    assert (counted["active_before"], counted["active_after"], counted["slots_rerouted"]) == (
        4,
        3,
        1,
    )
    # The slot that named the expert itself is never the one that has to look for another.
    ids, weights = torch.tensor([[5, 0]]), torch.tensor([[0.3, 0.7]])
    assert torch.equal(run_all(ids, weights, plan_for([], {5: 0}, 8, 2), None), ids)
    # Weightless slots are the last to stay.
    ids = torch.tensor([[7, 0, 6], [-1, 1, -1]])
    weights = torch.tensor([[0.0, 0.7, 0.3], [0.0, 1.0, 0.0]])
    assert run_all(ids, weights, plan, None).tolist() == [[1, 0, 6], [-1, 1, -1]]


def test_no_expert_gets_a_filler_from_every_row() -> None:
    """64 rows that all collapse: their freed slots are shared out among 16 active experts."""
    T, K, E = 64, 8, 64
    own = torch.arange(T) % 16
    ids = torch.cat([own[:, None], 16 + torch.rand(T, 48).argsort(1)[:, : K - 1]], dim=1)
    weights = torch.tensor([[0.5, *[0.5 / (K - 1)] * (K - 1)]] * T)
    similarity = torch.zeros(E, E)
    similarity[:, 3] = 1.0
    plan = Plan.build(similarity, Policy(S=1), K=K)
    new, scaled = reroute(ids, weights, plan)
    load = new[scaled == 0].bincount(minlength=16)
    assert load.sum() == T * (K - 2) + (own == 3).sum() and load.max() <= 2 * load.float().mean()


# --- types and odd batches ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "wanted"),
    [
        *((half, 1.0078125) for half in BFLOAT16),  # 1 + 3 / 512; one by one they would all be lost
        (torch.float16, 1.005859375),
        (torch.float32, 1 + 3 / 512),
        (torch.float64, 1 + 3 / 512),
    ],
)
def test_weights_are_summed_in_float32_and_rounded_once(dtype: torch.dtype, wanted: float) -> None:
    row, weights = [0, 5, 6, 7], [1.0, 1 / 512, 1 / 512, 1 / 512]
    goes = {5: 0, 6: 0, 7: 0}
    ids, summed = worked([0, 1, 2, 3], goes, row, weights, t=0, dtype=dtype)
    assert (ids, summed) == ([0, 1, 2, 3], [round(wanted, 6), 0.0, 0.0, 0.0])


def test_scaled_weights_are_rounded_before_they_are_added() -> None:
    """A fused multiply-add rounds once, and gives another last bit for these."""
    one, w, scale = torch.tensor([0.7, 1 / 3, 0.8])
    fused = (one.double() + w.double() * scale.double()).float()
    assert fused != one + w * scale
    ids, weights = torch.tensor([[0, 5], [1, -1]]), torch.stack([one, w, one, one]).view(2, 2)
    plan = plan_for([], {5: 0}, 8, 2, by=scale.item())
    run_all(ids, weights, plan, None)
    assert reroute(ids, weights, plan)[1][0, 0] == one + w * scale


@settings(max_examples=60 // SHARE, deadline=None)
@given(cases(), st.sampled_from([*BFLOAT16, torch.float16, torch.float64]))
def test_other_precisions_follow_the_definition(case: Case, dtype: torch.dtype) -> None:
    ids, weights, similarity, policy, rows = case
    weights = weights.to(dtype)
    plan, kinds = plan_of(similarity, policy, ids.shape[1]), torch.tensor(rows, dtype=torch.int8)
    run_all(ids, weights, plan, kinds)
    defined = by_hand(ids, weights, similarity, policy, rows)
    new, scaled = reroute(ids, weights, plan, kinds)
    assert (new.tolist(), scaled.dtype) == (defined.ids, dtype)
    assert torch.equal(scaled, defined.weights)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int64])
def test_ids_of_other_types(dtype: torch.dtype) -> None:
    ids, weights, similarity = batch(3, 24, 4, 32)
    plan = plan_of(similarity, Policy(S=1), 4)
    new = run_all(ids.to(dtype), weights, plan, None)
    assert new.dtype == dtype and torch.equal(new.int(), run_all(ids, weights, plan, None))


def test_weights_that_are_not_numbers_disturb_no_other_row() -> None:
    ids, weights, similarity = batch(5, 16, 4, 32)
    for policy in (Policy(S=1), Policy(S=1, min_active=1), Policy(tau=0.02)):
        plan = plan_of(similarity, policy, 4)
        broken = weights.clone()
        broken[3, 1] = broken[5, 0] = broken[5, 2] = torch.nan
        new = run_all(ids, broken, plan, None)
        assert not any(twice(row, 32) for row in new.tolist())
        _, scaled = reroute(ids, broken, plan)
        assert scaled.isnan().any(1).nonzero().flatten().tolist() == [3, 5]


@settings(max_examples=60 // SHARE, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 12), st.integers(1, 12))
def test_rows_that_came_with_duplicates_follow_the_definition(seed: int, E: int, K: int) -> None:
    """More slots than experts, too. Nothing can be promised but that all agree."""
    g = torch.Generator().manual_seed(seed)
    T = 6
    ids = torch.randint(-1, E + 1, (T, K), generator=g, dtype=torch.int32)
    weights = torch.rand(T, K, generator=g) * (torch.rand(T, K, generator=g) > 0.2)
    rows = [FAST, EXACT, VOID, keeping(1), FAST, FAST]
    similarity = torch.rand(E, E, generator=g)
    similarity = ((similarity + similarity.T) / 2).fill_diagonal_(1)
    S = 1 + seed % 2
    plan = Plan.build(similarity, Policy(S=S, rho=0.3, min_active=1), K=max(S, min(K, E)))
    new = run_all(ids, weights, plan, torch.tensor(rows, dtype=torch.int8))
    policy = Policy(S=S, rho=0.3, min_active=1)
    defined = by_hand(ids, weights, similarity, policy, rows)
    assert new.tolist() == defined.ids
