"""Triton's form for large batches, in the interpreter (run by test_kernels.py)."""

from __future__ import annotations

import pytest
import torch

from sere.kernels import Plan, new_counters, triton_kernel
from sere.kernels.reference import run as specification
from sere.policy import Policy
from tests.kernels.test_reroute import batch


@pytest.mark.parametrize(("E", "K", "T"), [(8, 2, 5), (32, 4, 70), (60, 4, 33), (33, 3, 1)])
@pytest.mark.parametrize("rho", [0.0, 0.5])
def test_many_programs(E: int, K: int, T: int, rho: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_kernel, "ONE_PROGRAM", 0)
    ids, weights, similarity = batch(T, T, K, E, coarse=True)
    ids, weights = ids.masked_fill(weights == 0.5, -1), weights.masked_fill(weights == 0.75, 0)
    rows = torch.arange(T).remainder(3).to(torch.int8)
    plan = Plan.build(similarity, Policy(S=1, rho=rho), K=K)
    for classes in (rows, torch.zeros_like(rows), None):
        mine, theirs = new_counters(), new_counters()
        own, specified = weights.clone(), weights.clone()
        assert torch.equal(
            triton_kernel.run(ids, own, plan, classes, mine),
            specification(ids, specified, plan, classes, theirs),
        )
        assert torch.equal(own, specified)
        assert torch.equal(mine, theirs)
