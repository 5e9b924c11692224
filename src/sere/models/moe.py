"""The MoE layers of any transformers model: find them, watch them, re-route them.

How architectures differ is the business of `sere.models.adapters`. The hook replaces the instance's
innermost `forward` and is not a registered pre-hook: under accelerate's offloading a pre-hook runs
before the weights are loaded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sere.checkpoint import layer_index
from sere.kernels import Plan, reroute
from sere.models.adapters import Adapter, Change, Changed, adapter_of, forward_attribute

# Architectures whose routed experts cannot be calibrated, and why.
UNSUPPORTED = {
    "doge": "its experts are rank-one products of two embeddings and have no outputs to compare",
    "nllb-moe": "its experts module misreads the router's mask in this transformers release, so "
    "that only experts 0 and 1 ever answer",
}
# The decoder layer in a module's name: `model.layers.3` of `model.layers.3.mlp.experts`.
UNIT = re.compile(r"^(.*?(?:layers?|blocks?|h))\.\d+(?=\.|$)")


class NoExpertsError(ValueError):
    """The model has no MoE layer that can be calibrated or re-routed."""


@dataclass(frozen=True)
class MoELayer:
    """One layer's routed experts: name and module, decoder layer index, number of experts."""

    name: str
    index: int
    experts: nn.Module
    adapter: Adapter

    @property
    def E(self) -> int:
        return self.adapter.E

    def mixture(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum of experts' outputs: hidden [n, H], ids and weights [n, K] -> [n, H]
        float32."""
        mixture = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        for expert in torch.unique(ids).tolist():
            share = (weights * (ids == expert)).sum(1)
            rows = share.nonzero().flatten()
            if 0 <= expert < self.E and len(rows):
                output = self.adapter.output(hidden[rows], expert).float()
                mixture[rows] += share[rows, None].float() * output
        return mixture

    def outputs(self, hidden: Tensor) -> Tensor:
        """Every expert on every token: hidden [n, H] -> [E, n, H] float32."""
        outputs = hidden.new_empty(self.E, *hidden.shape, dtype=torch.float32)
        for expert in range(self.E):
            outputs[expert] = self.adapter.output(hidden, expert)
        return outputs


def moe_layers(model: nn.Module) -> list[MoELayer]:
    """All routed experts of a transformers model, by decoder layer.

    Where two stacks of layers have experts (encoder and decoder), the second is numbered after the
    first. Experts for images (ernie4_5_vl_moe) never see text and are left out.
    Raises `NoExpertsError` for dense models and for architectures that cannot be calibrated.
    """
    family = str(getattr(getattr(model, "config", None), "model_type", ""))
    if family in UNSUPPORTED:
        raise NoExpertsError(f"{family} is not supported: {UNSUPPORTED[family]}")
    found = {
        name: (module, adapter)
        for name, module in model.named_modules()
        if "vision" not in name and (adapter := adapter_of(module))
    }
    if not found:
        raise NoExpertsError(
            f"{type(model).__name__} has no routed experts: re-routing needs a "
            "Mixture-of-Experts model"
        )
    if any(getattr(module, "_is_expert_parallel", False) for module, _ in found.values()):
        raise NoExpertsError(
            f"{type(model).__name__} is split over processes (expert parallel): load it in one "
            "process, with device_map or --stream where it is large"
        )
    indices = _indices(list(found))
    layers = [MoELayer(name, indices[name], *found[name]) for name in found]
    layers.sort(key=lambda layer: layer.index)
    if odd := [layer for layer in layers if layer.E != layers[0].E]:
        raise NoExpertsError(
            f"{type(model).__name__}: layers with different numbers of experts (layer "
            f"{layers[0].index}: {layers[0].E}, layer {odd[0].index}: {odd[0].E}) are not supported"
        )
    return layers


def _indices(names: list[str]) -> dict[str, int]:
    """Decoder layer indices, stack after stack."""
    stacks: dict[str, list[str]] = {}
    for name in names:
        match = UNIT.match(name)
        stacks.setdefault(match.group(1) if match else "", []).append(name)
    indices: dict[str, int] = {}
    start = 0
    for stack in stacks.values():
        for name in stack:
            index = start + layer_index(name)
            if index in indices.values():
                raise NoExpertsError(
                    f"{name} shares decoder layer {index} with other routed experts: models with "
                    "several routed-experts modules in a layer are not supported"
                )
            indices[name] = index
        start = max(indices.values()) + 1
    return indices


Observer = Callable[[MoELayer, Tensor, Tensor, Tensor], None]


@contextmanager
def observed(layers: list[MoELayer], observer: Observer) -> Iterator[None]:
    """Call `observer(layer, hidden [T, H], ids [T, K], weights [T, K])` at every MoE layer.

    The model's results do not change by a bit.
    """

    def watch(
        layer: MoELayer, hidden: Tensor, ids: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        observer(layer, hidden, ids, weights)
        return ids, weights

    with routed(layers, watch):
        yield


@contextmanager
def rerouted(
    layers: list[MoELayer],
    plans: dict[int, Plan],
    rows: Callable[[], Tensor | None],
    counters: Tensor | None = None,
) -> Iterator[None]:
    """Run the model with the operator that serving runs.

    plans: by decoder layer index. rows: gives the row classes [T] of the forward pass under way.
    counters: those of all layers together (see `sere.kernels.reroute`).
    """

    def route(
        layer: MoELayer, hidden: Tensor, ids: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        return reroute(ids, weights, plans[layer.index], rows(), counters)

    with routed(layers, route):
        yield


LayerChange = Callable[[MoELayer, Tensor, Tensor, Tensor], tuple[Tensor, Tensor] | Changed]


@contextmanager
def routed(
    layers: list[MoELayer], change: LayerChange, *, apart: Tensor | None = None
) -> Iterator[None]:
    """Run every MoE layer with the (ids, weights), or `Changed`, that `change(layer, hidden [T, H],
    ids [T, K], weights [T, K])` returns.

    apart: indices of rows to run by themselves, so that the others' results do not depend on them
    by a bit (where experts are a module of their own: see `Adapter.apart`).
    """
    with ExitStack() as restore:
        for layer in layers:
            restore.enter_context(_hooked(layer, change, apart))
        yield


@contextmanager
def _hooked(layer: MoELayer, change: LayerChange, apart: Tensor | None) -> Iterator[None]:
    module = layer.adapter.hooked
    attribute = forward_attribute(module)
    inner = getattr(module, attribute)
    had_own = attribute in vars(module)
    inside = False

    def once(hidden: Tensor, ids: Tensor, weights: Tensor) -> Changed:
        nonlocal inside
        inside = True
        try:
            return Changed(*change(layer, hidden, ids, weights))
        finally:
            inside = False

    hook: Change = once
    whole = inner if apart is None else layer.adapter.apart(inner, apart)
    outer = layer.adapter.changed(whole, hook)

    def forward(*arguments: object, **named: object) -> object:
        # the observer itself asks the experts for their outputs
        return inner(*arguments, **named) if inside else outer(*arguments, **named)

    setattr(module, attribute, forward)
    try:
        yield
    finally:
        if had_own:
            setattr(module, attribute, inner)
        else:
            delattr(module, attribute)
