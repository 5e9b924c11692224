"""After re-routing, slots of one row may name one expert: fold them into the first of them.

Exact in arithmetic (w1 E(x) + w2 E(x) = (w1 + w2) E(x)); the rounding of the sum may differ.
"""

from __future__ import annotations

import torch
from torch import Tensor


def merge_duplicates(topk_ids: Tensor, topk_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Each expert once per row; a freed slot has the id -1 and weight 0.

    topk_ids: [T, K] integer; negative ids are left alone. topk_weights: [T, K] floating point.
    Returns new tensors of the same shapes and dtypes. No host sync. For engines that skip -1.
    """
    same = topk_ids[:, :, None] == topk_ids[:, None, :]  # [T, slot, other slot]
    duplicate = same.tril(-1).any(2) & (topk_ids >= 0)
    folded = (topk_weights[:, None, :] * same).sum(2)
    weights = torch.where(topk_ids >= 0, folded, topk_weights).masked_fill(duplicate, 0)
    return topk_ids.masked_fill(duplicate, -1), weights.to(topk_weights.dtype)


def narrow(topk_ids: Tensor, topk_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Merge duplicates, then cut to K' = the most distinct experts of any row: [T, K'].

    For engines that cannot skip a slot: freed slots within K' name the row's first expert, with
    weight 0. K' depends on the data: one host sync, so not inside a captured graph.
    """
    if topk_ids.numel() == 0:
        return topk_ids, topk_weights
    ids, weights = merge_duplicates(topk_ids, topk_weights)
    freed = ids != topk_ids
    width = int((~freed).sum(1).max())
    order = freed.to(torch.int8).argsort(dim=1, stable=True)[:, :width]
    ids, weights = ids.gather(1, order), weights.gather(1, order)
    return torch.where(freed.gather(1, order), ids[:, :1], ids), weights
