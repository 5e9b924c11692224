"""Built-in shapes are the published models, and random weights behave like a model's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from sere.flags import _SHAPES
from sere.serving.random_weights import chosen, fill, reached, row_sizes
from sere.speed.shapes import SHAPES, ShapeError, shape_named
from sere.step_cost.roofline import Sizes
from sere.table import Table

# Billions of parameters that one token uses, as published.
ACTIVE = {
    "qwen1.5-moe-a2.7b": 2.7,
    "deepseek-v2-lite": 2.4,
    "qwen3-30b-a3b": 3.3,
    "gpt-oss-120b": 5.1,
    "qwen3-235b-a22b": 22,
    "deepseek-v3": 37,
}


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_are_as_published(name: str, tmp_path: Path) -> None:
    shape = SHAPES[name]
    shape.write(tmp_path)
    sizes = Sizes.of(str(tmp_path))
    assert sizes.total / 1e9 == pytest.approx(shape.parameters, rel=0.005)
    active = sizes.dense + sizes.layers * shape.config["num_experts_per_tok"] * sizes.expert
    embedding = shape.vocabulary * shape.config["hidden_size"]
    # Some publish with the embedding and some without.
    assert ACTIVE[name] * 0.97 < (active + embedding) / 1e9 and active / 1e9 < ACTIVE[name] * 1.03


def test_the_command_line_knows_every_shape() -> None:
    assert tuple(SHAPES) == _SHAPES
    assert shape_named("Qwen3-30B-A3B") is SHAPES["qwen3-30b-a3b"]
    assert shape_named("Qwen/Qwen3-30B-A3B") is None  # a model on the hub


@pytest.mark.parametrize("name", SHAPES)
def test_a_cut_shape_keeps_proportions(name: str, tmp_path: Path) -> None:
    whole, cut = SHAPES[name], SHAPES[name].cut(2)
    cut.write(tmp_path)
    assert (cut.layers, cut.of_layers) == (2, whole.layers)
    assert cut.vocabulary / 2 == pytest.approx(whole.vocabulary / whole.layers, rel=0.02)
    sizes = Sizes.of(str(tmp_path))
    assert sizes.layers == 2
    table = cut.table(seed=0)
    assert table.fingerprint.layers == (0, 1)
    config = json.loads((tmp_path / "config.json").read_text())
    assert table.fingerprint.architecture == config["architectures"][0]
    with pytest.raises(ShapeError, match="cannot cut it to 0"):
        whole.cut(0)


def test_a_random_table_moves_and_withstands_a_round_trip(tmp_path: Path) -> None:
    table = SHAPES["qwen3-30b-a3b"].cut(1).table(seed=0)
    table.save(tmp_path / "table")
    layer = Table.load(tmp_path / "table").layers[0]
    assert torch.equal(layer.similarity, table.layers[0].similarity)
    assert torch.linalg.eigvalsh(layer.gram).min() > -1e-4  # such outputs exist


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(50, 256)
        self.gate = nn.Linear(256, 32, bias=False)
        self.other = nn.ModuleList([nn.Linear(256, 256), nn.Linear(256, 256)])
        self.norm = nn.LayerNorm(256)


def test_random_weights_are_drawn_each_of_its_own() -> None:
    model = Toy()
    fill(model, seed=0, K=4)
    one, two = model.other
    assert not torch.equal(one.weight, two.weight)
    assert one.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert model.embed_tokens.weight.std().item() == pytest.approx(1, rel=0.05)
    assert torch.equal(model.norm.weight, torch.ones(256)) and not one.bias.any()
    again = Toy()
    fill(again, seed=0, K=4)
    assert torch.equal(again.gate.weight, model.gate.weight)
    fill(again, seed=1, K=4)
    assert not torch.equal(again.gate.weight, model.gate.weight)


def test_a_router_is_as_skewed_as_asked_for() -> None:
    wanted = tuple(rank**-0.5 for rank in range(1, 33))
    model = Toy()
    fill(model, seed=0, K=4, load=wanted)
    hidden = torch.randn(20000, 256, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        got = chosen(model.gate(hidden), 4).sort(descending=True).values
    expected = torch.tensor(wanted) / sum(wanted)
    assert (got - expected).abs().max() < 0.01
    assert got[0] > 2.5 / 32 > 1 / 32 > got[-1]
    assert reached(wanted, 4).max() == pytest.approx(max(wanted) / sum(wanted), abs=0.01)
    assert torch.allclose(row_sizes((1.0,) * 8, 2), torch.ones(8), atol=0.1)
