"""What linear maps add to a layer's output for experts that are not loaded: `y += w * (c_u + B_u
(A_u x - m_u))` for every freed slot of expert u. This module is the specification, in PyTorch.

Three steps, as the first is known before experts run, the second reads an input that their kernel
may overwrite, and the third writes its output. Sums are taken in float32 and rounded once, in an
order that does not depend on how many rows there are: a row's answer is the same to the bit alone
and in any batch (of one implementation; another takes its sums in another order). A row without a
freed slot is not written, so that it keeps every bit.

Letters as in `sere.kernels.reference`, and H, the width of the experts' input; R, the rank of the
maps. Tensors lie on one device; those of a batch are [T, K] and contiguous.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sere.kernels.freed import freed_weights

NOTHING = -1
"""In the place of a rank: no map answers, whatever the operator freed."""


def keep_freed_(weights: Tensor, ids: Tensor, new_ids: Tensor, rows: Tensor, rank: Tensor) -> None:
    """Leave of the router's `weights` [T, K] float32, in place, those of freed slots; 0 elsewhere.

    ids: [T, K] int32, the router's choice. new_ids: [T, K], what the operator made of it. rows: [T]
    row classes. rank: [1] int32, `NOTHING` where no map answers.
    """
    freed = freed_weights(ids, weights, new_ids.to(ids.dtype), rows)
    weights.copy_(freed.masked_fill(rank == NOTHING, 0))


def ask(
    hidden: Tensor, ids: Tensor, weights: Tensor, down: Tensor, centre: Tensor, rank: Tensor
) -> Tensor:
    """[T, K, R] float32: `w * (A_u x - m_u)` of every slot of weight w, cut to the rank; without
    meaning where w is 0.

    hidden: [T, H or more], the experts' input. ids, weights: as `keep_freed_` left them. down:
    [E, R, H]. centre: [E, R] float32. rank: [1] int32, at most R.
    """
    _, R, H = down.shape
    expert = _safe(ids, len(down))
    inner = (hidden[:, None, None, :H].float() * down[expert].float()).sum(3)
    inner = weights[:, :, None] * (inner - centre[expert])
    return inner.masked_fill(torch.arange(R, device=inner.device) >= rank, 0)


def answer_(
    output: Tensor, ids: Tensor, weights: Tensor, inner: Tensor, up: Tensor, constant: Tensor
) -> None:
    """Add the answers to `output` [T, H or more], in place.

    inner: [T, K, R], what `ask` gave. up: [E, R, H]. constant: [E, H] float32.
    """
    H = constant.shape[1]
    expert = _safe(ids, len(constant))
    asked = weights != 0
    inner = inner.masked_fill(~asked[:, :, None], 0)
    added = (inner[:, :, :, None] * up[expert].float()).sum((1, 2))
    added += (weights[:, :, None] * constant[expert].float()).sum(1)
    whole = (output[:, :H].float() + added).to(output.dtype)
    output[:, :H] = torch.where(asked.any(1, keepdim=True), whole, output[:, :H])


def _safe(ids: Tensor, E: int) -> Tensor:
    """Safe to index with; meaningless where there is no expert, whose weight is 0."""
    return ids.long().clamp(0, E - 1)
