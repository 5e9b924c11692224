"""The specification, against an independent implementation in plain Python loops, worked examples
and the properties that users rely on. Each test names the regime in which it would break.

Every batch goes through every implementation that runs here, and all must be equal: numba, the CUDA
source compiled for the host and, with TRITON_INTERPRET=1 (see test_kernels.py), Triton.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sere import kernels
from sere.kernels import COUNTERS, Batch, Plan, RowClass, keeping, new_counters, reroute
from sere.kernels.implementations import load, load_vote
from sere.kernels.plan import ERROR_FRACTION, FRACTION, LOSS_FRACTION, Substitution, can_move
from sere.kernels.reference import LARGEST_WEIGHT, WEIGHT_FRACTION, route
from sere.kernels.reference import vote as specified_vote
from sere.policy import Policy, PolicyError
from tests.kernels import cuda_on_host
from tests.kernels.row_by_hand import Row, row_by_hand

# In Triton's interpreter a batch takes a tenth of a second: fewer of them.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SHARE = 50 if INTERPRETED else 1
BATCHES = 100 if INTERPRETED else 10_000
VOID, FAST, EXACT, INDEPENDENT = (int(c) for c in RowClass)

RUNNERS = {name: load(name) for name in ("reference", "triton" if INTERPRETED else "numba")}
if not INTERPRETED:
    from sere.kernels.numba_kernel import bound

    def run_bound(batch: Batch, plan: Plan, counters: Tensor) -> Tensor:
        """As an engine's layer calls it, twice: the output is used again."""
        ids, weights, rows = batch
        buffer, T = torch.full((len(ids) + 3,), FAST, dtype=torch.int8), len(ids)
        if rows is not None:
            buffer[:T] = rows
        run = bound(plan, counters, buffer)
        run(ids, weights.clone(), T).fill_(-7)
        counters.zero_()
        return run(ids, weights, T)

    RUNNERS["numba, bound"] = run_bound
# In two halves, for ranks that vote together.
HALVES = {name: (load_vote(name), run) for name, run in RUNNERS.items() if "," not in name}
if not INTERPRETED and cuda_on_host.COMPILER:
    HALVES["CUDA"] = (cuda_on_host.vote, cuda_on_host.many_blocks)
    RUNNERS["CUDA, one block"] = cuda_on_host.one_block
    RUNNERS["CUDA, many blocks"] = cuda_on_host.many_blocks


@functools.cache
def losses_of(E: int, scaled: bool) -> Substitution:
    """Moments of outputs that have nothing to do with the similarity."""
    outputs = torch.randn(E, 6, generator=torch.Generator().manual_seed(E)).double() + 0.5
    gram = outputs @ outputs.T
    own = gram.diagonal()
    return Substitution.of(gram, own.expand(E, E), own, typical=4.0, scaled=scaled)


def plan_of(similarity: Tensor, policy: Policy, K: int) -> Plan:
    return Plan.build(
        similarity, policy, K=K, substitution=losses_of(len(similarity), policy.scales)
    )


@dataclass
class Definition:
    ids: list[list[int]]
    weights: Tensor
    primary: set[int]
    critical: set[int]
    moved: int  # slots of FAST rows
    stayed: set[int]  # experts that FAST rows keep as there are too few


