"""The report tells what would go wrong with a table before it is served."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sere.calibration.inspect import as_text, plot, report, serve_line
from sere.cli import main
from sere.policy import Policy
from sere.similarity.enough import too_little_text
from sere.table import LayerStatistics, Table

E = 8
Make = Callable[..., Table]


def with_similarity(table: Table, similarity: Tensor) -> Table:
    """The table with another first layer."""
    layer = dataclasses.replace(table.layers[0], similarity=similarity.clone().fill_diagonal_(1))
    return dataclasses.replace(table, layers={**table.layers, 0: layer})


def spread(low: float, high: float) -> Tensor:
    """Similarities that fill [low, high] evenly."""
    similarity = torch.zeros(E, E)
    u, v = torch.triu_indices(E, E, 1)
    similarity[u, v] = torch.linspace(low, high, len(u))
    return similarity + similarity.T


def warnings(table: Table, rho: float) -> str:
    return "; ".join(report(table, rho)[0].warnings)


def test_an_ordinary_layer_gives_no_warning(table: Table) -> None:
    assert warnings(table, 0.5) == warnings(table, 0.0) == ""


def test_rho_above_every_similarity(table: Table) -> None:
    layer = with_similarity(table, spread(0.3, 0.8))
    assert "rho=0.81 is above every similarity: nothing is ever" in warnings(layer, 0.81)
    assert warnings(layer, 0.79) == ""
    assert report(layer, 0.81)[0].critical_fraction == 1


def test_rho_below_every_similarity_is_inert(table: Table) -> None:
    layer = with_similarity(table, spread(0.3, 0.8))
    assert "inert, the same as rho=0" in warnings(layer, 0.3)
    assert warnings(layer, 0.35) == ""
    assert report(layer, 0.3)[0].critical_fraction == 0


def test_near_identity_and_near_constant(table: Table) -> None:
    assert "near-identity" in warnings(with_similarity(table, spread(0, 0.04)), 0.0)
    assert "near-constant" in warnings(with_similarity(table, spread(0.96, 1)), 0.0)


def test_replacements_that_other_text_would_choose_differently(table: Table) -> None:
    def with_stability(share: float) -> Table:
        layer = dataclasses.replace(table.layers[0], stability=share)
        return dataclasses.replace(table, layers={**table.layers, 0: layer})

    assert "other text would choose 60% of the replacements" in warnings(with_stability(0.4), 0.0)
    assert warnings(with_stability(0.95), 0.0) == ""


def test_how_much_text_would_be_enough_is_said(table: Table) -> None:
    layer = table.layers[0]

    def told(tokens: int, stability: float | None) -> str | None:
        return too_little_text(dataclasses.replace(layer, tokens=tokens, stability=stability))

    for tokens in (2, 128):
        found = told(tokens, None)
        assert found is not None and "about 160 of them" in found and "90%" in found
    assert told(160, None) is None and told(160, 0.85) is None
    found = told(1000, 0.7)  # three times what is wanted: nine times the text
    assert found is not None and "about 9,000 tokens and not 1,000 for 10%" in found
    assert told(0, None) is None  # a null model


def test_an_outlier_that_sets_the_scale_of_frobenius_alone(make_table: Make) -> None:
    """Expert 3 lies far from all: the others close up towards 1."""
    similarity = spread(0.75, 0.9)
    similarity[3, :] = similarity[:, 3] = 0.0
    layer = with_similarity(make_table(method="frobenius"), similarity)
    assert "outlier-dominated" in warnings(layer, 0.0)
    layer = with_similarity(make_table(method="cosine"), similarity)
    assert "outlier-dominated" not in warnings(layer, 0.0)


def test_experts_nobody_chose_and_layers_without_tokens(table: Table, make_table: Make) -> None:
    load = torch.tensor([0.5, 0.5, *[0.0] * 6])
    layer = dataclasses.replace(table.layers[0], load=load)
    unused = dataclasses.replace(table, layers={**table.layers, 0: layer})
    assert "6 experts were never chosen" in warnings(unused, 0.0)
    assert "made without text" in warnings(make_table(tokens=0), 0.0)
    blind = LayerStatistics.without_text(torch.eye(8))
    half = dataclasses.replace(table, layers={**table.layers, 0: blind})
    assert warnings(half, 0.0) == "nothing is known of its experts: never re-routed"


def test_figures_against_plain_loops(table: Table) -> None:
    found = report(table, 0.5)[1]
    matrix = table.layers[1].similarity.tolist()
    nearest = [max(matrix[u][v] for v in range(E) if v != u) for u in range(E)]
    order = sorted(range(E), key=lambda u: -nearest[u])
    assert [expert for expert, _ in found.most_replaceable] == order[:3]
    assert [expert for expert, _ in found.least_replaceable] == order[:-4:-1]
    assert found.nearest == pytest.approx(sum(nearest) / E, abs=1e-4)
    assert found.critical_fraction == sum(value < 0.5 for value in nearest) / E
    pairs = sorted(matrix[u][v] for u in range(E) for v in range(E) if u != v)
    assert found.quantiles[1] == pytest.approx((pairs[27] + pairs[28]) / 2, abs=1e-4)


def test_the_report_as_text_and_json(table: Table) -> None:
    text = as_text(with_similarity(table, spread(0.3, 0.8)), 0.9)
    assert "2 MoE layers, E=8, K=2" in text
    assert "warning: rho=0.9 is above" in text
    layers = json.loads(json.dumps([asdict(layer) for layer in report(table, 0.5)]))
    assert [layer["index"] for layer in layers] == [0, 1]


def test_the_whole_stored_policy_is_told_and_how_to_serve_it(
    table: Table,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    batches = {1: None, 2: {}, 3: {"tau": 0.02}, 32: {"tau": 0.4, "layers": {1: {"tau": 0.3}}}}
    path = tmp_path / "a table"
    replace(table, policy=Policy(S=1, tau=0.1, batches=batches)).save(path)
    assert main(["inspect", str(path)]) == 0
    told = capsys.readouterr().out
    for line in (
        "  1 row: stock",
        "  2 rows: S=1 tau=0.1",
        "  3 to 31 rows: S=1 tau=0.02",
        "  32 rows or more: S=1 tau=0.4 per layer",
        '    layer 1: {"tau": 0.3}',
    ):
        assert line in told.splitlines()
    command = shlex.split(told.splitlines()[-1])
    assert command[-2] == "--additional-config" and "vllm" in " ".join(command[:4])
    assert json.loads(command[-1])["sere"]["table"] == str(path)
    monkeypatch.setattr("sere.calibration.inspect.distributions", list)  # no wheel for CPUs
    assert (
        serve_line("m", {"table": "t"})
        == """vllm serve m --additional-config '{"sere": {"table": "t"}}'"""
    )
    table.save(path)
    assert main(["inspect", str(path)]) == 0
    assert "policy: none stored" in capsys.readouterr().out


def test_the_plot_is_a_png_that_shows_the_table(tmp_path: Path, make_table: Make) -> None:
    image = pytest.importorskip("matplotlib.image")
    table = make_table()
    plot(table, tmp_path / "a.png")
    plot(with_similarity(table, spread(0, 0.1)), tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG\r\n")
    a, b = (image.imread(tmp_path / name) for name in ("a.png", "b.png"))
    assert a.std() > 0.05
    assert a.shape == b.shape
    assert (a != b).any()
