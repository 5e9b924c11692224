"""What is added up of one MoE layer while a model reads, whoever runs its experts: transformers for
`sere calibrate`, or an engine for itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sere.similarity.agreement import stability
from sere.similarity.measures import METHODS, Cosine, Directed, Frobenius, Measure, pooled
from sere.statistics import LayerStatistics

FOLDS = 8
"""Parts of the text, measured apart, so that a bootstrap tells how stable the whole is."""


class LayerSums:
    """The table's statistics of one layer, and the chosen method in folds. Sums are [E, E] on the
    CPU or the outputs' own device: nothing of a row is kept."""

    def __init__(self, E: int, method: str) -> None:
        """method: one of `sere.similarity.measures.METHODS`."""
        self.gram, self.cosine, self.directed = Frobenius(E), Cosine(E), Directed(E)
        self.folds = [METHODS[method](E) for _ in range(FOLDS)]
        self.choices = torch.zeros(E, dtype=torch.int64)
        self.tokens = 0

    def count(self, chosen: Tensor) -> None:
        """Take in where rows were sent; chosen: [n, E] bool, see `chosen`."""
        self.tokens += len(chosen)
        self.choices += chosen.sum(0).cpu()

    def add(self, outputs: Tensor, chosen: Tensor, fold: int) -> None:
        """Take in what all experts make of rows that were counted.

        outputs: [E, n, H] float32. chosen: [n, E] bool. fold: part of the text, < `FOLDS`.
        """
        self.folds[fold].update(outputs, chosen)
        for measure in self._apart():
            measure.update(outputs, chosen)

    def _apart(self) -> list[Measure]:
        """The statistics that the folds do not sum up themselves."""
        own = type(self.folds[0])
        return [m for m in (self.gram, self.cosine, self.directed) if type(m) is not own]

    def stability(self) -> float | None:
        """See `LayerStatistics.stability`."""
        return stability(self.folds)

    def _measures(self) -> tuple[Measure, ...]:
        return (*self.folds, self.gram, self.cosine, self.directed)

    def rest(self) -> None:
        """Bring the sums to the CPU, where another thread may read them; add nothing more."""
        for measure in self._measures():
            measure.total = measure.total.cpu()

    def so_far(self) -> dict[str, Any]:
        """All that was added up, in plain values on the CPU, for `take_up`."""
        sums = [(measure.total.cpu(), measure.tokens) for measure in self._measures()]
        return {"sums": sums, "choices": self.choices, "tokens": self.tokens}

    def take_up(self, so_far: dict[str, Any]) -> None:
        """Go on from what a run before has added up."""
        for measure, (total, tokens) in zip(self._measures(), so_far["sums"], strict=True):
            measure.total, measure.tokens = total, tokens
        self.choices, self.tokens = so_far["choices"], so_far["tokens"]

    def finished(self) -> LayerStatistics:
        whole = pooled(self.folds)
        gram = whole if isinstance(whole, Frobenius) else pooled([self.gram])
        cosine = whole if isinstance(whole, Cosine) else pooled([self.cosine])
        directed = whole if isinstance(whole, Directed) else pooled([self.directed])
        cross, energy = directed.per_token(self.choices)
        return LayerStatistics(
            similarity=whole.result(),
            load=(self.choices / self.choices.sum().clamp(min=1)).float(),
            gram=gram.gram(),
            cosine=cosine.cosine(),
            directed=cross,
            directed_energy=energy,
            tokens=self.tokens,
            stability=self.stability(),
        )


def chosen(ids: Tensor, weights: Tensor, E: int) -> Tensor:
    """[T, E] bool: which experts each row of ids [T, K] names with a weight."""
    within = (ids >= 0) & (ids < E) & (weights != 0)
    named = torch.zeros(len(ids), E + 1, dtype=torch.bool, device=ids.device)
    return named.scatter_(1, ids.where(within, E), True)[:, :E]
