"""`sere.kernels.answers` for GPUs in Triton. Slots of weight 0, and rows without a freed slot, end
their programs at once; nothing is asked of the host, so that graphs can hold it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sere.kernels.triton_votes import VOID

BLOCK = 512
"""Elements of a row that a program takes at a time."""


def keep_freed_(weights: Tensor, ids: Tensor, new_ids: Tensor, rows: Tensor, rank: Tensor) -> None:
    """See `sere.kernels.answers.keep_freed_`."""
    T, K = ids.shape
    if T:
        _keep_freed[(T,)](
            *(weights, ids, new_ids, new_ids.stride(0), new_ids.stride(1), rows, rank),
            K=K,
            K_PADDED=triton.next_power_of_2(K),
            num_warps=1,
        )


def ask(
    hidden: Tensor, ids: Tensor, weights: Tensor, down: Tensor, centre: Tensor, rank: Tensor
) -> Tensor:
    """See `sere.kernels.answers.ask`."""
    (T, K), (_, R, H) = ids.shape, down.shape
    inner = torch.empty(T, K, R, dtype=torch.float32, device=ids.device)
    if T and R:
        _ask[(T, K)](
            *(hidden, hidden.stride(0), ids, weights, down, centre, rank, inner),
            **_sizes(K, R, H),
        )
    return inner


def answer_(
    output: Tensor, ids: Tensor, weights: Tensor, inner: Tensor, up: Tensor, constant: Tensor
) -> None:
    """See `sere.kernels.answers.answer_`."""
    (T, K), (_, R, H) = ids.shape, up.shape
    if T:
        _answer[(T, triton.cdiv(H, BLOCK))](
            *(output, output.stride(0), ids, weights, inner, up, constant),
            K_PADDED=triton.next_power_of_2(K),
            **_sizes(K, R, H),
        )


def _sizes(K: int, R: int, H: int) -> dict[str, int]:
    return {"K": K, "R": R, "H": H, "R_PADDED": triton.next_power_of_2(max(R, 1)), "BLOCK": BLOCK}


@triton.jit
def _keep_freed(
    weights, ids, new_ids, new_row, new_slot, rows, rank, K: tl.constexpr, K_PADDED: tl.constexpr
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, K_PADDED)
    given = tl.load(ids + t * K + k, mask=k < K, other=-1).to(tl.int64)
    named = tl.load(new_ids + t * new_row + k * new_slot, mask=k < K, other=-1).to(tl.int64)
    still = tl.max((given[:, None] == named[None, :]).to(tl.int32), 1)
    asked = (tl.load(rows + t) != VOID).to(tl.int32) * (tl.load(rank) >= 0).to(tl.int32)
    tl.store(weights + t * K + k, 0.0, mask=(k < K) & (still >= asked))


@triton.jit
def _ask(
    hidden, hidden_row, ids, weights, down, centre, rank, inner,
    K: tl.constexpr, R: tl.constexpr, H: tl.constexpr, R_PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    t, k = tl.program_id(0).to(tl.int64), tl.program_id(1)
    weight = tl.load(weights + t * K + k)
    if weight != 0:
        u = tl.load(ids + t * K + k).to(tl.int64)
        r, h = tl.arange(0, R_PADDED), tl.arange(0, BLOCK)
        total = tl.zeros([R_PADDED], tl.float32)
        for begin in range(0, H, BLOCK):
            at = begin + h
            x = tl.load(hidden + t * hidden_row + at, mask=at < H, other=0).to(tl.float32)
            there = (r < R)[:, None] & (at < H)[None, :]
            part = tl.load(down + (u * R + r)[:, None] * H + at[None, :], mask=there, other=0)
            total += tl.sum(part.to(tl.float32) * x[None, :], 1)
        total = weight * (total - tl.load(centre + u * R + r, mask=r < R, other=0))
        total = tl.where(r < tl.load(rank), total, 0)
        tl.store(inner + (t * K + k) * R + r, total, mask=r < R)


@triton.jit
def _answer(
    output, output_row, ids, weights, inner, up, constant,
    K: tl.constexpr, R: tl.constexpr, H: tl.constexpr, R_PADDED: tl.constexpr, BLOCK: tl.constexpr,
    K_PADDED: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    slots = tl.arange(0, K_PADDED)
    asked = tl.load(weights + t * K + slots, mask=slots < K, other=0.0) != 0
    if tl.max(asked.to(tl.int32)) > 0:
        r, h = tl.arange(0, R_PADDED), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        there = (r < R)[:, None] & (h < H)[None, :]
        place = output + t * output_row + h
        total = tl.zeros([BLOCK], tl.float32)
        for k in range(K):
            weight = tl.load(weights + t * K + k)
            if weight != 0:
                u = tl.load(ids + t * K + k).to(tl.int64)
                total += weight * tl.load(constant + u * H + h, mask=h < H, other=0)
                given = tl.load(inner + (t * K + k) * R + r, mask=r < R, other=0)
                part = tl.load(up + (u * R + r)[:, None] * H + h[None, :], mask=there, other=0)
                total += tl.sum(part.to(tl.float32) * given[:, None], 0)
        whole = tl.load(place, mask=h < H, other=0).to(tl.float32) + total
        tl.store(place, whole.to(output.dtype.element_ty), mask=h < H)
