"""One launch from a router's logits to re-routed slots: softmax, top-k and the operator together.

An experiment for decode batches (T <= 64) that nothing serves yet: it has to be measured first
(`bench_reroute.py`, beside vLLM's `topk_softmax` followed by the operator). `chosen` and
`specification` say in plain PyTorch what it computes.

Rows are chosen for by many programs, as in vLLM's kernel. The operator needs all rows before it can
move the first slot, but only one program need wait for them: the last to arrive goes on as the
operator's one-launch form. Nobody spins, so that any number of programs may be resident.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sere.kernels import Batch, Plan, RowClass, reference
from sere.kernels.triton_kernel import _sizes
from sere.kernels.triton_programs import _all_at_once, launched
from sere.kernels.triton_votes import VOID

MAX_T = 64
_TAKEN = tl.constexpr(2**31 - 1)  # above every gap


def chosen(
    logits: Tensor, K: int, *, renormalize: bool, rows: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Weights [T, K] float32 and ids [T, K] int32 of a router with softmax, as on vLLM's GPUs.

    logits: [T, E] float32, bfloat16 or float16. rows: [T] row classes; VOID rows get the id -1, as
        vLLM gives padding.

    Slots are in order of the logits, the largest first; ties: lower expert first. Two logits tie if
    they are equally far below the row's largest in float32, which any machine decides alike; vLLM
    compares their softmax, which may round two different logits to one value. A row without a
    softmax (one with NaN or +inf, or nothing but -inf) chooses the first K experts with weight 0.
    """
    gap = logits.float().amax(1, keepdim=True) - logits.float()
    scores = torch.softmax(logits.float(), dim=1)
    broken = scores.isnan().any(1, keepdim=True)
    gap, scores = gap.masked_fill(broken, 0), scores.masked_fill(broken, 0)
    ids = torch.sort(gap, dim=1, stable=True).indices[:, :K]
    weights = scores.gather(1, ids)
    if renormalize:
        total = weights.sum(1, keepdim=True)
        weights = weights / torch.where(total > 0, total, 1)
    if rows is not None:
        ids = ids.masked_fill((rows == RowClass.VOID)[:, None], -1)
    return weights, ids.to(torch.int32)


def specification(
    logits: Tensor,
    K: int,
    plan: Plan,
    rows: Tensor | None,
    counters: Tensor | None,
    *,
    renormalize: bool,
) -> tuple[Tensor, Tensor]:
    """Weights and ids [T, K]: `chosen`, then the operator's specification."""
    weights, ids = chosen(logits, K, renormalize=renormalize, rows=rows)
    return weights, reference.run(Batch(ids, weights, rows), plan, counters)


def run(
    logits: Tensor,
    K: int,
    plan: Plan,
    rows: Tensor | None,
    counters: Tensor | None,
    *,
    renormalize: bool,
    arrived: Tensor,
) -> tuple[Tensor, Tensor]:
    """`specification` in one launch, for T <= MAX_T; weights are those of this kernel's softmax.

    arrived: [1] int32, 0 before and after; launches that may overlap need one each.
    """
    T, E = logits.shape
    if T > MAX_T:
        raise ValueError(f"T={T}: the fused kernel goes to T={MAX_T}; re-route after the top-k")
    weights, ids = _empty(logits, K)
    out = torch.empty_like(ids)
    if T > 0:
        compiled = sizes(E, K)
        _fused[(triton.cdiv(T, compiled["CHOOSING"]),)](
            *(logits, logits.stride(0), renormalize, ids, weights, rows, T, arrived),
            *(plan.neighbours, plan.errors, plan.scales, plan.settings, plan.pool, out, counters),
            **compiled,
        )
    return weights, out


def choose(
    logits: Tensor, K: int, rows: Tensor | None, *, renormalize: bool
) -> tuple[Tensor, Tensor]:
    """`chosen` in one launch, for any T: what `run` does before it re-routes."""
    T, E = logits.shape
    weights, ids = _empty(logits, K)
    if T > 0:
        compiled = sizes(E, K)
        _choose[(triton.cdiv(T, compiled["CHOOSING"]),)](
            *(logits, logits.stride(0), renormalize, ids, weights, rows, T),
            **{name: compiled[name] for name in _choose.arg_names if name in compiled},
            **{name: compiled[name] for name in ("num_warps", "enable_fp_fusion")},
        )
    return weights, ids


