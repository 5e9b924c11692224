"""Two tables compared: what users trust when they ask whether calibration text matters."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from sere.calibration.compare import as_text, compare
from sere.table import Table, TableError

Make = Callable[..., Table]


def transformed(table: Table, change: Callable[[torch.Tensor], torch.Tensor]) -> Table:
    layers = {
        i: replace(x, similarity=change(x.similarity).clamp(0, 1).fill_diagonal_(1))
        for i, x in table.layers.items()
    }
    return replace(table, layers=layers)


def test_a_table_agrees_with_itself_and_with_any_rising_scale(table: Table) -> None:
    for other in (table, transformed(table, lambda s: s**3)):
        for layer in compare(table, other):
            assert (layer.rank_correlation, layer.same_nearest, layer.same_choice) == (1, 1, 1)


def test_an_inverted_table_disagrees(table: Table) -> None:
    for layer in compare(table, transformed(table, lambda s: 1 - s)):
        assert layer.rank_correlation == -1
        assert layer.same_nearest == 0
        assert layer.same_choice < 0.5


def test_noise_lowers_agreement_a_little_at_a_time(table: Table) -> None:
    noise = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    small, large = (
        compare(table, transformed(table, lambda s, a=a: s + a * (noise + noise.T)))[0]  # type: ignore[misc]
        for a in (0.02, 0.2)
    )
    assert 1 > small.rank_correlation > large.rank_correlation
    assert small.same_choice > large.same_choice


def spearman(one: list[float], other: list[float]) -> float:
    def ranks(x: list[float]) -> list[float]:
        return [sum(b < a for b in x) + (sum(b == a for b in x) - 1) / 2 for a in x]

    return statistics.correlation(ranks(one), ranks(other))


def test_rank_correlation_against_the_definition_with_ties(table: Table) -> None:
    coarse = transformed(table, lambda s: (s * 5).round() / 5)
    u, v = torch.triu_indices(8, 8, 1)
    for layer in compare(table, coarse):
        one, other = (t.layers[layer.index].similarity[u, v].tolist() for t in (table, coarse))
        assert layer.rank_correlation == pytest.approx(spearman(one, other), abs=1e-3)


def test_tables_of_different_models_are_refused(table: Table, make_table: Make) -> None:
    with pytest.raises(TableError, match=r"layers \[0, 1\] against E=8, layers \[0\]"):
        compare(table, make_table(layers=(0,)))


def test_the_text_ends_with_the_mean(table: Table) -> None:
    assert as_text(compare(table, table)).splitlines()[-1].split() == [
        "mean",
        "1.000",
        "100%",
        "100%",
    ]