def by_hand(
    ids: Tensor,
    weights: Tensor,
    similarity: Tensor,
    policy: Policy,
    rows: list[int],
    pool: frozenset[int] = frozenset(),
) -> Definition:
    """What becomes of a batch, from the definition, with no tensor tricks. No INDEPENDENT row names
    an expert twice. pool: the members, for all classes alike.

    Whole numbers where the definition has them, so that the result is one and not nearly one.
    """
    E, K = similarity.shape[0], ids.shape[1]
    table, sim = ids.tolist(), similarity.double()
    weight = weights.tolist()
    substitution = losses_of(E, policy.scales)
    merit = -substitution.error if policy.fills_by_error else sim

    def best_of(u: int, among: set[int] | frozenset[int]) -> int:
        return max(sorted(among), key=lambda v: merit[u, v].item())  # first of equals

    def share(t: int, k: int) -> int:
        whole = [
            int(Fraction(min(w, LARGEST_WEIGHT)) * WEIGHT_FRACTION) if 0 <= e < E else 0
            for e, w in zip(table[t], weight[t], strict=True)
        ]
        return whole[k] * FRACTION // max(sum(whole), 1)

    def loss(u: int, among: set[int]) -> int:
        shares = [
            share(t, k)
            for t in range(len(table))
            for k in range(K)
            if rows[t] not in (VOID, EXACT, INDEPENDENT) and table[t][k] == u and weight[t][k] != 0
        ]
        lost = substitution.error[u, best_of(u, among)].item()
        error = min(round(lost * ERROR_FRACTION), 65535)
        return max(shares, default=0) ** 2 * error // FRACTION

    def stays(t: int, k: int) -> bool:
        """Of an INDEPENDENT row."""
        u = table[t][k]
        if u in pool or sim[u, best_of(u, pool)].item() < policy.rho:
            return True
        if policy.tau is None:
            return False
        counts = weight[t][k] != 0
        lost = min(round(substitution.error[u, best_of(u, pool)].item() * ERROR_FRACTION), 65535)
        lost = (share(t, k) * counts) ** 2 * lost // FRACTION
        return lost > round(policy.tau * LOSS_FRACTION)

    def votes(t: int, s: int) -> set[int]:
        if rows[t] == EXACT:
            return {e for e in table[t] if 0 <= e < E}
        if rows[t] == INDEPENDENT:
            return {table[t][k] for k in range(K) if 0 <= table[t][k] < E and stays(t, k)}
        if rows[t] == VOID:
            return set()
        s = max(s, rows[t] - EXACT)  # of a row that keeps some
        slots = [k for k in range(K) if 0 <= table[t][k] < E and weight[t][k] != 0]
        return {table[t][k] for k in sorted(slots, key=lambda k: (-weight[t][k], k))[:s]}

    def union(s: int) -> set[int]:
        return set(pool).union(*(votes(t, s) for t in range(len(table))), set())

    s = policy.S
    while s < K and len(union(s)) < (policy.min_active or K):
        s += 1
    s = min(s, K)
    while s > (0 if pool else 1) and policy.max_active and len(union(s)) > policy.max_active:
        s -= 1
    primary = union(s)
    critical = set[int]()
    if not primary or (policy.S >= K and INDEPENDENT not in rows):
        return Definition(table, weights, primary, critical, 0, set())
    if policy.tau is not None:
        secondary = {u for row in table for u in row if 0 <= u < E} - primary
        lost = {u: loss(u, primary) for u in secondary}
        worth = [u for u in secondary if lost[u] > round(policy.tau * LOSS_FRACTION)]
        room = max((policy.max_active or E) - len(primary), 0)
        critical = set(sorted(worth, key=lambda u: (-lost[u], u))[:room])
        primary = primary | critical
    target, scale = dict[int, int](), dict[int, np.float32]()
    for t in range(len(table)):
        for u in votes(t, K) - primary:
            best = best_of(u, primary)
            if sim[u, best].item() < policy.rho:
                critical.add(u)
            else:
                target[u], scale[u] = best, np.float32(substitution.scale[u, best].float().item())
    wide = np.float64 if weights.dtype == torch.float64 else np.float32

    def made_of(t: int) -> Row:
        own = [wide(w) for w in weight[t]]
        if rows[t] == EXACT or (rows[t] != INDEPENDENT and policy.S >= K):
            return Row(table[t], weight[t], set(), set())
        if rows[t] != INDEPENDENT:
            active = primary | critical
            fast = rows[t] != VOID
            return row_by_hand(t, table[t], own, E, active, target, scale, fast=fast)
        goes = {u: best_of(u, pool) for u in table[t] if 0 <= u < E}
        factor = {u: np.float32(substitution.scale[u, v].float().item()) for u, v in goes.items()}
        kept = votes(t, K)
        return row_by_hand(0, table[t], own, E, pool | kept, goes, factor, fast=True)

    made = [made_of(t) for t in range(len(table))]
    fast = [row for row, kind in zip(made, rows, strict=True) if kind != VOID]
    return Definition(
        [row.ids for row in made],
        torch.tensor([row.weights for row in made], dtype=weights.dtype).reshape(weights.shape),
        primary,
        critical,
        sum(len(row.moved) for row in fast),
        {row.ids[k] for row in fast for k in row.stayed},
    )


