"""Re-routed batches in vLLM's own code that sorts slots by expert: no row reads another's slots.

Rows name distinct experts (rule 9 of the specification), as that code takes for granted. Of it,
triton_kernels is no part of vLLM's CPU wheel: `make cuda-import` runs this on the CUDA builds.
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

needs_triton_kernels = pytest.mark.skipif(
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


@needs_triton_kernels
@pytest.mark.parametrize("shape", SHAPES)
def test_no_row_reads_what_is_not_its_own(shape: str) -> None:
    batch = rerouted(shape)
    assert torch.equal(batch.after[-1], batch.before[-1])
    assert not torch.equal(batch.after, batch.before)
    assert not misread(batch.after, sorted_by_vllm()[shape, "now"]).any()


@needs_triton_kernels
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


# --- what the CPU wheel has -----------------------------------------------------------------------

HIDDEN, INNER = 64, 32


@dataclass(frozen=True)
class Experts:
    """gate_up: [E, 2 * INNER, HIDDEN]; down: [E, HIDDEN, INNER]; both float32."""

    gate_up: Tensor
    down: Tensor

    def of(self, e: int, x: Tensor) -> Tensor:
        """Expert e's outputs [rows, HIDDEN], in the inputs' precision."""
        gate, up = (x @ self.gate_up[e].T.to(x.dtype)).chunk(2, dim=1)
        return (torch.nn.functional.silu(gate) * up) @ self.down[e].T.to(x.dtype)

    def mixed(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """[T, HIDDEN]: every slot by itself, in float64."""
        wide = [
            sum(w * self.of(e, row[None].double())[0] for e, w in zip(slots, shares, strict=True))
            for row, slots, shares in zip(x, ids.tolist(), weights.double(), strict=True)
        ]
        return torch.stack(wide).float()  # type: ignore[arg-type]


def experts_and_rows(batch: Batch) -> tuple[Experts, Tensor]:
    g = torch.Generator().manual_seed(batch.E)
    gate_up = torch.randn(batch.E, 2 * INNER, HIDDEN, generator=g) / HIDDEN**0.5
    down = torch.randn(batch.E, HIDDEN, INNER, generator=g) / INNER**0.5
    return Experts(gate_up, down), torch.randn(len(batch.after), HIDDEN, generator=g)


def in_expert_batches(batch: Batch, experts: Experts, x: Tensor, ids: Tensor) -> Tensor:
    """By vLLM's dispatch to batches by expert and its way back: the format of kernels behind
    low-latency transports."""
    import vllm.config  # noqa: F401 - the others cannot be imported before it
    from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig
    from vllm.model_executor.layers.fused_moe.prepare_finalize.batched import (
        BatchedPrepareAndFinalize,
    )
    from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import (
        TopKWeightAndReduceNaiveBatched,
    )

    way = BatchedPrepareAndFinalize(len(x), batch.E, num_dispatchers=1, rank=0)
    plain = FusedMoEQuantConfig.make()
    sent, _, told, *_ = way.prepare(x, batch.weights, ids, batch.E, None, False, plain)
    assert told.expert_num_tokens.tolist() == [int((ids == e).sum()) for e in range(batch.E)]
    made = torch.stack([experts.of(e, rows) for e, rows in enumerate(sent)])
    out = torch.full_like(x, torch.nan)
    way.finalize(out, made, batch.weights, ids, False, TopKWeightAndReduceNaiveBatched(0))
    return out


def in_the_cpu_kernel(batch: Batch, experts: Experts, x: Tensor, ids: Tensor) -> Tensor:
    """By the C++ kernel that serves on CPUs."""
    import vllm.config
    import vllm.platforms
    from vllm import _custom_ops as ops

    vllm.platforms.current_platform.import_kernels()
    if not hasattr(torch.ops._C, "cpu_fused_moe"):
        pytest.skip("this build of vLLM has no kernel for CPUs")
    packed = (ops.cpu_prepack_moe_weight(w, "vec") for w in (experts.gate_up, experts.down))
    out = torch.full_like(x, torch.nan)
    ops.cpu_fused_moe(out, x, *packed, None, None, batch.weights, ids, "silu", "vec")
    return out


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("way", [in_expert_batches, in_the_cpu_kernel])
def test_rows_get_their_own_experts_outputs(way: Any, shape: str) -> None:
    """Of the experts that they name, freed slots among them; and the exact row what it gets beside
    rows that were not re-routed, to the bit."""
    batch = rerouted(shape)
    assert (batch.weights == 0).any() and (batch.after != batch.before).any()
    experts, x = experts_and_rows(batch)
    out = way(batch, experts, x, batch.after)
    torch.testing.assert_close(
        out, experts.mixed(x, batch.after, batch.weights), rtol=1e-4, atol=1e-5
    )
    assert torch.equal(out[-1], way(batch, experts, x, batch.before)[-1])
