"""`sere inspect A --compare B`: would two tables of one model re-route alike?

Calibration sees little text; whether other text, another seed or another measure leads to the same
replacements is a question of trust, answered here in numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

from sere.similarity.agreement import rank_correlation, same_choice, same_nearest
from sere.table import Table, TableError


@dataclass(frozen=True)
class LayerComparison:
    """Agreement of one layer's two similarity matrices.

    rank_correlation: Spearman's, over all pairs of different experts.
    same_nearest: share of experts with the same most similar other expert.
    same_choice: share of replacements that are the same (see `sere.similarity.agreement`).
    """

    index: int
    rank_correlation: float
    same_nearest: float
    same_choice: float


def compare(one: Table, other: Table) -> list[LayerComparison]:
    """Compare two tables layer by layer; `TableError` if they are not of one model's shape."""
    shapes = [(t.fingerprint.E, t.fingerprint.layers) for t in (one, other)]
    if shapes[0] != shapes[1]:
        raise TableError(
            f"tables of different models: E={shapes[0][0]}, layers {list(shapes[0][1])} against "
            f"E={shapes[1][0]}, layers {list(shapes[1][1])}"
        )
    found = []
    for index, layer in one.layers.items():
        pair = layer.similarity, other.layers[index].similarity
        figures = rank_correlation(*pair), same_nearest(*pair), same_choice(*pair)
        found.append(LayerComparison(index, *(round(figure, 4) for figure in figures)))
    return found


def as_text(found: list[LayerComparison]) -> str:
    """The comparison for people, with the mean of all layers last."""
    lines = ["layer  rank correlation  same nearest  same replacement"]
    columns = [(c.rank_correlation, c.same_nearest, c.same_choice) for c in found]
    mean = tuple(sum(column) / len(column) for column in zip(*columns, strict=True))
    names = [*(str(c.index) for c in found), "mean"]
    for name, (rank, nearest, choice) in zip(names, [*columns, mean], strict=True):
        lines.append(f"{name:>5}  {rank:16.3f}  {nearest:12.0%}  {choice:16.0%}")
    return "\n".join(lines)
