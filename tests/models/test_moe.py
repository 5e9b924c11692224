"""Watching a model changes nothing; asking for one expert gives that expert; re-routing is real."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from sere.kernels import Plan
from sere.models.moe import MoELayer, NoExpertsError, moe_layers, observed, rerouted
from sere.policy import Policy
from tests.conftest import enlarge_experts

COMMON: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
# family: (its own settings, indices of the MoE layers)
FAMILIES: dict[str, tuple[dict[str, Any], list[int]]] = {
    "Qwen3Moe": ({"num_experts": 8, "moe_intermediate_size": 16, "head_dim": 16}, [0, 1]),
    "Qwen2Moe": (
        {"num_experts": 8, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
        [0, 1],
    ),
    "Mixtral": ({"num_local_experts": 8}, [0, 1]),
    "Olmoe": ({"num_experts": 8}, [0, 1]),
    "GptOss": ({"num_local_experts": 8, "head_dim": 16}, [0, 1]),
    "DeepseekV3": (
        {
            "n_routed_experts": 8,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 1,
            "n_group": 2,
            "topk_group": 1,
            "kv_lora_rank": 8,
            "q_lora_rank": 8,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 8,
        },
        [1],
    ),
}
IDS = torch.randint(1, 64, (2, 3), generator=torch.Generator().manual_seed(0))


def tiny(family: str) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**COMMON, **FAMILIES[family][0])
    model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
    enlarge_experts(model)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(std=0.02)  # larger, and all tokens choose alike
    return model


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS).logits


def expert_by_hand(experts: Any, e: int, x: Tensor) -> Tensor:
    """One expert's output from its parameters, in float64."""
    x, up, down = x.double(), experts.gate_up_proj[e].double(), experts.down_proj[e].double()
    if hasattr(experts, "gate_up_proj_bias"):  # gpt-oss: interleaved, clamped, transposed, biased
        both = x @ up + experts.gate_up_proj_bias[e]
        gate, value = both[:, 0::2].clamp(max=7.0), both[:, 1::2].clamp(-7.0, 7.0)
        return (value + 1) * gate * torch.sigmoid(1.702 * gate) @ down + experts.down_proj_bias[e]
    gate, value = linear(x, up).chunk(2, dim=-1)
    return linear(silu(gate) * value, down)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_watched_without_a_trace_and_computed_right(family: str) -> None:
    model = tiny(family)
    layers = moe_layers(model)
    assert [layer.index for layer in layers] == FAMILIES[family][1]
    assert {layer.E for layer in layers} == {8}
    seen: list[int] = []

    def compare(layer: MoELayer, hidden: Tensor, ids: Tensor, weights: Tensor) -> None:
        assert hidden.shape == (6, 32)
        assert ids.shape == weights.shape == (6, 2)
        outputs = layer.outputs(hidden)
        by_hand = torch.stack([expert_by_hand(layer.experts, e, hidden) for e in range(8)])
        assert by_hand.abs().max() > 0.1
        torch.testing.assert_close(outputs, by_hand.float(), atol=1e-4, rtol=1e-4)
        seen.append(layer.index)

    stock = logits(model)
    with observed(layers, compare):
        watched = logits(model)
    assert seen == FAMILIES[family][1]
    assert torch.equal(watched, stock)


