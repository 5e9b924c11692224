"""The fused top-k and re-routing, in Triton's interpreter (run by test_kernels.py)."""

from __future__ import annotations

import math
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sere.kernels import Batch, Plan, new_counters, reference
from sere.kernels.plan import Substitution
from sere.policy import Policy

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import fused_topk

pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # inf - inf

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((60, 4), (128, 8), (8, 1), (5, 5))
CLOSE = {"rtol": 2e-6, "atol": 0.0}
"""Softmaxes in float32 may differ in their last bits: exponentials, and the order of the sum."""


def logits_of(seed: int, T: int, E: int, *, coarse: bool = False) -> Tensor:
    """coarse: few distinct values, so that ties are everywhere, and some -inf."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(T, E, generator=g) * 3
    if coarse:
        logits = logits.round().masked_fill(torch.rand(T, E, generator=g) < 0.1, -math.inf)
    return logits


def run(
    logits: Tensor, K: int, plan: Plan, rows: Tensor | None, *, renormalize: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, ids and counters."""
    counters, arrived = new_counters(), torch.zeros(1, dtype=torch.int32)
    weights, ids = fused_topk.run(
        logits, K, plan, rows, counters, renormalize=renormalize, arrived=arrived
    )
    assert arrived == 0  # ready for the next launch
    return weights, ids, counters


def choose(
    logits: Tensor, K: int, rows: Tensor | None = None, *, renormalize: bool = True
) -> tuple[Tensor, Tensor]:
    """Weights and ids of the top-k, by itself and before an operator that is switched off."""
    weights, ids = fused_topk.choose(logits, K, rows, renormalize=renormalize)
    off = run(logits, K, Plan.off(logits.shape[1]), rows, renormalize=renormalize)
    assert torch.equal(off[0], weights) and torch.equal(off[1], ids) and not off[2].any()
    return weights, ids


def plan_of(seed: int, E: int, K: int, policy: Policy) -> Plan:
    similarity = torch.rand(E, E, generator=torch.Generator().manual_seed(seed))
    losses = Substitution(similarity.T, similarity + 0.1)
    return Plan.build(similarity, policy, K=K, substitution=losses)


# --- softmax and top-k --------------------------------------------------------------------------


@pytest.mark.parametrize(("E", "K"), SHAPES)
@pytest.mark.parametrize("T", [1, 13, 64])
def test_chooses_by_the_definition(E: int, K: int, T: int) -> None:
    every = product((False, True), DTYPES, (False, True))
    each = zip((False, True, False), DTYPES, (True, False, False), strict=True)
    for coarse, dtype, renormalize in every if T == 13 else each:
        logits = logits_of(T, T, E, coarse=coarse).to(dtype)
        weights, ids = choose(logits, K, renormalize=renormalize)
        expected_weights, expected = fused_topk.chosen(logits, K, renormalize=renormalize)
        assert torch.equal(ids, expected)
        torch.testing.assert_close(weights, expected_weights, **CLOSE)
        for row, slots, carried in zip(
            logits.tolist(), ids.tolist(), weights.tolist(), strict=True
        ):
            assert slots == sorted(range(E), key=lambda e: (-row[e], e))[:K]
            shares = [math.exp(logit - max(row)) for logit in row]
            total = math.fsum(shares[e] for e in (slots if renormalize else range(E)))
            assert carried == pytest.approx([shares[e] / total for e in slots], rel=2e-6)


def test_chooses_what_torch_would() -> None:
    """Where no two different logits of a row round to one probability."""
    logits = logits_of(1, 64, 128).to(torch.bfloat16)
    order = torch.sort(torch.softmax(logits.float(), 1), descending=True, stable=True)
    weights, ids = choose(logits, 8, renormalize=False)
    assert torch.equal(ids, order.indices[:, :8].to(torch.int32))
    torch.testing.assert_close(weights, order.values[:, :8], **CLOSE)


@pytest.mark.parametrize("spoilt", [math.nan, math.inf])
def test_a_row_without_a_softmax_chooses_the_first_with_no_weight(spoilt: float) -> None:
    logits = logits_of(2, 9, 60)
    logits[3, 17] = spoilt
    logits[5] = -math.inf
    weights, ids = choose(logits, 4)
    for row in (3, 5):
        assert ids[row].tolist() == [0, 1, 2, 3]
        assert not weights[row].any()
    expected_weights, expected = fused_topk.chosen(logits, 4, renormalize=True)
    assert torch.equal(ids, expected)
    torch.testing.assert_close(weights, expected_weights, **CLOSE)


