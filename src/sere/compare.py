"""`sere inspect A --compare B`: would two tables of one model re-route alike?

Calibration sees little text; whether other text, another seed or another measure leads to the same
replacements is a question of trust, answered here in numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sere.kernels import Plan
from sere.policy import Policy
from sere.table import Table, TableError

_DRAWS = 200
_PRIMARY_SHARE = 0.25


@dataclass(frozen=True)
class LayerComparison:
    """Agreement of one layer's two similarity matrices.

    rank_correlation: Spearman's, over all pairs of different experts.
    same_nearest: share of experts with the same most similar other expert.
    same_choice: share of replacements that are the same, a random quarter of the experts being
        primary; with threshold 0.
    """

    index: int
    rank_correlation: float
    same_nearest: float
    same_choice: float


def compare(one: Table, other: Table, seed: int = 0) -> list[LayerComparison]:
    """Compare two tables layer by layer; `TableError` if they are not of one model's shape."""
    shapes = [(t.fingerprint.E, t.fingerprint.layers) for t in (one, other)]
    if shapes[0] != shapes[1]:
        raise TableError(
            f"tables of different models: E={shapes[0][0]}, layers {list(shapes[0][1])} against "
            f"E={shapes[1][0]}, layers {list(shapes[1][1])}"
        )
    return [
        LayerComparison(
            index,
            round(_rank_correlation(a.similarity, other.layers[index].similarity), 4),
            *_agreement(a.similarity, other.layers[index].similarity, seed),
        )
        for index, a in one.layers.items()
    ]


def _rank_correlation(one: Tensor, other: Tensor) -> float:
    u, v = torch.triu_indices(len(one), len(one), 1)
    ranks = torch.stack([_ranks(one[u, v]), _ranks(other[u, v])])
    correlation = torch.corrcoef(ranks)[0, 1]
    return float(correlation) if torch.isfinite(correlation) else 0.0


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 0; equal values share their mean rank."""
    _, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return ((last - counts) + (last - 1))[inverse] / 2


def _agreement(one: Tensor, other: Tensor, seed: int) -> tuple[float, float]:
    """(same_nearest, same_choice), from the very lists that the operator walks."""
    E = len(one)
    if E < 2:
        return 1.0, 1.0
    lists = [Plan.build(x, Policy(S=1), K=1).neighbours.long() for x in (one, other)]
    nearest = (lists[0][:, 0] == lists[1][:, 0]).double().mean().item()
    generator = torch.Generator().manual_seed(seed)
    same = total = 0
    for _ in range(_DRAWS):
        primary = torch.rand(E, generator=generator) < _PRIMARY_SHARE
        if not primary.any() or primary.all():
            continue
        targets = [x.gather(1, primary[x].int().argmax(1, keepdim=True)) for x in lists]
        same += int((targets[0] == targets[1])[~primary].sum())
        total += int((~primary).sum())
    return round(nearest, 4), round(same / max(total, 1), 4)


def as_text(found: list[LayerComparison]) -> str:
    """The comparison for people, with the mean of all layers last."""
    lines = ["layer  rank correlation  same nearest  same replacement"]
    columns = [(c.rank_correlation, c.same_nearest, c.same_choice) for c in found]
    mean = tuple(sum(column) / len(column) for column in zip(*columns, strict=True))
    names = [*(str(c.index) for c in found), "mean"]
    for name, (rank, nearest, choice) in zip(names, [*columns, mean], strict=True):
        lines.append(f"{name:>5}  {rank:16.3f}  {nearest:12.0%}  {choice:16.0%}")
    return "\n".join(lines)
