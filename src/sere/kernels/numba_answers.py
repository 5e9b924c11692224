"""`sere.kernels.answers` as loops for CPUs: expert after expert, so that each map is read once."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from sere.kernels.numba_rows import VOID, compiled


def keep_freed_(weights: Tensor, ids: Tensor, new_ids: Tensor, rows: Tensor, rank: Tensor) -> None:
    """See `sere.kernels.answers.keep_freed_`."""
    _keep_freed(weights.numpy(), ids.numpy(), new_ids.numpy(), rows.numpy(), rank.numpy())


def ask(
    hidden: Tensor, ids: Tensor, weights: Tensor, down: Tensor, centre: Tensor, rank: Tensor
) -> Tensor:
    """See `sere.kernels.answers.ask`."""
    inner = torch.empty(*ids.shape, down.shape[1], dtype=torch.float32)
    given = (ids, weights, _bits(down), centre, rank, inner)
    _ask(hidden.float().numpy(), *(tensor.numpy() for tensor in given))
    return inner


def answer_(
    output: Tensor, ids: Tensor, weights: Tensor, inner: Tensor, up: Tensor, constant: Tensor
) -> None:
    """See `sere.kernels.answers.answer_`."""
    wide = output.float()  # what it is where it is that; other types come back as they went
    given = (ids, weights, inner, _bits(up), constant)
    _answer(wide.numpy(), *(tensor.numpy() for tensor in given))
    if wide is not output:
        output.copy_(wide)


def _bits(maps: Tensor) -> Tensor:
    """bfloat16, which numpy does not know, as its bits."""
    return maps.view(torch.int16)


@compiled
def _keep_freed(weights: Any, ids: Any, new_ids: Any, rows: Any, rank: Any) -> None:
    for t in range(ids.shape[0]):
        for k in range(ids.shape[1]):
            gone = rank[0] >= 0 and rows[t] != VOID
            for other in range(ids.shape[1]):
                gone &= new_ids[t, other] != ids[t, k]
            if not gone:
                weights[t, k] = 0


@compiled
def _by_expert(ids: Any, weights: Any, E: int) -> tuple[Any, Any]:
    """Where each expert's freed slots begin [E + 1], and the slots one after the other."""
    K = ids.shape[1]
    begins = np.zeros(E + 1, np.int64)
    for t in range(ids.shape[0]):
        for k in range(K):
            if weights[t, k] != 0:
                begins[ids[t, k] + 1] += 1
    for u in range(E):
        begins[u + 1] += begins[u]
    slots, at = np.empty(begins[E], np.int64), begins.copy()
    for t in range(ids.shape[0]):
        for k in range(K):
            if weights[t, k] != 0:
                slots[at[ids[t, k]]] = t * K + k
                at[ids[t, k]] += 1
    return begins, slots


@compiled
def _widened(bits: Any, row: Any) -> None:
    """A row of bfloat16 as the upper halves of float32."""
    for h in range(len(bits)):
        row[h] = np.int32(bits[h]) << 16


@compiled(fastmath={"reassoc", "contract"})
def _ask(
    hidden: Any,  # [T, H or more]
    ids: Any,  # [T, K]
    weights: Any,  # [T, K]
    down: Any,  # [E, R, H] bits
    centre: Any,  # [E, R]
    rank: Any,  # [1]
    inner: Any,  # [T, K, R], written
) -> None:
    E, R, H = down.shape
    K = ids.shape[1]
    begins, slots = _by_expert(ids, weights, E)
    row = np.empty(H, np.int32)
    wide = row.view(np.float32)
    for u in range(E):
        mine = slots[begins[u] : begins[u + 1]]
        for r in range(R if len(mine) else 0):
            _widened(down[u, r], row)
            for slot in mine:
                t, k = slot // K, slot % K
                if r >= rank[0]:
                    inner[t, k, r] = 0
                    continue
                x = hidden[t]
                total = np.float32(0)
                for h in range(H):
                    total += wide[h] * x[h]
                inner[t, k, r] = weights[t, k] * (total - centre[u, r])


@compiled(fastmath={"reassoc", "contract"})
def _answer(
    output: Any,  # [T, H or more], added to
    ids: Any,  # [T, K]
    weights: Any,  # [T, K]
    inner: Any,  # [T, K, R]
    up: Any,  # [E, R, H] bits
    constant: Any,  # [E, H]
) -> None:
    E, R, H = up.shape
    K = ids.shape[1]
    begins, slots = _by_expert(ids, weights, E)
    row = np.empty(H, np.int32)
    wide = row.view(np.float32)
    for u in range(E):
        mine = slots[begins[u] : begins[u + 1]]
        for slot in mine:
            y, w = output[slot // K], weights[slot // K, slot % K]
            for h in range(H):
                y[h] += w * constant[u, h]
        for r in range(R if len(mine) else 0):
            _widened(up[u, r], row)
            for slot in mine:
                y, w = output[slot // K], inner[slot // K, slot % K, r]
                for h in range(H):
                    y[h] += w * wide[h]
