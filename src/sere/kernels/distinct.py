"""Rule 9 of the specification (see `sere.kernels.reference`): a row names no expert twice."""

from __future__ import annotations

import torch
from torch import Tensor

NOWHERE = -1
"""Where a slot goes that carries nothing to anywhere."""


def distinct(
    goes: Tensor, weights: Tensor, joins: Tensor, active: Tensor, start: Tensor
) -> tuple[Tensor, Tensor]:
    """Ids and weights [T, K] of the slots that `joins` [T, K] marks; meaningless in the others.

    goes: [T, K] int64, the expert that each slot goes to, or NOWHERE. weights: [T, K] float32 or
    float64, summed in that type. active: [E] bool, at least as many as a row has marked slots.
    start: [T] int64, from which of them on, modulo their number, each row takes its fillers.
    """
    K = goes.shape[1]
    carried = joins & (goes != NOWHERE)
    same = (goes[:, :, None] == goes[:, None, :]) & carried[:, :, None] & carried[:, None, :]
    carrier = carried & ~same.tril(-1).any(2)  # [T, slot, other slot]
    total = weights
    for other in range(1, K):
        later = same[:, :, other] & (torch.arange(K, device=goes.device) < other)
        total = torch.where(later, total + weights[:, other, None], total)
    ids = torch.where(carrier, goes, fillers(goes, carrier, joins & ~carrier, active, start))
    return ids, total.masked_fill(~carrier, 0)


def fillers(ids: Tensor, carrier: Tensor, freed: Tensor, active: Tensor, start: Tensor) -> Tensor:
    """[T, K] int64: for the slots `freed` [T, K], in slot order, experts that are active and that
    no `carrier` [T, K] of the row names.

    ids: [T, K] int64, read where there is a carrier. active: [E] bool. Where a row has more freed
    slots than there are such experts (never under rule 8), other experts that no carrier names, in
    ascending order, follow. Other slots are meaningless.
    """
    T, E = len(ids), len(active)
    named = torch.zeros(T, E + 1, dtype=torch.bool, device=ids.device)
    named = named.scatter_(1, torch.where(carrier, ids, E), True)[:, :E]
    turn = (active.cumsum(0) - 1 - start[:, None]) % active.sum().clamp(min=1)
    turn = turn.masked_fill(~active, E).masked_fill(named, E + 1)
    order = turn.argsort(dim=1, stable=True)
    return order.gather(1, (freed.cumsum(1) - 1).clamp(0, E - 1))
