"""Every architecture with routed experts keeps the same promises, held against maths by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from sere.calibration.reading import in_memory, streamed
from sere.calibration.unfinished import Unfinished
from sere.kernels import Plan, reroute
from sere.models.moe import UNSUPPORTED, MoELayer, NoExpertsError, moe_layers, observed, rerouted
from sere.policy import Policy
from sere.table import LayerStatistics
from sere.text.corpus import Corpus
from tests.tiny_models import ARCHITECTURES, VOCABULARY, tiny_inputs, tiny_model

# One of each shape; the others run with `-m matrix`.
SHAPES = (
    "qwen3_moe", "gpt_oss", "dbrx", "llama4", "jetmoe", "switch_transformers", "longcat_flash",
    "deepseek_v3",
)  # fmt: skip
every = pytest.mark.parametrize(
    "architecture",
    [a if a in SHAPES else pytest.param(a, marks=pytest.mark.matrix) for a in ARCHITECTURES],
)
# Where a token has a single expert: re-routing by S=1 can never move it.
ONE_EXPERT = {"switch_transformers", "zaya"}
Chosen = tuple[Tensor, Tensor, Tensor]


@torch.inference_mode()
def result(architecture: str, model: Any, rows: int = 3, length: int = 7) -> Tensor:
    """Logits, or the last hidden state of a model without a head."""
    output: Tensor = model(**tiny_inputs(architecture, rows, length), use_cache=False)[0]
    return output


def watched(
    architecture: str, model: Any, layers: list[MoELayer], rows: int = 3, length: int = 7
) -> dict[int, list[Chosen]]:
    """What every MoE layer got in one forward pass, call by call."""
    calls: dict[int, list[Chosen]] = {layer.index: [] for layer in layers}

    def note(layer: MoELayer, hidden: Tensor, ids: Tensor, weights: Tensor) -> None:
        calls[layer.index].append((hidden.clone(), ids.clone(), weights.clone()))

    with observed(layers, note):
        result(architecture, model, rows, length)
    return calls


# Each expert from its weights, architecture by architecture.


def expert_by_hand(layer: MoELayer, e: int, x: Tensor) -> Tensor:
    """Expert e on x [n, H]."""
    experts: Any = layer.experts
    kind = type(experts).__name__
    if kind == "SwitchTransformersExperts":
        expert = experts[f"expert_{e}"]
        return linear(expert.act(linear(x, expert.wi.weight)), expert.wo.weight)
    if kind == "JetMoeMoE":
        gate, up = linear(x, experts.input_linear.weight[e]).chunk(2, -1)
        return linear(experts.activation(gate) * up, experts.output_linear.weight[e])
    if kind == "Llama4TextMoe":
        gate, up = (x @ experts.experts.gate_up_proj[e]).chunk(2, -1)
        return (experts.experts.act_fn(gate) * up) @ experts.experts.down_proj[e]
    if kind == "DbrxExperts":
        w1, v1, w2 = (
            w.view(experts.num_experts, -1, x.shape[1])[e]
            for w in (experts.mlp.w1, experts.mlp.v1, experts.mlp.w2)
        )
        return (experts.mlp.activation_fn(x @ w1.T) * (x @ v1.T)) @ w2
    if kind == "NemotronHExperts":
        return linear(experts.act_fn(linear(x, experts.up_proj[e])), experts.down_proj[e])
    transposed = kind in ("GptOssExperts", "AriaExperts", "OpenAIPrivacyFilterExperts")
    multiply: Callable[[Tensor, Tensor], Tensor] = torch.matmul if transposed else linear
    both, down = multiply(x, experts.gate_up_proj[e]), experts.down_proj[e]
    if kind in ("GptOssExperts", "OpenAIPrivacyFilterExperts"):
        both = both + experts.gate_up_proj_bias[e]
        gate, up = (both[:, ::2], both[:, 1::2]) if "GptOss" in kind else both.chunk(2, -1)
        gate, up = gate.clamp(max=experts.limit), up.clamp(-experts.limit, experts.limit)
        inner = (up + 1) * gate * torch.sigmoid(experts.alpha * gate)
        return multiply(inner, down) + experts.down_proj_bias[e]
    return multiply(_gated(experts, kind, both), down)


def _gated(experts: Any, kind: str, both: Tensor) -> Tensor:
    gate, up = both.chunk(2, -1)
    if kind == "Step3p7Experts":
        gate, limit = experts.act_fn(gate), experts.limit
        return gate * up if limit is None else gate.clamp(max=limit) * up.clamp(-limit, limit)
    if kind in ("DeepseekV4Experts", "HYV4Experts", "Glm5NextTextExperts", "MiniMaxM3VLExperts"):
        limit = getattr(experts, "swiglu_limit", None) or experts.limit
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    if kind == "MiniMaxM3VLExperts":
        return (up + 1) * gate * torch.sigmoid(experts.swiglu_alpha * gate)
    act = silu if kind in ("HYV4Experts", "Glm5NextTextExperts") else experts.act_fn
    return act(gate) * up


def assert_near(found: Tensor, expected: Tensor) -> None:
    """Up to the rounding of sums in another order."""
    assert found.shape == expected.shape
    assert (found - expected).norm() <= 1e-6 * expected.norm()


@every
@torch.inference_mode()
def test_experts_are_asked_one_by_one(architecture: str) -> None:
    model = tiny_model(architecture)
    layers = moe_layers(model)
    for layer, calls in zip(layers, watched(architecture, model, layers).values(), strict=True):
        hidden = calls[0][0]
        outputs = layer.outputs(hidden)
        assert outputs.shape[0] == layer.E
        assert outputs.std() > 0
        for e in range(layer.E):
            assert_near(outputs[e], expert_by_hand(layer, e, hidden))


@every
def test_watching_and_identity_change_no_bit_and_hooks_restore(architecture: str) -> None:
    model = tiny_model(architecture)
    stock = result(architecture, model)
    assert torch.isfinite(stock).all()
    layers = moe_layers(model)
    attributes = [dict(vars(module)) for module in model.modules()]
    calls = watched(architecture, model, layers)
    assert {index: len(each) for index, each in calls.items()} == dict.fromkeys(calls, 1)

    def note(*_: Any) -> None:
        called.append(1)

    called: list[int] = []
    with observed(layers, note):
        assert torch.equal(result(architecture, model), stock)
    assert len(called) == len(layers)
    off = {layer.index: Plan.off(layer.E) for layer in layers}
    with rerouted(layers, off, lambda: None):
        assert torch.equal(result(architecture, model), stock)
    assert [dict(vars(module)) for module in model.modules()] == attributes
    assert torch.equal(result(architecture, model), stock)


@every
@torch.inference_mode()
def test_re_routing_mixes_the_experts_it_says(architecture: str) -> None:
    """The first MoE layer's output, re-routed, against the mixture of its experts by hand.

    With S=1 all slots fall on the tokens' first experts, but where these are fewer than a row has
    slots: then its best other expert stays.
    """
    model = tiny_model(architecture)
    layers = moe_layers(model)
    first, plans = layers[0], {layer.index: plan(layer) for layer in layers}
    for length in range(12, 1, -1):  # of few experts, many tokens choose each first
        stock = result(architecture, model, 1, length)
        hidden, ids, weights = watched(architecture, model, layers, 1, length)[first.index][0]
        if not torch.equal(reroute(ids, weights, plans[first.index])[0], ids):
            break
    outputs: list[Any] = []
    handle = first.experts.register_forward_hook(lambda _module, _args, out: outputs.append(out))
    with rerouted(layers, plans, lambda: None):
        moved = result(architecture, model, 1, length)
    handle.remove()
    new, weights = reroute(ids, weights, plans[first.index])
    if architecture in ONE_EXPERT:
        assert torch.equal(new, ids) and torch.equal(moved, stock)
    else:
        assert not torch.equal(new, ids)
        assert not torch.equal(moved, stock)
    found: Tensor = outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]
    expected = mixture_by_hand(first, hidden, new, weights)
    assert_near(found.reshape(expected.shape), expected)


def plan(layer: MoELayer) -> Plan:
    similarity = torch.rand(layer.E, layer.E, generator=torch.Generator().manual_seed(layer.index))
    return Plan.build(similarity, Policy(S=1, min_active=1), K=2)


def mixture_by_hand(layer: MoELayer, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """What the module `layer.experts` returns for these ids."""
    experts: Any = layer.experts
    if type(experts).__name__ == "Llama4TextMoe":  # weights scale the inputs, and add up there
        scores = torch.zeros(len(hidden), layer.E).scatter_add_(1, ids, weights)
        mixed: Tensor = experts.shared_expert(hidden)
        for e in range(layer.E):
            mixed = mixed + expert_by_hand(layer, e, scores[:, e : e + 1] * hidden)
        return mixed
    mixed = torch.zeros_like(hidden)
    if type(experts).__name__ == "JetMoeMoE":
        mixed = mixed + experts.bias
    outputs = torch.stack([expert_by_hand(layer, e, hidden) for e in range(layer.E)])
    for k in range(ids.shape[1]):
        answer = outputs[ids[:, k].clamp(max=layer.E - 1), torch.arange(len(hidden))]
        answer = torch.where(
            ids[:, k, None] < layer.E, answer, hidden
        )  # longcat's identity experts
        mixed = mixed + weights[:, k, None] * answer
    return mixed


@every
def test_streamed_in_memory_and_resumed_are_equal_to_the_bit(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(architecture)
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    random = torch.Generator().manual_seed(0)
    texts = [torch.randint(3, VOCABULARY, (n,), generator=random).tolist() for n in (9, 4, 7, 6, 3)]
    corpus = Corpus(texts, "random tokens", 9, 0)
    work = tmp_path / "work"
    work.mkdir()
    memory = in_memory(str(folder), corpus, "frobenius", 2, None, False)
    by_layer = streamed(str(folder), corpus, "frobenius", 2, None, work / "whole", False)
    same(memory.statistics, by_layer.statistics)
    keep, kept = Unfinished.keep, []

    def stops(self: Unfinished, batch: int, output: Any) -> Any:
        kept.append(batch)
        if len(kept) == 3 + 2:  # the second batch of the second decoder layer
            raise KeyboardInterrupt
        return keep(self, batch, output)

    monkeypatch.setattr(Unfinished, "keep", stops)
    with pytest.raises(KeyboardInterrupt):
        streamed(str(folder), corpus, "frobenius", 2, None, work / "stopped", False)
    monkeypatch.setattr(Unfinished, "keep", keep)
    resumed = streamed(str(folder), corpus, "frobenius", 2, None, work / "stopped", False)
    same(memory.statistics, resumed.statistics)


def same(one: dict[int, LayerStatistics], other: dict[int, LayerStatistics]) -> None:
    assert list(one) == list(other)
    for index, mine in one.items():
        assert mine.tokens == other[index].tokens > 0
        for name in ("similarity", "load", "gram", "cosine", "directed", "directed_energy"):
            found = getattr(other[index], name)
            assert torch.equal(getattr(mine, name), found), f"{name} of layer {index}"


def test_every_architecture_of_transformers_is_named() -> None:
    """Whoever updates transformers is told of new ones."""
    folder = Path(transformers.__file__).parent / "models"
    marks = ("use_experts_implementation", "Experts(nn.Module", "MoE(nn.Module")
    with_experts = {
        path.parent.name
        for path in folder.glob("*/modeling_*.py")
        if any(mark in path.read_text("utf-8") for mark in marks)
    }
    refused = {name.replace("-", "_") for name in UNSUPPORTED}
    assert with_experts == {*ARCHITECTURES, *refused}


@pytest.mark.parametrize("architecture", UNSUPPORTED)
def test_what_cannot_be_calibrated_is_refused_with_the_reason(architecture: str) -> None:
    model = nn.Module()
    model.config = SimpleNamespace(model_type=architecture)  # type: ignore[assignment]
    with pytest.raises(NoExpertsError, match=f"{architecture} is not supported: its experts"):
        moe_layers(model)


def test_the_published_table_is_of_this_transformers_and_all_green() -> None:
    text = (Path(__file__).parents[2] / "docs" / "architectures.md").read_text("utf-8")
    cells = [line.strip("| ").split(" | ") for line in text.splitlines()]
    rows = [row for row in cells if row[0] in ARCHITECTURES]
    assert [row[0] for row in rows] == list(ARCHITECTURES)
    assert {cell for row in rows for cell in row[3:]} == {"yes"}
    assert f"transformers {transformers.__version__}" in text
    assert all(f"`{name}`" in text for name in UNSUPPORTED)