def _empty(logits: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """Memory for weights and ids."""
    if logits.stride(1) != 1:
        raise ValueError(f"logits with strides {logits.stride()}: expected rows without gaps")
    weights = torch.empty((len(logits), K), dtype=torch.float32, device=logits.device)
    return weights, torch.empty_like(weights, dtype=torch.int32)


def sizes(E: int, K: int) -> dict[str, int]:
    """Compile-time sizes: the operator's, and for how many rows a program chooses."""
    operator = _sizes(E, K)
    return {**operator, "CHOOSING": min(8, max(1, 1024 // operator["E_PADDED"]))}


@launched
def _fused(
    logits, logits_row, renormalize, ids, weights, rows, T, arrived,
    neighbours, errors, scales, settings, pool, out, counters,
    E: tl.constexpr, K: tl.constexpr, E_PADDED: tl.constexpr, K_PADDED: tl.constexpr,
    ROWS: tl.constexpr, LISTED: tl.constexpr, CHOOSING: tl.constexpr,
):  # fmt: skip
    _choose(
        logits, logits_row, renormalize, ids, weights, rows, T, E, K, E_PADDED, K_PADDED, CHOOSING
    )
    tl.debug_barrier()  # one thread says "done" for all of this program's
    if tl.atomic_add(arrived, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        tl.store(arrived, 0)
        _all_at_once(
            ids, K, 1, weights, K, 1, rows, T,
            neighbours, errors, scales, settings, pool, out, counters,
            E, K, E_PADDED, K_PADDED, ROWS, LISTED,
        )  # fmt: skip


@launched
def _choose(
    logits, logits_row, renormalize, ids, weights, rows, T,
    E: tl.constexpr, K: tl.constexpr, E_PADDED: tl.constexpr, K_PADDED: tl.constexpr,
    CHOOSING: tl.constexpr,
):  # fmt: skip
    """Softmax and top-k of this program's rows."""
    t = tl.program_id(0) * CHOOSING + tl.arange(0, CHOOSING)
    e, k = tl.arange(0, E_PADDED), tl.arange(0, K_PADDED)
    at = logits + t.to(tl.int64)[:, None] * logits_row + e[None, :]
    logit = tl.load(at, mask=(t < T)[:, None] & (e < E)[None, :], other=float("-inf"))
    logit = logit.to(tl.float32)
    gap = tl.abs(tl.max(logit, 1)[:, None] - logit)  # no -0.0
    total = tl.sum(tl.exp(-gap), 1)[:, None]
    broken = total != total  # NaN
    # Positive floats are in order of their bits, and whole numbers have a fast minimum.
    left = tl.where(broken, 0.0, gap).to(tl.int32, bitcast=True)
    best = tl.zeros([CHOOSING, K_PADDED], tl.int32)
    expert = tl.zeros([CHOOSING, K_PADDED], tl.int32)
    for slot in range(K):
        least = tl.min(left, 1)[:, None]
        first = tl.min(tl.where(left == least, e[None, :], E_PADDED), 1)[:, None]
        best = tl.where(k[None, :] == slot, least, best)
        expert = tl.where(k[None, :] == slot, first, expert)
        left = tl.where(e[None, :] == first, _TAKEN, left)

    weight = tl.exp(-best.to(tl.float32, bitcast=True)) / total
    weight = tl.where(broken | (k >= K)[None, :], 0.0, weight)
    if renormalize:
        sum_ = tl.sum(weight, 1)
        weight /= tl.where(sum_ > 0, sum_, 1.0)[:, None]
    if rows is not None:
        kind = tl.load(rows + t, mask=t < T, other=0)
        expert = tl.where((kind == VOID)[:, None], -1, expert)
    at = t[:, None] * K + k[None, :]
    inside = (t < T)[:, None] & (k < K)[None, :]
    tl.store(ids + at, expert, mask=inside)
    tl.store(weights + at, weight, mask=inside)
