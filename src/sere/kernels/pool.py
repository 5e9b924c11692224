"""The pool: experts of a layer that are loaded at every step, whoever is in the batch.

Which they are is decided once, when a plan is built, from what the table knows; all arithmetic on
whole numbers, so that every rank of a server finds the same.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

FRACTION = 2**15
"""Shares are whole numbers of 1 / FRACTION."""
NEVER_STAYS = FRACTION + 1
_NEVER_BEST = torch.iinfo(torch.int64).min
_CALLS = 2**24  # how often an expert is called, as a whole number, is this many times its share


def joining_order(merit: Tensor, error: Tensor, calls: Tensor | None, members: int) -> Tensor:
    """[E] int32: the place of each expert in the order in which experts join; E for the rest.

    Next is who lowers most what the others' stand-ins lose, times how often they are called
    (facility location, greedy: with stand-ins chosen by error no set of the size lowers it by more
    than e / (e - 1) = 1.58 times as much). A smaller pool is the beginning of a larger one.

    merit: [E, E], row u: who stands in for u, the larger the sooner. error: [E, E] int64, what is
    lost then. calls: [E], the share of the router's choices; None: all alike. members: how many
    places are asked for.
    """
    E = len(merit)
    joins = torch.full((E,), E, dtype=torch.int32, device="cpu")
    merit, error = (t.detach().cpu().clone() for t in (merit.double(), error))
    merit.fill_diagonal_(math.inf)
    error.fill_diagonal_(0)
    weight = torch.ones(E, dtype=torch.int64, device="cpu")
    if calls is not None and calls.sum() > 0:
        weight = (calls.cpu().double() * _CALLS).round().long()
    lost = error.amax(1)
    reached = torch.full((E,), -math.inf, dtype=torch.float64, device="cpu")
    for place in range(min(members, E)):
        spared = torch.where(merit > reached[:, None], lost[:, None] - error, 0)
        gain = (weight[:, None] * spared).sum(0).masked_fill(joins < E, _NEVER_BEST)
        best = int((gain == gain.max()).nonzero()[0])  # of equals the lowest
        joins[best] = place
        better = merit[:, best] > reached
        lost = torch.where(better, error[:, best], lost)
        reached = torch.where(better, merit[:, best], reached)
    return joins


def columns(joins: Tensor, neighbours: Tensor, errors: Tensor, own: int, tau: int) -> Tensor:
    """[3, E] int32, `Plan.pool`: `joins`; and what an INDEPENDENT row needs to know of each expert,
    which is the same in every batch:

    * where in its list the first member of their pool stands, or -1;
    * the least share, in units of 1 / FRACTION, at which a slot stays with it: 0 for members and
      for experts without a stand-in, more than any share where nothing is rescued.

    joins: [E]. neighbours, errors: [E, E-1], as in a plan. own: members of their pool. tau: what a
    slot may lose, in units of 1 / LOSS_FRACTION, or negative: whatever.
    """
    E = len(joins)
    place, limit = (torch.full((E,), value, device="cpu") for value in (-1, 0))
    if own and E > 1:
        member = joins < own
        listed = neighbours.cpu().long()
        hit = (listed >= 0) & member[listed.clamp(min=0)]
        moves = hit.any(1) & ~member
        place = torch.where(moves, hit.to(torch.int8).argmax(1), -1)
        lost = errors.cpu().long().gather(1, place.clamp(min=0)[:, None]).squeeze(1).tolist()
        limits = [
            _least_share(error, tau) if move else 0 for error, move in zip(lost, moves, strict=True)
        ]
        limit = torch.tensor(limits, device="cpu")
    return torch.stack([joins.long(), place, limit]).to(torch.int32)


def no_pool(E: int) -> Tensor:
    """`Plan.pool` of a plan without one: every slot of an INDEPENDENT row stays."""
    return torch.tensor([[E] * E, [-1] * E, [0] * E], dtype=torch.int32, device="cpu")


def _least_share(error: int, tau: int) -> int:
    """The least share whose square times the error, rounded down, is more than tau."""
    if tau < 0 or error == 0:
        return NEVER_STAYS
    square = -(-(tau + 1) * FRACTION // error)
    return min(math.isqrt(square - 1) + 1 if square else 0, NEVER_STAYS)
