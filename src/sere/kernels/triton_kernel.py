"""The specification for GPUs in Triton: one launch for decode-sized batches.

Batches too large for one program take three launches: a fill, the votes of many programs, and
their slots. Ranks that share their votes take the same, with their exchange in between.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from sere.kernels.plan import Plan
from sere.kernels.reference import NEVER
from sere.kernels.triton_programs import _all_at_once, _decide_and_move, _vote

ONE_PROGRAM = 2**17
"""Up to how many comparisons of a slot with an expert one program does it all."""
TILE = 4096
"""Elements of the largest tensor that a program holds in registers, the votes' apart."""
THREADS = 256


def run(
    topk_ids: Tensor,
    topk_weights: Tensor,
    plan: Plan,
    rows: Tensor | None,
    counters: Tensor | None,
    votes: Tensor | None = None,
) -> Tensor:
    """New ids [T, K] (see `sere.kernels.reference.run`); all tensors on one GPU."""
    T, K = topk_ids.shape
    out = torch.empty((T, K), dtype=topk_ids.dtype, device=topk_ids.device)
    if T == 0 or K == 0:
        return out
    sizes = _sizes(plan.num_experts, K)
    _prepare(topk_ids, topk_weights, plan, rows, counters)
    batch = _batch(topk_ids, topk_weights, rows)
    decision = (plan.neighbours, plan.errors, plan.scales, plan.settings, out, counters)
    if votes is None and T * sizes["K_PADDED"] * sizes["E_PADDED"] <= ONE_PROGRAM:
        _all_at_once[(1,)](*batch, *decision, **sizes)
        return out
    if votes is None:
        votes = vote(topk_ids, topk_weights, plan, rows)
    elif counters is not None:
        votes = votes.clone()  # programs tell each other what they counted
    share, grid = _split(T, sizes["ROWS"])
    _decide_and_move[grid](*batch, votes, share, *decision, **sizes)
    return out


def vote(topk_ids: Tensor, topk_weights: Tensor, plan: Plan, rows: Tensor | None) -> Tensor:
    """[2 E + 1] int32 (see `sere.kernels.reference.vote`); all tensors on one GPU."""
    (T, K), E = topk_ids.shape, plan.num_experts
    votes = torch.full((2 * E + 1,), NEVER, dtype=torch.int32, device=topk_ids.device)
    if T and K:
        sizes = _sizes(E, K)
        share, grid = _split(T, sizes["ROWS"])
        batch = _batch(topk_ids, topk_weights, rows)
        _vote[grid](*batch, votes, share, plan.settings, **sizes)
    return votes


_PREPARED = set[tuple[object, ...]]()


def _prepare(
    topk_ids: Tensor, topk_weights: Tensor, plan: Plan, rows: Tensor | None, counters: Tensor | None
) -> None:
    """Compile every form of the kernel when the first is needed, which is at start-up: a batch of
    another size later compiles nothing while requests wait."""
    E, K = plan.num_experts, topk_ids.shape[1]
    slots = topk_ids.stride(1), topk_weights.stride(1)
    given = rows is None, counters is None
    key = (topk_ids.device, E, K, topk_ids.dtype, topk_weights.dtype, slots, given)
    if key in _PREPARED:
        return
    _PREPARED.add(key)
    sizes, grid, votes = _sizes(E, K), (1,), torch.int32
    batch = _batch(topk_ids, topk_weights, rows)
    decision = (plan.neighbours, plan.errors, plan.scales, plan.settings, topk_ids, counters)
    _all_at_once.warmup(*batch, *decision, grid=grid, **sizes)
    _vote.warmup(*batch, votes, 1, plan.settings, grid=grid, **sizes)
    _decide_and_move.warmup(*batch, votes, 1, *decision, grid=grid, **sizes)


def _batch(topk_ids: Tensor, topk_weights: Tensor, rows: Tensor | None) -> tuple[object, ...]:
    """The arguments of every program that are the batch."""
    ids = (topk_ids, topk_ids.stride(0), topk_ids.stride(1))
    return (*ids, topk_weights, *topk_weights.stride(), rows, topk_ids.shape[0])


def _split(T: int, rows: int) -> tuple[int, tuple[int]]:
    """How many rows each program of a large batch takes, and how many programs there are."""
    share = max(rows, triton.next_power_of_2(triton.cdiv(T, 64)))
    return share, (triton.cdiv(T, share),)


def _sizes(E: int, K: int) -> dict[str, int]:
    """Compile-time sizes; tensors in Triton have powers of two."""
    E_PADDED, K_PADDED = triton.next_power_of_2(E), triton.next_power_of_2(K)
    return {
        "E": E,
        "K": K,
        "E_PADDED": E_PADDED,
        "K_PADDED": K_PADDED,
        # A slot a thread takes hardly more instructions than 32 slots do, while registers last.
        "ROWS": max(1, (THREADS if E_PADDED <= 256 else TILE // E_PADDED) // K_PADDED),
        "LISTED": min(max(4, TILE // E_PADDED), triton.next_power_of_2(max(E - 1, 1))),
        "num_warps": THREADS // 32,
        "enable_fp_fusion": False,  # a scaled weight is rounded before it is added
    }