@pytest.mark.parametrize("family", FAMILIES)
def test_re_routing_equals_a_mixture_made_by_hand(family: str) -> None:
    """Six tokens' first choices may serve; every second choice goes to the nearest of them."""
    model = tiny(family)
    layers = moe_layers(model)
    last = layers[-1]
    similarity = torch.rand(8, 8, generator=torch.Generator().manual_seed(0))
    plan = Plan.build(similarity, Policy(S=1, min_active=1), K=2)
    plans = {layer.index: Plan.off(8) for layer in layers} | {last.index: plan}
    caught: dict[str, Tensor] = {}

    def catch(layer: MoELayer, hidden: Tensor, ids: Tensor, weights: Tensor) -> None:
        if layer is last:
            caught.update(hidden=hidden, ids=ids, weights=weights)

    with observed(layers, catch):
        stock = logits(model)
    results: list[Tensor] = []
    with rerouted(layers, plans, lambda: None):
        # Registered while re-routing: sees what the experts module hands back.
        handle = last.experts.register_forward_hook(lambda m, i, out: results.append(out))
        changed = logits(model)
        handle.remove()
    assert not torch.equal(changed, stock)

    ids, weights, hidden = caught["ids"], caught["weights"], caught["hidden"]
    best = weights.argmax(1)
    primary = {int(ids[t, best[t]]) for t in range(len(ids))}
    expected = torch.zeros(6, 32, dtype=torch.float64)
    moved = 0
    for t in range(6):
        for k in range(2):
            e = int(ids[t, k])
            if e not in primary:
                e, moved = max(primary, key=lambda v: similarity[e, v].item()), moved + 1
            expected[t] += weights[t, k] * expert_by_hand(last.experts, e, hidden[t : t + 1])[0]
    assert moved > 0
    torch.testing.assert_close(
        results[0].detach().reshape(6, 32), expected.float().detach(), atol=1e-4, rtol=1e-4
    )


def test_as_many_primaries_as_experts_per_token_change_no_bit() -> None:
    model = tiny("Qwen3Moe")
    layers = moe_layers(model)
    similarity = torch.rand(8, 8, generator=torch.Generator().manual_seed(0))

    def run(S: int) -> Tensor:
        plan = Plan.build(similarity, Policy(S=S, min_active=1), K=2)
        with rerouted(layers, {layer.index: plan for layer in layers}, lambda: None):
            return logits(model)

    stock = logits(model)
    assert torch.equal(run(S=2), stock)
    assert not torch.equal(run(S=1), stock)


def fail(*_: object) -> None:
    raise RuntimeError("in the middle of a forward pass")


@pytest.mark.parametrize("observer", [lambda *_: None, fail])
def test_the_model_is_as_before_afterwards(observer: Callable[..., None]) -> None:
    model = tiny("Qwen3Moe")
    layers = moe_layers(model)
    stock, before = logits(model), [dict(vars(layer.experts)) for layer in layers]
    try:
        with observed(layers, observer):
            assert [dict(vars(layer.experts)) for layer in layers] != before
            logits(model)
    except RuntimeError:
        assert observer is fail
    assert [dict(vars(layer.experts)) for layer in layers] == before
    assert torch.equal(logits(model), stock)


def test_an_offloaded_module_is_watched_inside_its_wrapper() -> None:
    """accelerate replaces `forward` and keeps the true one as `_old_forward`: weights are there
    only between the two, and are fetched once for all experts."""
    model = tiny("Qwen3Moe")
    layers = moe_layers(model)
    fetched = []
    for layer in layers:
        experts = layer.experts
        loaded, experts.down_proj.data = experts.down_proj.data, torch.empty(0)
        experts._old_forward = experts.forward

        def wrapper(*args: Tensor, experts: Any = experts, loaded: Tensor = loaded) -> Tensor:
            experts.down_proj.data = loaded
            fetched.append(1)
            try:
                return experts._old_forward(*args)
            finally:
                experts.down_proj.data = torch.empty(0)

        experts.forward = wrapper
    sizes = []
    with observed(layers, lambda layer, hidden, i, w: sizes.append(layer.outputs(hidden).shape)):
        logits(model)
    assert sizes == [(8, 6, 32)] * 2
    assert len(fetched) == 2


def test_models_that_cannot_be_re_routed_are_refused_with_the_reason() -> None:
    small = {**COMMON, "num_hidden_layers": 1}
    small.pop("num_experts_per_tok")
    dense = transformers.LlamaForCausalLM(transformers.LlamaConfig(**small))
    with pytest.raises(NoExpertsError, match=r"LlamaForCausalLM has no routed experts.*Mixture"):
        moe_layers(dense)
    dense.config.model_type = "nllb-moe"
    with pytest.raises(NoExpertsError, match="nllb-moe is not supported: its experts module"):
        moe_layers(dense)