def batch(
    seed: int, T: int, K: int, E: int, *, coarse: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Distinct experts per row in random slot order, weights and a similarity matrix.

    coarse: few distinct values, so that ties are everywhere.
    """
    g = torch.Generator().manual_seed(seed)
    scores = torch.rand(T, E, generator=g)
    ids = scores.argsort(dim=1)[:, :K].to(torch.int32)
    weights = torch.rand(T, K, generator=g) + 0.01
    similarity = torch.rand(E, E, generator=g)
    if coarse:
        weights, similarity = (weights * 3).ceil() / 4, (similarity * 4).round() / 4
    similarity = ((similarity + similarity.T) / 2).fill_diagonal_(1)
    return ids, weights, similarity


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Policy, list[int]]:
    E = draw(st.sampled_from([2, 5, 8, 32, 60]))
    K = draw(st.integers(1, min(E, 8)))
    T = draw(st.integers(0, 12))
    ids, weights, similarity = batch(
        draw(st.integers(0, 2**31)), T, K, E, coarse=draw(st.booleans())
    )
    for t in range(T):
        for k in range(K):
            odd = draw(
                st.sampled_from(
                    ["as it is"] * 16 + ["padding", "shared", "weightless"] * 2 + ["again"]
                )
            )
            if odd == "padding":
                ids[t, k] = -1
            elif odd == "shared":
                ids[t, k] = E
            elif odd == "weightless":
                weights[t, k] = 0
            elif odd == "again":
                ids[t, k] = ids[t, 0]
    minimum = draw(st.none() | st.integers(1, E))
    maximum = draw(st.none() | st.integers(max(minimum or K, 1), max(E, minimum or K)))
    tolerant = draw(st.booleans())
    policy = Policy(
        S=draw(st.integers(1, K)),
        rho=0 if tolerant else draw(st.sampled_from([0.0, 0.25, 0.5, 0.6, 2.0])),
        tau=draw(st.sampled_from([0.0, 0.003, 0.03, 0.3])) if tolerant else None,
        min_active=minimum,
        max_active=maximum,
        fill=draw(st.sampled_from([None, "similar"])),
        weights=draw(st.sampled_from([None, "keep", "scale"])),
    )
    classes = st.sampled_from([FAST, FAST, FAST, EXACT, VOID, keeping(1), keeping(2), keeping(K)])
    rows = draw(st.lists(classes, min_size=T, max_size=T))
    return ids, weights, similarity, policy, rows


def run(
    ids: Tensor, weights: Tensor, similarity: Tensor, policy: Policy, rows: list[int] | None = None
) -> Tensor:
    """New ids, the same from every implementation, weights and counters too."""
    plan = plan_of(similarity, policy, ids.shape[1])
    return run_all(
        ids, weights, plan, None if rows is None else torch.tensor(rows, dtype=torch.int8)
    )


def same(one: Tensor, other: Tensor) -> bool:
    """Equal bit for bit; a NaN is a NaN."""
    return torch.equal(one.isnan(), other.isnan()) and torch.equal(
        one.nan_to_num(0), other.nan_to_num(0)
    )


def mixture(ids: Tensor, weights: Tensor, E: int) -> Tensor:
    """[T, E]: by expert the weight that a row gives it; ids out of range are left out."""
    shares = weights.new_zeros(len(ids), E + 1)
    inside = (ids >= 0) & (ids < E)
    return shares.scatter_add(1, torch.where(inside, ids, E).long(), weights)[:, :E]


def run_all(ids: Tensor, weights: Tensor, plan: Plan, rows: Tensor | None) -> Tensor:
    (expected, scaled), counted = reroute(ids, weights, plan, rows), None
    for name, implementation in RUNNERS.items():
        counters, own = new_counters(), weights.clone(memory_format=torch.preserve_format)
        assert torch.equal(implementation(Batch(ids, own, rows), plan, counters), expected), name
        assert same(own, scaled), name
        counted = counters if counted is None else counted
        assert torch.equal(counters, counted), name
    return expected


def mixture_of(
    ids: Tensor, weights: Tensor, similarity: Tensor, policy: Policy, rows: list[int]
) -> Tensor:
    """[T, E], of the rows that are not VOID; which of several experts a freed slot names depends on
    the other rows, and adds nothing."""
    kinds = torch.tensor(rows, dtype=torch.int8)
    plan = plan_of(similarity, policy, ids.shape[1])
    mixed = mixture(*reroute(ids, weights, plan, kinds), len(similarity))
    return mixed * (kinds != VOID)[:, None]


def test_implementations_agree_on_ten_thousand_batches() -> None:
    g = torch.Generator().manual_seed(1)
    for seed in range(BATCHES):
        E, K, T = ((8, 2), (32, 4), (60, 4), (128, 8))[seed % 4] + (seed % 40,)
        ids, weights, similarity = batch(seed, T, K, E, coarse=seed % 3 == 0)
        ids = ids.masked_fill(torch.rand(T, K, generator=g) < 0.05, -1)
        weights = weights.masked_fill(torch.rand(T, K, generator=g) < 0.05, 0)
        rows = torch.randint(0, 3 + seed % 4, (T,), generator=g).to(torch.int8)
        threshold = {"rho": (seed % 5) / 5} if seed % 2 else {"tau": (seed % 7) ** 3 / 1000}
        policy = Policy(S=1 + seed % K, max_active=K + seed % (E - K), **threshold)
        run_all(ids, weights, plan_of(similarity, policy, K), rows)


# Three experts' outputs in the plane: 0 and 1 at a right angle, 2 between them and half as long.
OUTPUTS = torch.tensor([[2.0, 0.0], [0.0, 2.0], [0.6, 0.8]], dtype=torch.float64)


def expected_error(policy: Policy) -> Plan:
    gram = OUTPUTS @ OUTPUTS.T
    own = gram.diagonal()
    substitution = Substitution.of(gram, own.expand(3, 3), own, typical=4.0, scaled=policy.scales)
    return Plan.build(torch.eye(3), policy, K=2, substitution=substitution)


def test_the_worked_example_of_expected_error() -> None:
    """docs/method.md: expert 1 stands in for 2 with the scale 0.4 and loses 0.36, which is 0.18 of
    sqrt(1 * 4); a's share is 1/4."""
    ids, weights = (
        torch.tensor([[0, 2], [1, 0]], dtype=torch.int32),
        torch.tensor([[0.75, 0.25]] * 2),
    )
    plan = expected_error(Policy(S=1, tau=0.012, min_active=1))
    assert plan.neighbours.tolist() == [[2, 1], [2, 0], [1, 0]]
    errors = torch.tensor([[0.64, 1], [0.36, 1], [0.18, 0.32]])
    assert torch.equal(plan.errors, (errors * ERROR_FRACTION).round().int())
    torch.testing.assert_close(plan.scales, torch.tensor([[1.2, 0], [1.6, 0], [0.4, 0.3]]))
    run_all(ids, weights, plan, None)
    new_ids, new_weights = reroute(ids, weights, plan)  # the loss is 1/16 * 0.18 = 0.01125
    assert new_ids.tolist() == [[0, 1], [1, 0]]
    torch.testing.assert_close(new_weights, torch.tensor([[0.75, 0.1], [0.75, 0.25]]))
    strict = expected_error(Policy(S=1, tau=0.0111, min_active=1))
    assert torch.equal(reroute(ids, weights, strict)[0], ids)
    tau = plan.errors[2, 0].item() / ERROR_FRACTION / 16  # to the bit
    equal = expected_error(Policy(S=1, tau=tau, min_active=1))
    assert torch.equal(reroute(ids, weights, equal)[0], new_ids)  # only what loses more is kept
    kept = expected_error(Policy(S=1, tau=0.012, min_active=1, weights="keep"))
    assert torch.equal(reroute(ids, weights, kept)[1], weights)
    plan.settings.copy_(kept.settings)  # the scales are there, but not asked for
    run_all(ids, weights, plan, None)
    assert torch.equal(reroute(ids, weights, plan)[1], weights)


def test_the_ceiling_keeps_the_largest_losses_and_of_equals_the_lowest() -> None:
    """tau=0 would load every expert; max_active decides how many, in order of loss."""
    ids = torch.tensor([[0, 4, 3], [0, 2, 5]], dtype=torch.int32)
    weights = torch.tensor([[0.5, 0.25, 0.25], [0.5, 0.375, 0.125]])
    substitution = Substitution(torch.full((6, 6), 0.5), torch.ones(6, 6))

    def kept(ceiling: int) -> set[int]:
        policy = Policy(S=1, tau=0.0, min_active=1, max_active=ceiling)
        plan = Plan.build(torch.eye(6), policy, K=3, substitution=substitution)
        run_all(ids, weights, plan, None)
        return set(route(Batch(ids, weights), plan).primary.nonzero().flatten().tolist())

    assert [kept(n) for n in (1, 2, 3, 4, 5)] == [
        {0},
        {0, 2},
        {0, 2, 3},
        {0, 2, 3, 4},
        {0, 2, 3, 4, 5},
    ]


@pytest.mark.parametrize("factor", [1e-3, 1.0, 1e4])
def test_losses_do_not_depend_on_the_scale_of_the_weights(factor: float) -> None:
    """Some routers normalise, some multiply by a constant."""
    ids, weights, similarity = batch(8, 32, 4, 32)
    policy = Policy(S=1, tau=0.02)
    weights = (weights * 1024).round() / 1024  # whole numbers stay whole
    expected = run(ids, weights, similarity, policy)
    assert (run(ids, weights * factor, similarity, policy) != expected).float().mean() < 0.02


def test_a_smaller_tau_never_loads_fewer_experts() -> None:
    ids, weights, similarity = batch(9, 32, 4, 32)
    taus = [0.0, 0.001, 0.01, 0.03, 0.1, 0.3, 1.0]
    loaded = [
        set(run(ids, weights, similarity, Policy(S=1, tau=t)).flatten().tolist()) for t in taus
    ]
    assert all(more >= fewer for more, fewer in pairwise(loaded))
    assert len(loaded[0]) > len(loaded[-1])


def test_what_loses_by_itself_needs_the_experts_outputs() -> None:
    for wanting in (Policy(tau=0.1), Policy(fill="error"), Policy(weights="scale")):
        with pytest.raises(PolicyError, match="calibrate on text"):
            Plan.build(torch.eye(4), wanting, K=2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_any_precision(dtype: torch.dtype) -> None:
    ids, weights, similarity = batch(4, 16, 4, 32, coarse=True)
    assert torch.equal(
        run(ids, weights.to(dtype), similarity, Policy(S=1)),
        run(ids, weights, similarity, Policy(S=1)),
    )


@settings(max_examples=300 // SHARE, deadline=None)
@given(cases())
def test_equals_the_definition(case: tuple[Tensor, Tensor, Tensor, Policy, list[int]]) -> None:
    ids, weights, similarity, policy, rows = case
    plan = plan_of(similarity, policy, ids.shape[1])
    routing = route(Batch(ids, weights, torch.tensor(rows, dtype=torch.int8)), plan)
    assert torch.equal(run(ids, weights, similarity, policy, rows), routing.ids)
    defined = by_hand(ids, weights, similarity, policy, rows)
    assert routing.ids.tolist() == defined.ids
    assert torch.equal(routing.weights, defined.weights)
    assert set(routing.primary.nonzero().flatten().tolist()) == defined.primary
    assert set(ids[routing.critical].tolist()) == defined.critical
    assert int(routing.moved.sum()) == defined.moved


@settings(max_examples=100 // SHARE, deadline=None)
@given(cases())
def test_active_experts_are_primaries_or_critical(
    case: tuple[Tensor, Tensor, Tensor, Policy, list[int]],
) -> None:
    ids, weights, similarity, policy, rows = case
    E = similarity.shape[0]
    given = Batch(ids, weights, torch.tensor(rows, dtype=torch.int8))
    routing = route(given, plan_of(similarity, policy, ids.shape[1]))
    critical = set(ids[routing.critical].tolist())
    active = set(routing.primary.nonzero().flatten().tolist()) | critical
    if not routing.primary.any() or ids.shape[1] <= policy.S:
        assert torch.equal(routing.ids, ids)
        return
    inside = (routing.ids >= 0) & (routing.ids < E)
    assert set(routing.ids[inside & (routing.ids != ids)].tolist()) <= active
    enough = inside.sum(1) <= len(active)
    assert set(routing.ids[inside & enough[:, None]].tolist()) <= active


@settings(max_examples=100 // SHARE, deadline=None)
@given(cases(), st.randoms())
def test_permuting_rows_permutes_results(
    case: tuple[Tensor, Tensor, Tensor, Policy, list[int]], random: object
) -> None:
    ids, weights, similarity, policy, rows = case
    order = list(range(len(rows)))
    random.shuffle(order)  # type: ignore[attr-defined]
    there = mixture_of(ids[order], weights[order], similarity, policy, [rows[i] for i in order])
    assert torch.equal(there, mixture_of(ids, weights, similarity, policy, rows)[order])


@settings(max_examples=100 // SHARE, deadline=None)
@given(cases())
def test_void_rows_change_nothing_for_the_others(
    case: tuple[Tensor, Tensor, Tensor, Policy, list[int]],
) -> None:
    ids, weights, similarity, policy, rows = case
    real = [t for t, row in enumerate(rows) if row != VOID]
    alone = mixture_of(ids[real], weights[real], similarity, policy, [rows[t] for t in real])
    assert torch.equal(mixture_of(ids, weights, similarity, policy, rows)[real], alone)


@settings(max_examples=200 // SHARE, deadline=None)
@given(cases(), st.lists(st.integers(0, 12), max_size=3))
def test_ranks_that_vote_together_route_as_one_batch(
    case: tuple[Tensor, Tensor, Tensor, Policy, list[int]], cuts: list[int]
) -> None:
    """Some ranks may have no row at all: they count nothing. Steps and active experts are of all
    rows, on every rank, but for those that other ranks' rows keep as there are too few; rows and
    slots add up."""
    ids, weights, similarity, policy, rows = case
    plan, kinds = plan_of(similarity, policy, ids.shape[1]), torch.tensor(rows, dtype=torch.int8)
    whole, real = new_counters(), (kinds != VOID)[:, None]
    expected = mixture(*reroute(ids, weights, plan, kinds, whole), len(similarity)) * real
    places = sorted(min(cut, len(rows)) for cut in cuts)
    ranks = list(zip([0, *places], [*places, len(rows)], strict=True))
    parts = [Batch(ids[a:b], weights[a:b].clone(), kinds[a:b]) for a, b in ranks]
    spoken = [specified_vote(part, plan) for part in parts]
    votes = torch.stack(spoken).amin(0)
    for name, (vote, run_half) in HALVES.items():
        said = [vote(part, plan) for part in parts]
        assert all(map(torch.equal, said, spoken)), name
        counted = []
        for (a, b), part in zip(ranks, parts, strict=True):
            counters, own = new_counters(), part.weights.clone()
            new = run_half(part._replace(weights=own), plan, counters, votes)
            specified = route(part, plan, votes)
            assert torch.equal(new, specified.ids), name
            assert torch.equal(own, specified.weights), name
            assert torch.equal(mixture(new, own, len(similarity)) * real[a:b], expected[a:b]), name
            assert torch.equal(counters[:2], whole[:2] * (b > a)), name
            assert counters[2] == specified.after * whole[0] * (b > a) <= whole[2], name
            counted.append(counters)
        assert torch.equal(torch.stack(counted).sum(0)[3:], whole[3:]), name


@settings(max_examples=60 // SHARE, deadline=None)
@given(cases())
def test_active_experts_are_counted_as_they_are(
    case: tuple[Tensor, Tensor, Tensor, Policy, list[int]],
) -> None:
    ids, weights, similarity, policy, rows = case
    E, kinds = similarity.shape[0], torch.tensor(rows, dtype=torch.int8)
    routing = route(Batch(ids, weights, kinds), plan_of(similarity, policy, ids.shape[1]))

    def distinct(given: Tensor) -> int:
        return len({e for e in given[kinds != VOID].flatten().tolist() if 0 <= e < E})

    assert (routing.before, routing.after) == (distinct(ids), distinct(routing.ids))


@settings(max_examples=60 // SHARE, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 20), st.floats(0, 1), st.floats(0, 1), st.booleans())
def test_larger_S_or_rho_never_reroutes_more(
    seed: int, T: int, rho: float, more: float, coarse: bool
) -> None:
    """With rho > 0 a larger S may re-route an expert that was critical, by giving it a nearer
    primary; what never grows with S is re-routed and critical together."""
    ids, weights, similarity = batch(seed, T, 6, 32, coarse=coarse)

    def moved(S: int, rho: float) -> tuple[Tensor, Tensor]:
        routing = route(Batch(ids, weights), Plan.build(similarity, Policy(S=S, rho=rho), K=6))
        return routing.ids != ids, routing.critical

    low, high = sorted((rho, more))
    for S in range(1, 6):
        assert not (moved(S, high)[0] & ~moved(S, low)[0]).any()
        assert not (moved(S + 1, 0)[0] & ~moved(S, 0)[0]).any()
        (fewer, kept), (many, critical) = moved(S + 1, low), moved(S, low)
        assert not ((fewer | kept) & ~(many | critical)).any()


@pytest.mark.parametrize("E", [60, 64, 128, 896])
@pytest.mark.parametrize("K", [1, 4, 8, 16])
def test_model_sized_batches(E: int, K: int) -> None:
    ids, weights, similarity = batch(E * K, 8 if INTERPRETED else 32, K, E)
    policy = Policy(S=1, rho=0.5)
    defined = by_hand(ids, weights, similarity, policy, [FAST] * len(ids))
    assert run(ids, weights, similarity, policy).tolist() == defined.ids
    assert K == 1 or len(defined.primary) < ids.unique().numel()


# --- examples worked by hand (docs/method.md tells the story of the first) -----------------------

# Four experts; 3 is like 0 (0.9), 2 is like 1 (0.6), 2 is hardly like 0 (0.2).
SIMILARITY = torch.tensor(
    [
        [1.0, 0.3, 0.2, 0.9],
        [0.3, 1.0, 0.6, 0.1],
        [0.2, 0.6, 1.0, 0.4],
        [0.9, 0.1, 0.4, 1.0],
    ]
)
IDS = torch.tensor([[0, 3], [1, 2]], dtype=torch.int32)
WEIGHTS = torch.tensor([[0.7, 0.3], [0.8, 0.2]])


def test_secondaries_move_to_the_most_similar_primary() -> None:
    assert run(IDS, WEIGHTS, SIMILARITY, Policy(S=1)).tolist() == [[0, 1], [1, 0]]
    _, weights = reroute(IDS, WEIGHTS, Plan.build(SIMILARITY, Policy(S=1), K=2))
    assert torch.equal(weights, torch.tensor([[1.0, 0.0], [1.0, 0.0]]))


def test_a_secondary_below_rho_is_critical_and_stays() -> None:
    assert run(IDS, WEIGHTS, SIMILARITY, Policy(S=1, rho=0.7)).tolist() == [[0, 1], [1, 2]]


def test_similarity_equal_to_rho_moves() -> None:
    exactly = SIMILARITY[2, 1].item()
    assert run(IDS, WEIGHTS, SIMILARITY, Policy(S=1, rho=exactly)).tolist()[1] == [1, 0]


def test_with_rho_0_nothing_is_critical_even_where_all_similarities_are_negative() -> None:
    assert run(IDS, WEIGHTS, SIMILARITY - 2, Policy(S=1)).tolist() == [[0, 1], [1, 0]]
    assert run(IDS, WEIGHTS, SIMILARITY - 2, Policy(S=1, rho=1e-9)).tolist() == IDS.tolist()
    assert can_move(SIMILARITY - 2, Policy(S=1), K=2)


def test_a_quantile_spares_the_same_share_of_experts_whatever_the_scale() -> None:
    random = torch.Generator().manual_seed(0)
    similarity = torch.rand(9, 9, generator=random)
    for scaled in (similarity, 0.1 * similarity, 0.9 + 0.1 * similarity):
        for share, spared in [(0.0, 0), (0.3, 3), (0.5, 4), (0.99, 8)]:
            plan = Plan.build(scaled, Policy(S=1, rho_quantile=share), K=2)
            assert int((plan.neighbours == -1).all(1).sum()) == spared
    alone = Plan.build(torch.eye(1), Policy(S=1, rho_quantile=0.5), K=1)
    assert alone.neighbours.shape == (1, 0)


def test_top_s_is_by_weight_not_by_slot() -> None:
    flipped = run(IDS.flip(1), WEIGHTS.flip(1), SIMILARITY, Policy(S=1))
    assert flipped.tolist() == [[0, 1], [1, 0]]


def test_equal_weights_prefer_the_lower_slot() -> None:
    even = torch.full_like(WEIGHTS, 0.5)
    assert run(IDS.flip(1), even, SIMILARITY, Policy(S=1)).tolist() == [[3, 2], [2, 3]]


def test_equally_similar_primaries_prefer_the_lower_id() -> None:
    similarity = torch.full((4, 4), 0.5).fill_diagonal_(1)
    ids = torch.tensor([[3, 0], [2, 0]], dtype=torch.int32)
    assert run(ids, WEIGHTS, similarity, Policy(S=1)).tolist() == [[3, 2], [2, 3]]


def test_one_token_is_left_alone_by_default() -> None:
    ids, weights, similarity = batch(3, 1, 4, 32)
    assert torch.equal(run(ids, weights, similarity, Policy(S=1)), ids)
    fewer = run(ids, weights, similarity, Policy(S=1, min_active=1))
    assert torch.equal(fewer, ids)  # K distinct experts are what a row needs


def test_max_active_is_a_ceiling_on_primaries() -> None:
    ids, weights, similarity = batch(5, 32, 4, 128)
    tops = [
        run(ids, weights, similarity, Policy(S=3, max_active=m)).unique().numel()
        for m in (128, 60, 40)
    ]
    assert tops[0] > 60 >= tops[1] > 40 >= tops[2]


def test_exact_rows_are_untouched_and_free_primaries() -> None:
    ids = torch.tensor([[0, 3], [2, 1]], dtype=torch.int32)
    new = run(ids, WEIGHTS, SIMILARITY, Policy(S=1, min_active=1), [FAST, EXACT])
    assert new.tolist() == [[0, 1], [2, 1]]
    ids = torch.tensor([[0, 3], [3, 1]], dtype=torch.int32)
    assert torch.equal(run(ids, WEIGHTS, SIMILARITY, Policy(S=1), [FAST, EXACT]), ids)


def test_void_rows_name_no_expert_of_their_own() -> None:
    ids = torch.tensor([[0, 1], [2, 3], [-1, -1]], dtype=torch.int32)
    new = run(ids, torch.rand(3, 2) + 0.1, SIMILARITY, Policy(S=1), [FAST, VOID, VOID])
    assert new.tolist() == [[0, 1], [1, 0], [-1, -1]]


def test_a_row_that_keeps_some_adds_its_own_best_experts_and_no_others() -> None:
    ids, weights, similarity = batch(11, 16, 4, 32)
    policy = Policy(S=1, min_active=1)
    rows = [keeping(3), *[FAST] * 15]
    new = run(ids, weights, similarity, policy, rows)
    best = ids[0][weights[0].argsort(descending=True)]
    assert torch.equal(new[0][weights[0].argsort(descending=True)][:3], best[:3])
    primary = {int(row[w.argmax()]) for row, w in zip(ids, weights, strict=True)}
    assert set(new.flatten().tolist()) == primary | set(best[:3].tolist())
    as_exact = run(ids, weights, similarity, policy, [keeping(4), *rows[1:]])
    assert torch.equal(as_exact, run(ids, weights, similarity, policy, [EXACT, *rows[1:]]))
    as_fast = run(ids, weights, similarity, policy, [keeping(1), *rows[1:]])
    assert torch.equal(as_fast, run(ids, weights, similarity, policy))


def test_a_batch_of_void_rows_is_left_alone() -> None:
    ids, weights, similarity = batch(1, 8, 4, 32)
    assert torch.equal(run(ids, weights, similarity, Policy(S=1), [VOID] * 8), ids)


def test_foreign_ids_stay_and_do_not_use_up_ranks() -> None:
    ids = torch.tensor([[4, 0, 3], [-1, 1, 2]], dtype=torch.int32)
    weights = torch.tensor([[1.0, 0.7, 0.3], [0.9, 0.8, 0.2]])
    new = run(ids, weights, SIMILARITY, Policy(S=1, min_active=1))
    assert new.tolist() == [[4, 0, 1], [-1, 1, 0]]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.int16])
def test_dtype_and_shape_are_kept_and_input_is_not_written(dtype: torch.dtype) -> None:
    ids, weights, similarity = batch(2, 9, 4, 32)
    ids = ids.to(dtype)
    kept, kept_weights = ids.clone(), weights.clone()
    new = run(ids, weights, similarity, Policy(S=1))
    assert (new.dtype, new.shape) == (dtype, ids.shape)
    assert not torch.equal(new, ids) and new.is_contiguous()
    assert torch.equal(ids, kept) and torch.equal(weights, kept_weights)


def test_no_rows() -> None:
    ids, weights, similarity = batch(0, 0, 4, 8)
    assert run(ids, weights, similarity, Policy(S=1)).shape == (0, 4)


@pytest.mark.parametrize(
    "policy", [Policy(S=4), Policy(S=1, rho=1.5)], ids=["S>=K", "rho above every similarity"]
)
def test_switched_off_is_identity(policy: Policy) -> None:
    ids, weights, similarity = batch(7, 32, 4, 32)
    assert torch.equal(run(ids, weights, similarity, policy), ids)
    assert torch.equal(reroute(ids, weights, Plan.off(32))[0], ids)


def test_non_contiguous_input() -> None:
    ids, weights, similarity = batch(8, 16, 4, 32)
    strided = torch.stack([ids, ids], dim=-1)[..., 0]
    assert not strided.is_contiguous()
    assert torch.equal(
        run(strided, weights, similarity, Policy(S=1)), run(ids, weights, similarity, Policy(S=1))
    )


def test_a_plan_is_overwritten_in_place() -> None:
    ids, weights, similarity = batch(9, 16, 4, 32)
    plan = Plan.off(32)
    held = plan.neighbours.data_ptr()
    plan.copy_(Plan.build(similarity, Policy(S=1), K=4))
    assert plan.neighbours.data_ptr() == held
    assert torch.equal(reroute(ids, weights, plan)[0], run(ids, weights, similarity, Policy(S=1)))


def test_counters_tell_what_happened() -> None:
    plan = Plan.build(SIMILARITY, Policy(S=1, rho=0.7), K=2)
    counters = new_counters()
    ids = torch.cat([IDS, torch.tensor([[-1, -1]], dtype=torch.int32)])
    weights = torch.cat([WEIGHTS, torch.zeros(1, 2)])
    rows = torch.tensor([FAST, FAST, VOID], dtype=torch.int8)
    for _ in range(2):
        reroute(ids, weights, plan, rows, counters)
    reroute(ids, weights, plan, torch.full_like(rows, VOID), counters)
    reroute(ids, weights, plan, torch.full_like(rows, EXACT), counters)
    reroute(ids, weights, Plan.off(4), rows, counters)
    assert dict(zip(COUNTERS, counters.tolist(), strict=True)) == {
        "steps": 2,
        "active_before": 8,
        "active_after": 6,
        "slots_rerouted": 2,
        "slots_critical": 2,
        "rows_fast": 4,
        "rows_exact": 3,
        "rows_void": 5,
        "rows_independent": 0,
    }


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("ids", "weights"),
    [
        *((of, torch.float32) for of in (torch.uint8, torch.uint16, torch.uint32, torch.int8)),
        (torch.float32, torch.int32),
        (torch.int32, torch.int32),
    ],
)
def test_types_that_it_does_not_take_are_refused_in_one_sentence(
    ids: torch.dtype, weights: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before an implementation is chosen, hence by all of them alike."""
    monkeypatch.setattr(kernels, "implementation_for", None)
    slots = [torch.zeros(3, 2, dtype=of, device=device) for of in (ids, weights)]
    sentence = f"topk_ids {ids}, topk_weights {weights}: expected ids of int16, int32, int64 and"
    for ask in (reroute, kernels.vote):
        with pytest.raises(ValueError, match=sentence):
            ask(*slots, Plan.off(8, device))


def test_shapes_that_do_not_fit_are_named() -> None:
    ids, weights, similarity = batch(0, 4, 2, 8)
    plan = Plan.build(similarity, Policy(S=1), K=2)
    with pytest.raises(ValueError, match=r"\[4, 2\].*\[3, 2\]"):
        reroute(ids, weights[:3], plan)
    with pytest.raises(ValueError, match="swapped"):
        reroute(weights, ids, plan)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"rows \[3\]"):
        reroute(ids, weights, plan, torch.ones(3, dtype=torch.int8))
