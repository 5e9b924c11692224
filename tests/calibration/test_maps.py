"""`sere calibrate --maps`: a second file beside the table, whole or not at all."""

from __future__ import annotations

import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sere.calibration.calibrate import CalibrationError, calibrate
from sere.calibration.unfinished import UnfinishedError
from sere.maps import MapsError, beside, size_bytes
from sere.models.loading import load_model, load_tokenizer
from sere.models.moe import MoELayer, moe_layers, observed
from sere.policy import Policy, PolicyError
from sere.table import Table
from tests.conftest import HIDDEN, LAYERS, E

SETTINGS: dict[str, Any] = {"samples": 20, "length": 24, "batch": 8, "progress": False}


def run(model: Path, data: Path, output: Path, **settings: Any) -> Table:
    return calibrate(str(model), output, data=data, **{"maps": 4, **SETTINGS, **settings})


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "sere.table"


@torch.inference_mode()
def routed_rows(model_dir: Path, corpus_file: Path) -> dict[int, tuple[MoELayer, Tensor, Tensor]]:
    """By layer: what its experts are given [n, H], and who is asked [n, E]; one text at a time."""
    import json

    model, tokenizer = load_model(str(model_dir)), load_tokenizer(str(model_dir))
    seen: dict[int, list[tuple[Tensor, Tensor]]] = {i: [] for i in range(LAYERS)}
    layers = moe_layers(model)

    def keep(layer: MoELayer, x: Tensor, ids: Tensor, _: Tensor) -> None:
        seen[layer.index].append((x, torch.zeros(len(x), E).scatter_(1, ids, 1)))

    with observed(layers, keep):
        for line in corpus_file.read_text().splitlines():
            ids = tokenizer(json.loads(line)["text"])["input_ids"][:24]
            model(input_ids=torch.tensor([ids]))
    return {
        layer.index: (layer, *map(torch.cat, zip(*seen[layer.index], strict=True)))
        for layer in layers
    }


@torch.inference_mode()
def test_maps_answer_for_the_tokens_that_the_router_sends(
    model_dir: Path, corpus_file: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Against the model's own outputs: means, and energies that fall from rank to rank."""
    run(model_dir, corpus_file, output)
    told = capsys.readouterr().err
    table = Table.load(output)
    assert table.maps is not None and table.maps.R == 4
    size = size_bytes(LAYERS, E, HIDDEN, 4)
    assert f"{beside(output)}: {size / 1e6:.1f} MB" in told
    assert size <= beside(output).stat().st_size < size + 8192
    for index, (layer, rows, chosen) in routed_rows(model_dir, corpus_file).items():
        maps = table.maps.layer(index)
        assert maps.tokens.tolist() == chosen.sum(0).tolist()
        for u in range(E):
            x = rows[chosen[:, u] > 0]
            y = layer.adapter.output(x, u).float()
            if maps.left[u, 0] == 1:
                assert not maps.constant[u].any() and not maps.down[u].any()
                continue
            torch.testing.assert_close(maps.constant[u], y.mean(0), atol=1e-4, rtol=1e-4)
            ones = torch.ones(len(x), 1)
            lost = [
                (maps.of_rank(r).answers(x, torch.full((len(x), 1), u), ones) - y).square().sum()
                for r in range(5)
            ]
            assert all(a >= b * 0.999 for a, b in pairwise(lost))
            assert lost[0] == pytest.approx((y - y.mean(0)).square().sum().item(), rel=1e-3)
            pairs = torch.stack([layer.adapter.output(x, v).float() for v in range(E)])
            _check_affine(maps.affine[u], pairs, u)


def _check_affine(found: Tensor, outputs: Tensor, u: int) -> None:
    """By least squares on [E_v, one column of each output] with a common factor."""
    y = outputs[u] - outputs[u].mean(0)
    for v, z in enumerate(outputs - outputs.mean(1, keepdim=True)):
        factor = (y * z).sum() / z.square().sum()
        share = (y - factor * z).square().sum() / outputs[u].square().sum()
        assert found[v].item() == pytest.approx(share.item(), abs=2e-3)


def test_a_table_with_maps_is_the_table_without(
    model_dir: Path, corpus_file: Path, output: Path
) -> None:
    run(model_dir, corpus_file, output)
    mapped, first = Table.load(output), beside(output).read_bytes()
    run(model_dir, corpus_file, output)
    assert beside(output).read_bytes() == first  # the same seed gives the same bytes
    run(model_dir, corpus_file, output, maps=None)
    assert not beside(output).exists()  # nobody's any more
    plain = Table.load(output)
    assert plain.maps is None
    for index, layer in plain.layers.items():
        assert torch.equal(layer.directed, mapped.layers[index].directed)


def test_a_killed_run_goes_on_and_its_maps_are_the_same(
    model_dir: Path, corpus_file: Path, output: Path
) -> None:
    script = f"""
import os, signal
from pathlib import Path
from sere.calibration.unfinished import Unfinished
from tests.calibration.test_maps import run
finish = Unfinished.finish
def deadly(*arguments):
    finish(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)
Unfinished.finish = deadly
run(Path({str(model_dir)!r}), Path({str(corpus_file)!r}), Path({str(output)!r}))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[2])
    assert done.returncode == -signal.SIGKILL
    assert not output.exists() and not beside(output).exists()
    with pytest.raises(UnfinishedError, match=r"other settings \(maps"):
        run(model_dir, corpus_file, output, maps=2)
    run(model_dir, corpus_file, output)
    resumed = beside(output).read_bytes()
    assert {path.name for path in output.parent.iterdir()} == {output.name, beside(output).name}
    run(model_dir, corpus_file, output)
    assert beside(output).read_bytes() == resumed


def test_maps_of_another_calibration_and_broken_ones_are_refused(
    model_dir: Path, corpus_file: Path, output: Path
) -> None:
    run(model_dir, corpus_file, output)
    mine = beside(output).read_bytes()
    run(model_dir, corpus_file, other := output.with_name("other.table"), seed=1, samples=10)
    beside(output).write_bytes(beside(other).read_bytes())
    with pytest.raises(MapsError, match="belongs to another calibration"):
        Table.load(output)
    beside(output).write_bytes(mine[: len(mine) // 2])
    with pytest.raises(MapsError, match="not a complete file of maps"):
        Table.load(output)
    beside(output).unlink()
    lost = Table.load(output)  # whose table still serves every other policy
    lost.check_policy(Policy(S=1))
    with pytest.raises(PolicyError, match=r"has lost its file of them \(TABLE.maps\)"):
        lost.check_policy(Policy(S=1, fill="linear"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "random"}, "--maps needs text"),
        ({"stream": False}, "one layer at a time: leave out --no-stream"),
        ({"until_stable": 0.9}, "--until-stable and --maps exclude each other"),
        ({"maps": 0}, "--maps 0: expected the largest rank"),
    ],
)
def test_what_cannot_be_meant_is_refused_at_once(
    model_dir: Path, corpus_file: Path, output: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(CalibrationError, match=message):
        run(model_dir, corpus_file, output, **settings)
