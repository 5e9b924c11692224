"""Re-routed batches in vLLM's own code that sorts slots by expert: no row reads another's slots.

Rows name distinct experts (rule 9 of the specification), as that code takes for granted. It is no
part of vLLM's CPU wheel: `make cuda-import` runs this on the CUDA builds.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from sere import Plan, Policy, RowClass, reroute
from tests.serving.expert_kernels_script import RESULT

SHAPES = {  # name -> E, K, T, S: gpt-oss on Hopper has K = 4; 6 and 10 are no powers of two
    "two rows": (32, 4, 2, 1),
    "K=4": (32, 4, 40, 1),
    "gpt-oss": (128, 4, 70, 2),
    "K=8": (64, 8, 36, 2),
    "K=6": (64, 6, 33, 2),
    "K=10": (128, 10, 16, 3),
}

pytestmark = pytest.mark.skipif(
    find_spec("vllm.third_party.triton_kernels") is None,
    reason="this build of vLLM has no triton_kernels: run `make cuda-import`",
)


@dataclass(frozen=True)
class Batch:
    """before, after: [T, K] ids; weights: [T, K] after re-routing."""

    E: int
    before: Tensor
    after: Tensor
    weights: Tensor

    def as_it_was(self) -> Tensor:
        """[T, K] ids under the rule before: what is freed now named its row's stand-in twice."""
        carrier = self.weights.argmax(1, keepdim=True)
        return torch.where(self.weights == 0, self.after.gather(1, carrier), self.after)


@cache
def rerouted(shape: str) -> Batch:
    """The last row is exact: it must not notice its neighbours. Some experts are more in demand,
    else all would be somebody's best and nothing would move."""
    E, K, T, S = SHAPES[shape]
    random = torch.Generator().manual_seed(E + K + T)
    logits = torch.rand(T, E, generator=random) + 2 * torch.rand(E, generator=random)
    weights, ids = logits.softmax(1).topk(K)
    similarity = torch.rand(E, E, generator=random)
    rows = torch.full((T,), int(RowClass.FAST), dtype=torch.int8)
    rows[-1] = int(RowClass.EXACT)
    policy = Policy(S=S, rho=0.0, min_active=1)
    plan = Plan.build((similarity + similarity.T) / 2, policy, K=K)
    after, weights = reroute(ids.int(), weights, plan, rows)
    return Batch(E, ids.int(), after, weights)


@cache
def sorted_by_vllm() -> dict[tuple[str, str], Any]:
    """By shape, and "now" or "before": what `expert_kernels_script` prints."""
    asked, batches = [], []
    for shape in SHAPES:
        batch = rerouted(shape)
        for when, ids in (("now", batch.after), ("before", batch.as_it_was())):
            asked.append((shape, when))
            batches.append([batch.E, ids.tolist(), batch.weights.tolist()])
    run = subprocess.run(
        (sys.executable, "-m", "tests.serving.expert_kernels_script"),
        input=json.dumps(batches),
        capture_output=True,
        text=True,
    )
    for line in run.stdout.splitlines():
        if line.startswith(RESULT):
            return dict(zip(asked, json.loads(line.removeprefix(RESULT)), strict=True))
    raise AssertionError(run.stderr)


def misread(ids: Tensor, answer: Any) -> Tensor:
    """[T] whether a row's result holds a slot that is not its own, or what another expert made of
    its own."""
    sizes, slot_at, place_of = map(torch.tensor, answer)
    expert_at = torch.arange(len(sizes)).repeat_interleave(sizes)
    places = torch.full((len(slot_at),), -1)  # beyond the last expert's: no expert computes it
    places[: len(expert_at)] = expert_at
    slots = torch.arange(ids.numel())
    right = (slot_at[place_of] == slots) & (places[place_of] == ids.flatten())
    return ~right.view(ids.shape).all(1)


@pytest.mark.parametrize("shape", SHAPES)
def test_no_row_reads_what_is_not_its_own(shape: str) -> None:
    batch = rerouted(shape)
    assert torch.equal(batch.after[-1], batch.before[-1])
    assert not torch.equal(batch.after, batch.before)
    assert not misread(batch.after, sorted_by_vllm()[shape, "now"]).any()


def test_with_experts_named_twice_rows_would_read_others_slots() -> None:
    """Else the test above would say nothing. Rows that name each expert once are hit as well, exact
    ones among them."""
    hit = {}
    for shape in SHAPES:
        before = rerouted(shape).as_it_was()
        wrong = misread(before, sorted_by_vllm()[shape, "before"])
        assert wrong.any(), shape
        once = torch.tensor([len(set(row)) == len(row) for row in before.tolist()])
        hit[shape] = bool(wrong[once].any()), bool(wrong[-1])
    assert all(once for once, _ in hit.values()), hit
    assert any(exact for _, exact in hit.values()), hit
