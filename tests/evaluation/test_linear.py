"""Linear stand-ins in one pass, against the rule written down with loops over rows and slots."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sere.calibration.calibrate import calibrate
from sere.evaluation.arms import Arm, parse_arm, served_policies
from sere.evaluation.decoding import Passage, Reading, Step, decoded
from sere.evaluation.evaluate import run
from sere.maps import beside
from sere.models.adapters import Changed
from sere.models.loading import load_model
from sere.models.moe import MoELayer, moe_layers
from sere.policy import Policy, PolicyError
from sere.table import Table
from tests.conftest import HIDDEN, E, K
from tests.models.test_architectures import plan
from tests.tiny_models import tiny_model

RANK = 4
PASSAGES = [Passage([5 + i, 9, 30 + i, 41, 17, 60, 22 + i], 2) for i in range(5)]


@pytest.fixture(scope="module")
def mapped(model_dir: Path, corpus_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mapped") / "sere.table"
    calibrate(
        str(model_dir), path, data=corpus_file, samples=20, length=64, maps=RANK, progress=False
    )
    return path


def by_hand(
    layer: MoELayer, maps: dict[str, Tensor], rank: int, hidden: Tensor, ids: Tensor, w: Tensor
) -> tuple[Tensor, int, int]:
    """One step's mixture [n, H], experts read and maps read: S=1, growing to K primaries."""
    order = w.argsort(dim=1, descending=True, stable=True)
    for S in range(1, K + 1):
        primary = {int(ids[t, s]) for t in range(len(ids)) for s in order[t, :S]}
        if len(primary) >= K:
            break
    out, answered = torch.zeros(hidden.shape), set()
    for t, x in enumerate(hidden):
        for k in range(K):
            u = int(ids[t, k])
            if u in primary:
                answer = layer.adapter.output(x[None], u)[0].float()
            else:
                answered.add(u)
                down, up = (maps[f"layers.{layer.index}.{n}"][u, :rank] for n in ("down", "up"))
                centre = maps[f"layers.{layer.index}.centre"][u, :rank]
                answer = up.float().T @ (down.float() @ x - centre)
                answer = answer + maps[f"layers.{layer.index}.constant"][u]
            out[t] += w[t, k] * answer
    return out, len(primary), len(answered)


