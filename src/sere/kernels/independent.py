"""Rule 10 of the specification (see `sere.kernels.reference`): rows that know no other row."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sere.kernels.distinct import NOWHERE, distinct
from sere.kernels.plan import Plan


class Slots(NamedTuple):
    """[T, K] each: whether the slot names an expert, whether it counts, which expert (anything
    where none), and its share."""

    valid: Tensor
    counts: Tensor
    expert: Tensor
    shares: Tensor


class Own(NamedTuple):
    """What becomes of INDEPENDENT rows, [T, K] each; nothing in others."""

    ids: Tensor  # int64
    weights: Tensor
    joins: Tensor  # slots that are written
    leaves: Tensor
    rescued: Tensor


def independent(weights: Tensor, plan: Plan, rows: Tensor, slots: Slots) -> Own:
    """weights: [T, K] float32 or float64. rows: [T, 1] bool, which of them are INDEPENDENT."""
    valid, counts, expert, shares = slots
    joins, place, limit = plan.pool.long().unbind()
    scaled, own_pool = plan.settings[4] != 0, plan.settings[6]
    member, place = joins < own_pool, place.clamp(min=0)
    leaves = valid & rows & (shares < limit[expert])
    rescued = counts & rows & ~leaves & ~member[expert] & (own_pool > 0)
    written = valid & rows & leaves.any(1, keepdim=True)
    if plan.num_experts == 1:
        return Own(expert, weights, written, leaves, rescued)
    target = plan.neighbours.long().gather(1, place[:, None]).squeeze(1)
    goes = torch.where(leaves, torch.where(counts, target[expert], NOWHERE), expert)
    factor = plan.scales[expert, place[expert]]
    weights = torch.where(leaves & counts & scaled, weights * factor, weights)
    lowest = torch.zeros(len(goes), dtype=torch.int64, device=goes.device)
    ids, weights = distinct(goes, weights, written, member, lowest)
    return Own(ids, weights, written, leaves, rescued)
