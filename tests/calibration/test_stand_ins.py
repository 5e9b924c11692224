"""What stand-ins leave of an expert's output, against sums over the outputs themselves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sere.calibration import inspect, stand_ins
from sere.table import LayerStatistics, Table
from tests.conftest import E

N, H = 300, 12


def layer(outputs: torch.Tensor, sent: torch.Tensor) -> LayerStatistics:
    """outputs: [N, E, H]; sent: [N, E], whom the router asked for each token."""
    asked = sent.sum(0)
    products = torch.einsum("nuh,nvh->nuv", outputs, outputs)
    directed = torch.einsum("nu,nuv->uv", sent, products) / asked[:, None].clamp(min=1)
    energy = torch.einsum("nu,nv->uv", sent, outputs.square().sum(-1)) / asked[:, None].clamp(min=1)
    similarity = torch.rand(E, E, generator=torch.Generator().manual_seed(1))
    return LayerStatistics(
        similarity.fill_diagonal_(1), asked / asked.sum(), products.mean(0), products.mean(0),
        directed, energy, tokens=N,
    )  # fmt: skip


@pytest.mark.parametrize("unused", [False, True], ids=["all asked", "one never asked"])
def test_shares_are_those_of_the_outputs(table: Table, unused: bool) -> None:
    g = torch.Generator().manual_seed(0)
    outputs = torch.randn(N, E, H, generator=g) * torch.arange(1, E + 1)[:, None]
    outputs[:, 1] = 0.5 * outputs[:, 0] + 0.1 * outputs[:, 1]  # one that another can stand in for
    sent = (torch.rand(N, E, generator=g) < 0.3).float()
    sent[:, 3] *= not unused
    known = layer(outputs, sent)
    lost = {"similar": 0.0, "scaled": 0.0}
    whole = 0.0
    for u in range(E):
        own, rows = outputs[:, u], sent[:, u].bool()
        others = [v for v in range(E) if v != u]
        nearest = max(others, key=lambda v: known.similarity[u, v].item())
        whole += own[rows].square().sum().item()
        lost["similar"] += (own - outputs[:, nearest])[rows].square().sum().item()
        rest = []
        for v in others:
            mine, theirs = own[rows].flatten(), outputs[rows, v].flatten()
            factor = (mine @ theirs / theirs.square().sum().clamp(min=1e-9)).item()
            rest.append((mine - factor * theirs).square().sum().item())
        lost["scaled"] += min(rest)
    both = replace(table, layers={0: known, 1: known})
    found, other = stand_ins.left(both)
    assert replace(other, index=0) == found
    assert found.similar == pytest.approx(lost["similar"] / whole, rel=1e-4)
    assert found.scaled == pytest.approx(lost["scaled"] / whole, rel=1e-4)
    assert found.scaled < 1 < found.similar and found.linear is None
    assert "in 2 of 2 layers the most similar expert is worse than none" in inspect.as_text(both, 0)
    assert f"at best {found.similar:.0%} of an expert" in (stand_ins.in_a_line(both) or "")


def test_a_table_without_text_says_nothing_of_it(table: Table, tmp_path: Path) -> None:
    empty = {i: LayerStatistics.without_text(known.similarity) for i, known in table.layers.items()}
    silent = replace(table, layers=empty)
    assert stand_ins.left(silent) == [] and stand_ins.in_a_line(silent) is None
    assert "at best" not in inspect.as_text(silent, 0.5)
    inspect.plot(silent, tmp_path / "p.png")
