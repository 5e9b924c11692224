"""Which slots did the operator free? What a policy whose stand-ins are no experts needs to know.

Under such a plan every scale is 0: a secondary's slot carries nothing, wherever it points. The
weight that it had before is what its own expert's map is asked for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sere.kernels.reference import RowClass


def freed_weights(
    topk_ids: Tensor, topk_weights: Tensor, new_ids: Tensor, rows: Tensor | None = None
) -> Tensor:
    """[T, K], of the dtype of the weights: what the router gave to slots whose expert the row no
    longer names, under a plan that moves slots with scale 0; 0 for all other slots.

    topk_ids, topk_weights: [T, K], the router's choice. new_ids: [T, K], what `reroute` made of it.
    rows: [T] row classes; VOID rows carry nothing.
    """
    gone = (topk_ids[:, :, None] != new_ids[:, None, :]).all(2)
    if rows is not None:
        gone &= (rows != RowClass.VOID)[:, None]
    return torch.where(gone, topk_weights, torch.zeros_like(topk_weights))
