"""The specification for GPUs in Triton: one launch for decode-sized batches.

Batches too large for one program take three launches: a fill, the votes of many programs, and
their slots. Ranks that share their votes take the same, with their exchange in between.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from sere.kernels.batch import Batch
from sere.kernels.plan import Plan
from sere.kernels.reference import NEVER
from sere.kernels.triton_programs import _all_at_once, _decide_and_move, _vote

ONE_PROGRAM = 2**17
"""Up to how many comparisons of a slot with an expert one program does it all."""
TILE = 4096
"""Elements of the largest tensor that a program holds in registers, the votes' apart."""
THREADS = 256


def run(batch: Batch, plan: Plan, counters: Tensor | None, votes: Tensor | None = None) -> Tensor:
    """New ids [T, K] (see `sere.kernels.reference.run`); all tensors on one GPU."""
    T, K = batch.ids.shape
    out = torch.empty((T, K), dtype=batch.ids.dtype, device=batch.ids.device)
    if T == 0 or K == 0:
        return out
    sizes = _sizes(plan.num_experts, K)
    _prepare(batch, plan, counters)
    arguments = _arguments(batch)
    decision = (plan.neighbours, plan.errors, plan.scales, plan.settings, plan.pool, out, counters)
    if votes is None and T * sizes["K_PADDED"] * sizes["E_PADDED"] <= ONE_PROGRAM:
        _all_at_once[(1,)](*arguments, *decision, **sizes)
        return out
    if votes is None:
        votes = vote(batch, plan)
    elif counters is not None:
        votes = votes.clone()  # programs tell each other what they counted
    share, grid = _split(T, sizes["ROWS"])
    _decide_and_move[grid](*arguments, votes, share, *decision, **sizes)
    return out


def vote(batch: Batch, plan: Plan) -> Tensor:
    """[2 E + 1] int32 (see `sere.kernels.reference.vote`); all tensors on one GPU."""
    (T, K), E = batch.ids.shape, plan.num_experts
    votes = torch.full((2 * E + 1,), NEVER, dtype=torch.int32, device=batch.ids.device)
    if T and K:
        sizes = _sizes(E, K)
        share, grid = _split(T, sizes["ROWS"])
        _vote[grid](*_arguments(batch), votes, share, plan.settings, plan.pool, **sizes)
    return votes


_PREPARED = set[tuple[object, ...]]()


def _prepare(batch: Batch, plan: Plan, counters: Tensor | None) -> None:
    """Compile every form of the kernel when the first is needed, which is at start-up: a batch of
    another size later compiles nothing while requests wait."""
    ids, weights, rows = batch
    E, K = plan.num_experts, ids.shape[1]
    slots = ids.stride(1), weights.stride(1)
    given = rows is None, counters is None
    key = (ids.device, E, K, ids.dtype, weights.dtype, slots, given)
    if key in _PREPARED:
        return
    _PREPARED.add(key)
    sizes, grid, votes = _sizes(E, K), (1,), torch.int32
    arguments = _arguments(batch)
    decision = (plan.neighbours, plan.errors, plan.scales, plan.settings, plan.pool, ids, counters)
    _all_at_once.warmup(*arguments, *decision, grid=grid, **sizes)
    _vote.warmup(*arguments, votes, 1, plan.settings, plan.pool, grid=grid, **sizes)
    _decide_and_move.warmup(*arguments, votes, 1, *decision, grid=grid, **sizes)


def _arguments(batch: Batch) -> tuple[object, ...]:
    """The arguments of every program that are the batch."""
    ids, weights, rows = batch
    return (ids, *ids.stride(), weights, *weights.stride(), rows, len(ids))


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
