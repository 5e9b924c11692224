"""One teacher-forced pass against decoding token by token with a cache."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sere.evaluation.decoding import Passage, Reading, RouterOutput, Step, decoded, router_logits
from sere.kernels import Plan, reroute
from sere.models.loading import load_model
from sere.models.moe import LayerChange, MoELayer, moe_layers, routed
from sere.policy import Policy
from sere.table import Table
from tests.models.test_architectures import plan
from tests.tiny_models import ARCHITECTURES, WITHOUT_LOGITS, tiny_model

# Without logits; with a single expert, which S=1 cannot move; without the attention layers that
# transformers' cache wants, tiny as they are.
LEFT_OUT = {*WITHOUT_LOGITS, "zaya", "granitemoehybrid", "kimi_linear", "qwen4_exp"}
# Qwen3 beside one of each kind of router and experts; with `-m matrix` all.
COMMON = ("deepseek_v3", "gpt_oss", "mixtral", "llama4", "dbrx", "olmoe", "jetmoe")
every = pytest.mark.parametrize(
    "architecture",
    [
        a if a in COMMON else pytest.param(a, marks=pytest.mark.matrix)
        for a in ARCHITECTURES
        if a not in LEFT_OUT
    ],
)
PASSAGES = [
    Passage([5, 9, 30, 41, 17, 60, 22], 2),
    Passage([44, 12, 70, 33, 8], 3),
    Passage([71, 2, 3, 90, 14, 15, 16, 80], 1),
    Passage([50, 51, 52], 1),
    Passage([13, 14], 1),  # nothing is ever fed back
]


Pairs = dict[int, list[tuple[Tensor, Tensor]]]


def replacing(chosen: Pairs, seen: Pairs, place: int) -> LayerChange:
    """Notes a row's own choice, and replaces it where one was chosen for it."""

    def change(
        layer: MoELayer, _hidden: Tensor, ids: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        seen[layer.index].append((ids, weights))
        return chosen[layer.index][place] if chosen[layer.index] else (ids, weights)

    return change


@torch.no_grad()
def by_step(model: torch.nn.Module, plans: dict[int, Plan], batch: int) -> list[Tensor]:
    """Logits of every passage's continuation, with a cache, one token at a time for all."""
    layers = moe_layers(model)
    found: list[Tensor] = []
    for start in range(0, len(PASSAGES), batch):
        group = PASSAGES[start : start + batch]
        caches, logits = [], []
        for passage in group:
            output = model(torch.tensor([passage.tokens[: passage.start]]), use_cache=True)
            caches.append(output.past_key_values)
            logits.append([output.logits[0, -1]])
        for j in range(max(len(p.continuation) for p in group) - 1):
            alive = [i for i, p in enumerate(group) if j < len(p.continuation) - 1]
            # every row alone, but with ids decided together: run twice, first to learn the choices
            chosen: Pairs = {layer.index: [] for layer in layers}
            # layer by layer the choices depend on the layers before, hence as many passes as layers
            for depth in range(len(layers) + 1):
                seen: Pairs = {la.index: [] for la in layers}
                outputs = []
                for place, i in enumerate(alive):
                    token = torch.tensor([[group[i].tokens[group[i].start + j]]])
                    cache = copy.deepcopy(caches[i])
                    with routed(layers, replacing(chosen, seen, place)):
                        output = model(token, past_key_values=cache, use_cache=True)
                    outputs.append((cache, output.logits[0, -1]))
                if depth < len(layers):
                    index = layers[depth].index
                    ids = torch.cat([pair[0] for pair in seen[index]])
                    weights = torch.cat([pair[1] for pair in seen[index]])
                    new = reroute(ids, weights, plans[index])
                    chosen[index] = list(zip(*(part.split(1) for part in new), strict=True))
            for i, (cache, last) in zip(alive, outputs, strict=True):
                caches[i] = cache
                logits[i].append(last)
        found += [torch.stack(rows) for rows in logits]
    return found


def whole(model: torch.nn.Module, reading: Reading) -> Tensor:
    """Logits of all positions [passages, length, vocabulary]."""
    with torch.no_grad():
        output = model(input_ids=reading.ids, attention_mask=reading.mask, use_cache=False)
    logits: Tensor = output.logits
    return logits


def strong_model(architecture: str) -> Any:
    """Tiny, and its experts' outputs count."""
    model = tiny_model(architecture)
    if architecture == "jetmoe":  # the only one whose parameters are not named after experts
        for layer in moe_layers(model):
            for part in (layer.experts.input_linear, layer.experts.output_linear):
                part.weight.data.mul_(30)
    return model


def rerouting(plans: dict[int, Plan]) -> Callable[[MoELayer, Step], tuple[Tensor, Tensor]]:
    return lambda layer, step: reroute(step.ids, step.weights, plans[layer.index])


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_one_pass_equals_decoding_step_by_step(model_dir: Path, table: Table, batch: int) -> None:
    model = load_model(str(model_dir))
    policy = Policy(S=1, min_active=1)
    layers = moe_layers(model)
    assert_as_by_step(model, {la.index: table.plan(la.index, policy) for la in layers}, batch)


def assert_as_by_step(model: torch.nn.Module, plans: dict[int, Plan], batch: int) -> None:
    reading = Reading(PASSAGES, batch)
    stock = whole(model, reading)
    with decoded(moe_layers(model), reading, rerouting(plans)):
        logits = whole(model, reading)
    expected = by_step(model, plans, batch)
    changed = 0.0
    for i, passage in enumerate(PASSAGES):
        made = slice(passage.start - 1, len(passage.tokens) - 1)
        assert torch.allclose(logits[i, made], expected[i], atol=2e-5)
        changed = max(changed, (stock[i, made] - expected[i]).abs().max().item())
    # Otherwise nothing was compared. A row alone keeps its K experts, as there are no others.
    assert (changed > 1e-3) == (batch > 1)


@every
def test_one_pass_equals_decoding_step_by_step_in_other_architectures(architecture: str) -> None:
    model = strong_model(architecture)
    assert_as_by_step(model, {layer.index: plan(layer) for layer in moe_layers(model)}, 5)


@every
def test_prompts_keep_every_bit_and_only_what_is_needed_meets_the_output_matrix(
    architecture: str,
) -> None:
    model = strong_model(architecture)
    layers = moe_layers(model)
    plans = {layer.index: plan(layer) for layer in layers}
    reading = Reading(PASSAGES, 5)
    stays = decoded(layers, reading, lambda _, step: (step.ids, step.weights))
    with stays:
        everything, (stock, prompts) = whole(model, reading), reading.run(model)
    assert stock.shape == (sum(len(p.continuation) for p in PASSAGES), everything.shape[-1])
    assert torch.allclose(stock, everything.flatten(0, 1)[reading.made], atol=1e-5)
    with decoded(layers, reading, rerouting(plans)):
        rerouted, (logits, same) = whole(model, reading), reading.run(model)
    assert not torch.equal(logits, stock)
    # jetmoe's experts are part of a block that takes all rows at once: see `Adapter.apart`
    slack = 1e-6 if architecture == "jetmoe" else 0.0
    assert torch.allclose(same, prompts, rtol=0, atol=slack)
    for i, passage in enumerate(PASSAGES):
        before, after = everything[i, : passage.start], rerouted[i, : passage.start]
        assert torch.allclose(after, before, rtol=0, atol=slack)


def test_prompts_do_not_depend_on_the_decoded_rows_by_a_bit(model_dir: Path, table: Table) -> None:
    model = load_model(str(model_dir))
    layers = moe_layers(model)
    reading = Reading(PASSAGES, 5)
    with decoded(layers, reading, lambda _, step: (step.ids, step.weights)):
        stock = whole(model, reading)
    with decoded(layers, reading, lambda _, step: (step.ids * 0, step.weights * 0.5)):
        other = whole(model, reading)
    for i, passage in enumerate(PASSAGES):
        assert torch.equal(stock[i, : passage.start], other[i, : passage.start])
    assert not torch.equal(stock, other)


def test_the_router_is_found_and_read(model_dir: Path) -> None:
    model = load_model(str(model_dir))
    layers = moe_layers(model)
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(layer: MoELayer, step: Step) -> tuple[Tensor, Tensor]:
        seen[layer.index] = step.ids, step.weights
        return step.ids, step.weights

    reading = Reading(PASSAGES[3:4], 1)
    with router_logits(model, layers) as said, decoded(layers, reading, keep):
        whole(model, reading)
        for layer in layers:
            ids, weights = seen[layer.index]
            own = said[layer.index][reading.rows]
            assert torch.equal(own.logits.topk(2).indices.sort().values, ids.sort().values)
            scores = own.scores(ids, weights)
            assert torch.allclose(scores.sum(1), torch.ones(len(ids)))
            places = own.ranks(scores, ids, weights).gather(1, ids)
            assert (places.sort().values == torch.arange(2)).all()


def test_sigmoid_routers_are_told_from_softmax() -> None:
    logits = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    for scores in (logits.softmax(-1), logits.sigmoid()):
        ids = scores.topk(3).indices
        picked = scores.gather(1, ids)
        for weights in (picked, picked / picked.sum(1, keepdim=True) * 2.5):
            said = RouterOutput("layer", logits, torch.zeros(8))
            assert torch.equal(said.scores(ids, weights), scores)
