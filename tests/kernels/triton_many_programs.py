"""Triton's form for large batches, in the interpreter (run by test_kernels.py)."""

from __future__ import annotations

import pytest
import torch

from sere.kernels import Batch, new_counters, triton_kernel
from sere.kernels.reference import run as specification
from sere.policy import Policy
from tests.kernels.test_reroute import batch, plan_of


@pytest.mark.parametrize(("E", "K", "T"), [(8, 4, 5), (32, 4, 70), (60, 4, 33), (33, 3, 1)])
@pytest.mark.parametrize(
    "policy",
    [
        Policy(S=1),
        Policy(S=1, rho=0.5, min_active=1),
        Policy(S=1, tau=0.05, min_active=1),
        Policy(S=0, pool=0.625, tau=0.05),
    ],
)
def test_many_programs(
    E: int, K: int, T: int, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All in one go, and given the votes, which are left as they are."""
    monkeypatch.setattr(triton_kernel, "ONE_PROGRAM", 0)
    ids, weights, similarity = batch(T, T, K, E, coarse=True)
    ids, weights = ids.masked_fill(weights == 0.5, -1), weights.masked_fill(weights == 0.75, 0)
    rows, plan = torch.arange(T).remainder(4).to(torch.int8) - 1, plan_of(similarity, policy, K)
    short = torch.zeros_like(rows).index_fill_(0, torch.tensor([T // 2]), 1)  # of experts
    for classes in (rows, torch.zeros_like(rows), short, None):
        votes = triton_kernel.vote(Batch(ids, weights, classes), plan)
        for given in (None, votes, votes):
            mine, theirs = new_counters(), new_counters()
            own, carried = weights.clone(), weights.clone()
            assert torch.equal(
                triton_kernel.run(Batch(ids, own, classes), plan, mine, given),
                specification(Batch(ids, carried, classes), plan, theirs, given),
            )
            assert torch.equal(own, carried)
            assert torch.equal(mine, theirs)
