"""Do two similarity matrices of one layer lead to the same replacements?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sere.kernels import Plan
from sere.policy import Policy
from sere.similarity.measures import Measure, pooled

_DRAWS = 100
_PRIMARY_SHARE = 0.25
_BOOTSTRAP = 16


def rank_correlation(one: Tensor, other: Tensor) -> float:
    """Spearman's, over all ordered pairs of different experts; matrices [E, E]."""
    pairs = ~torch.eye(len(one), dtype=torch.bool)
    ranks = torch.stack([_ranks(one[pairs]), _ranks(other[pairs])])
    correlation = torch.corrcoef(ranks)[0, 1]
    return float(correlation) if torch.isfinite(correlation) else 0.0


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 0; equal values share their mean rank."""
    _, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    mean: Tensor = (last - counts + last - 1) / 2
    return mean[inverse]


def same_nearest(one: Tensor, other: Tensor) -> float:
    """Share of experts with the same most similar other expert."""
    if len(one) < 2:
        return 1.0
    return (_listed(one)[:, 0] == _listed(other)[:, 0]).double().mean().item()


def same_choice(one: Tensor, other: Tensor, seed: int = 0) -> float:
    """Share of replacements that are the same when a random quarter of the experts is primary, with
    threshold 0."""
    lists = [_listed(one), _listed(other)]
    generator = torch.Generator().manual_seed(seed)
    same = total = 0
    for _ in range(_DRAWS):
        primary = torch.rand(len(one), generator=generator) < _PRIMARY_SHARE
        if not primary.any() or primary.all():
            continue
        targets = [x.gather(1, primary[x].int().argmax(1, keepdim=True)) for x in lists]
        same += int((targets[0] == targets[1])[~primary].sum())
        total += int((~primary).sum())
    return same / total if total else 1.0


def _listed(similarity: Tensor) -> Tensor:
    """The very lists that the operator walks."""
    return Plan.build(similarity, Policy(S=1), K=1).neighbours.long()


def stability(folds: Sequence[Measure], seed: int = 0) -> float | None:
    """Share of replacements that other text of the same kind would choose again.

    A bootstrap over `folds`: the mean `same_choice` of pairs of samples, which differ from one
    another as two texts do. (A sample against the whole is too rosy: they share their text. On
    synthetic experts pairs were within 0.03 of two real texts down to 0.8, too high below.)
    None if fewer than two folds have seen a token.
    """
    folds = [fold for fold in folds if fold.tokens]
    if len(folds) < 2:
        return None
    generator = torch.Generator().manual_seed(seed)

    def sample() -> Tensor:
        drawn = torch.randint(0, len(folds), (len(folds),), generator=generator)
        similarity: Tensor = pooled([folds[i] for i in drawn.tolist()]).result()
        return similarity

    return sum(same_choice(sample(), sample()) for _ in range(_BOOTSTRAP)) / _BOOTSTRAP