@contextmanager
def experts_by_hand(
    layers: list[MoELayer], reading: Reading, maps: dict[str, Tensor], rank: int
) -> Iterator[list[tuple[int, int]]]:
    """In place of the model's own experts modules; what each step reads."""
    seen: list[tuple[int, int]] = []
    inner = {layer.index: layer.experts.forward for layer in layers}

    def replace(layer: MoELayer) -> None:
        def forward(hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            mixture: Tensor = inner[layer.index](hidden, ids, weights)
            layer.experts.forward = inner[layer.index]  # type: ignore[method-assign]
            for rows in torch.split(reading.rows, reading.sizes):
                found = by_hand(layer, maps, rank, hidden[rows], ids[rows], weights[rows])
                mixture[rows] = found[0]
                seen.append(found[1:])
            layer.experts.forward = forward  # type: ignore[method-assign]
            return mixture

        layer.experts.forward = forward  # type: ignore[method-assign]

    for layer in layers:
        replace(layer)
    try:
        yield seen
    finally:
        for layer in layers:
            layer.experts.forward = inner[layer.index]  # type: ignore[method-assign]


def routing(arm: Arm, read: list[Changed]) -> Any:
    def route(layer: MoELayer, step: Step) -> Changed:
        read.append(arm.route(layer, step.ids, step.weights, None, hidden=step.hidden))
        return read[-1]

    return route


@pytest.mark.parametrize("settings", ['"linear"', '"linear", "rank": 2', '"constant"'])
@pytest.mark.parametrize("batch", [2, 5])
def test_freed_slots_are_answered_by_their_own_experts_maps(
    model_dir: Path, mapped: Path, settings: str, batch: int
) -> None:
    model = load_model(str(model_dir))
    layers, reading = moe_layers(model), Reading(PASSAGES, batch)
    arm = parse_arm(f'{{"S": 1, "fill": {settings}}}', Table.load(mapped))
    rank = {'"linear"': RANK, '"constant"': 0}.get(settings, 2)
    read: list[Changed] = []
    with decoded(layers, reading, routing(arm, read)):
        found, _ = reading.run(model)
    with experts_by_hand(layers, reading, load_file(beside(mapped)), rank) as seen:
        wanted, _ = reading.run(model)
    stock, _ = reading.run(model)
    assert torch.allclose(found, wanted, atol=1e-4)
    assert (found - stock).abs().max() > 1e-2  # or nothing was compared
    share = (2 * rank + 1) / (3 * 16)  # of an expert of three matrices [H, 16]
    for step, (active, maps) in zip(read, seen, strict=True):
        assert len(step.ids[step.weights != 0].unique()) == active
        assert step.beside == pytest.approx(share * maps)


def test_it_is_reported_with_what_it_reads(
    model_dir: Path, corpus_file: Path, mapped: Path
) -> None:
    texts = {"data": str(corpus_file), "samples": 12, "prompt": 4, "length": 12}
    policies = [f'{{"S": {K}, "fill": "linear"}}', '{"S": 1, "min_active": 1, "fill": "linear"}']
    policies += ['{"S": 1, "min_active": 1, "fill": "linear", "tau": 0}']
    output = str(mapped.with_name("e.json"))
    found = run(str(model_dir), str(mapped), output, policies=policies, batches=[4], **texts)
    stock, off, linear, never = (arm["batches"]["4"] for arm in found["arms"])
    assert off["kl"][0] == 0 and off["read"] == stock["read"] == stock["active"]
    assert linear["kl"][0] > 1e-6 and linear["active"][0] < stock["active"][0]
    share = (2 * RANK + 1) / 48
    maps = (linear["read"][0] - linear["active"][0]) / share
    assert 0 < maps <= E - linear["active"][0]
    assert linear["output_error_by_layer"]["0"][0] > 0
    # no replacement may lose anything: every expert is loaded whose map is not perfect
    assert never["kl"][0] == pytest.approx(0, abs=1e-9)


def test_rows_without_a_stand_in_keep_every_bit() -> None:
    mixture = torch.tensor([[[-0.0, 1.0]], [[2.0, -0.0]]], dtype=torch.bfloat16)  # [n, 1, H]
    added = torch.tensor([[0.0, 0.0], [0.5, 0.0]])
    whole = Changed(torch.zeros(2, 1), torch.zeros(2, 1), added).plus(mixture)
    assert whole.shape == mixture.shape and whole[1, 0, 0] == 2.5
    assert torch.signbit(whole[0, 0, 0]) and torch.signbit(mixture[1, 0, 1])


def test_where_experts_weigh_their_input_nothing_can_be_added(mapped: Path) -> None:
    layer = moe_layers(tiny_model("llama4"))[0]
    table = Table.load(mapped)
    arm = Arm("linear", Policy(S=1, fill="linear"), table)
    arm._plans[layer.index, 0] = plan(layer)
    ids = torch.tensor([[0, 1]] * 3)
    with pytest.raises(PolicyError, match="cannot be given linear stand-ins: its experts weigh"):
        arm.route(layer, ids, torch.rand(3, 2), None, hidden=torch.randn(3, HIDDEN))


def test_maps_that_are_not_there_are_refused(mapped: Path, table: Table) -> None:
    with pytest.raises(PolicyError, match='fill="linear" needs linear maps, and the table was'):
        parse_arm('{"S": 1, "fill": "linear"}', table)
    with pytest.raises(PolicyError, match="rank=5 exceeds that of the maps, 4: lower it"):
        parse_arm('{"S": 1, "fill": "linear", "rank": 5}', Table.load(mapped))
    with pytest.raises(PolicyError, match='fill="constant" needs linear maps'):
        served_policies(['{"S": 1, "layers": {"1": {"fill": "constant"}}}'], table)