def test_a_negative_zero_ties_with_zero() -> None:
    logits = torch.full((1, 8), -1.0)
    logits[0, 3:5] = torch.tensor([-0.0, 0.0])
    assert choose(logits, 2)[1].tolist() == [[3, 4]]


def test_padding_gets_no_expert() -> None:
    rows = torch.tensor([1, 0, 2, 0, 5], dtype=torch.int8)
    _, ids = choose(logits_of(3, 5, 60), 4, rows)
    assert (ids[[1, 3]] == -1).all() and (ids[[0, 2, 4]] >= 0).all()


def test_rows_may_have_gaps_between_them_but_not_within() -> None:
    wide = logits_of(4, 10, 80)
    for part in (wide[::2, :60], wide[:, 20:]):
        assert torch.equal(choose(part, 4)[1], choose(part.clone(), 4)[1])
    with pytest.raises(ValueError, match=r"strides \(80, 2\)"):
        choose(wide[:, ::2], 4)


# --- and re-routing -----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(60))
def test_reroutes_as_the_operator(seed: int) -> None:
    """Every shape with every T and every policy. Bit for bit what the specification makes of the
    kernel's own top-k; without a tolerance, where the last bits of a weight decide nothing, of
    PyTorch's too."""
    (E, K), T = SHAPES[seed % 3], (1, 7, 20, 64)[seed % 4]
    policy = (
        Policy(S=1),
        Policy(S=1, rho=0.6, min_active=1),
        Policy(S=min(K, 2), max_active=min(E, K + 3)),
        Policy(S=1, tau=0.02),
        Policy(S=1, tau=0.001, max_active=min(E, K + 3)),
    )[seed % 5]
    plan, logits = plan_of(seed, E, K, policy), logits_of(seed, T, E, coarse=seed % 2 == 0)
    g = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, 6, (T,), generator=g).to(torch.int8) if seed % 7 else None

    weights, ids, counters = run(logits, K, plan, rows)
    expected_weights, chosen = fused_topk.choose(logits, K, rows, renormalize=True)
    counted = new_counters()
    expected = reference.run(Batch(chosen, expected_weights, rows), plan, counted)
    assert torch.equal(ids, expected)
    assert torch.equal(weights, expected_weights)
    assert torch.equal(counters, counted)
    if policy.tau is None:
        again = new_counters()
        near, same = fused_topk.specification(logits, K, plan, rows, again, renormalize=True)
        assert torch.equal(ids, same) and torch.equal(counters, again)
        torch.testing.assert_close(weights, near, **CLOSE)
    if T == 64 and K > 1 and policy == Policy(S=1):
        assert (ids != chosen).any()


def test_a_batch_of_void_rows_names_and_counts_nothing() -> None:
    rows = torch.zeros(20, dtype=torch.int8)
    _, ids, counters = run(logits_of(5, 20, 60), 4, plan_of(5, 60, 4, Policy(S=1)), rows)
    assert (ids == -1).all()
    assert counters.tolist() == [0] * 7 + [20, 0]


def test_launches_share_one_ticket() -> None:
    """A captured graph is replayed with whatever the last replay left behind."""
    plan, counters = plan_of(6, 60, 4, Policy(S=1)), new_counters()
    arrived = torch.zeros(1, dtype=torch.int32)
    for seed in range(3):
        logits = logits_of(seed, 20, 60)
        _, ids = fused_topk.run(logits, 4, plan, None, counters, renormalize=True, arrived=arrived)
        _, expected = fused_topk.specification(logits, 4, plan, None, None, renormalize=True)
        assert torch.equal(ids, expected)
    assert counters[0] == 3


def test_no_rows_and_too_many() -> None:
    plan = Plan.off(60)
    weights, ids, _ = run(torch.empty(0, 60), 4, plan, None)
    assert weights.shape == ids.shape == (0, 4)
    with pytest.raises(ValueError, match="T=65: the fused kernel goes to T=64"):
        run(logits_of(0, 65, 60), 4, plan, None)
