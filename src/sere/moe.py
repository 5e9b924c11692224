"""The MoE layers of any transformers model: find them, watch them, re-route them.

One contract covers almost every architecture: `experts(hidden [T, H], ids [T, K], weights [T, K])`
returns the mixture [T, H]. Asking that module for one expert per token with weight 1 gives the
expert's own output, so nothing here knows how an architecture stores its weights.

The hook replaces the instance's innermost `forward` and not a registered pre-hook: under
accelerate's offloading a pre-hook runs before the weights are loaded.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from sere.checkpoint import layer_index
from sere.kernels import Plan, reroute

# Architectures whose routed experts do not follow the contract, and why.
_UNSUPPORTED = {
    "doge": "its experts are product-key embeddings",
    "nllb_moe": "its experts module ignores the router's choice in this transformers release",
    "llama4": "its experts take a dense batch; an adapter is planned",
    "jetmoe": "it dispatches inside the block; an adapter is planned",
    "switch_transformers": "its experts take one-hot masks; an adapter is planned",
}


class NoExpertsError(ValueError):
    """The model has no MoE layer that can be calibrated or re-routed."""


@dataclass(frozen=True)
class MoELayer:
    """One routed-experts module: its name, decoder layer index, number of experts, the module."""

    name: str
    index: int
    E: int
    experts: nn.Module

    def outputs(self, hidden: Tensor) -> Tensor:
        """Every expert on every token: hidden [n, H] -> [E, n, H] float32."""
        outputs = hidden.new_empty(self.E, *hidden.shape, dtype=torch.float32)
        for expert in range(self.E):
            outputs[expert] = self._output(hidden, expert)
        return outputs

    def _output(self, hidden: Tensor, expert: int) -> Tensor:
        n = hidden.shape[0]
        ids = torch.full((n, 1), expert, dtype=torch.int64, device=hidden.device)
        weights = torch.ones(n, 1, dtype=hidden.dtype, device=hidden.device)
        return _inner_forward(self.experts)(hidden, ids, weights)


def moe_layers(model: nn.Module) -> list[MoELayer]:
    """All routed-experts modules of a transformers model, by decoder layer.

    Raises `NoExpertsError` for dense models and for architectures outside the contract.
    """
    family = str(getattr(getattr(model, "config", None), "model_type", ""))
    if family in _UNSUPPORTED:
        raise NoExpertsError(f"{family} is not supported: {_UNSUPPORTED[family]}")
    layers = [
        MoELayer(name, layer_index(name), int(module.num_experts), module)
        for name, module in model.named_modules()
        if _is_experts(module)
    ]
    if not layers:
        raise NoExpertsError(
            f"{type(model).__name__} has no routed experts: re-routing needs a "
            "Mixture-of-Experts model"
        )
    layers.sort(key=lambda layer: layer.index)
    for one, other in pairwise(layers):
        if one.index == other.index:
            raise NoExpertsError(
                f"{one.name} and {other.name} share decoder layer {one.index}: models with "
                "several routed-experts modules in a layer are not supported"
            )
    return layers


Observer = Callable[[MoELayer, Tensor, Tensor, Tensor], None]


@contextmanager
def observed(layers: list[MoELayer], observer: Observer) -> Iterator[None]:
    """Call `observer(layer, hidden [T, H], ids [T, K], weights [T, K])` at every MoE layer.

    The model's results do not change by a bit.
    """

    def watch(layer: MoELayer, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        observer(layer, hidden.flatten(0, -2), ids, weights)
        return ids

    with _routed(layers, watch):
        yield


@contextmanager
def rerouted(
    layers: list[MoELayer], plans: dict[int, Plan], rows: Callable[[], Tensor | None]
) -> Iterator[None]:
    """Run the model with the operator that serving runs.

    plans: by decoder layer index. rows: gives the row classes [T] of the forward pass under way.
    """

    def route(layer: MoELayer, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return reroute(ids, weights, plans[layer.index], rows())

    with _routed(layers, route):
        yield


@contextmanager
def _routed(
    layers: list[MoELayer], change: Callable[[MoELayer, Tensor, Tensor, Tensor], Tensor]
) -> Iterator[None]:
    with ExitStack() as restore:
        for layer in layers:
            restore.enter_context(_hooked(layer, change))
        yield


@contextmanager
def _hooked(
    layer: MoELayer, change: Callable[[MoELayer, Tensor, Tensor, Tensor], Tensor]
) -> Iterator[None]:
    attribute = _forward_attribute(layer.experts)
    inner = getattr(layer.experts, attribute)
    had_own = attribute in vars(layer.experts)
    inside = False

    def forward(hidden: Tensor, ids: Tensor, weights: Tensor, *rest: object) -> object:
        nonlocal inside
        if inside:  # the observer itself asks the experts for their outputs
            return inner(hidden, ids, weights, *rest)
        inside = True
        try:
            ids = change(layer, hidden, ids, weights)
        finally:
            inside = False
        return inner(hidden, ids, weights, *rest)

    setattr(layer.experts, attribute, forward)
    try:
        yield
    finally:
        if had_own:
            setattr(layer.experts, attribute, inner)
        else:
            delattr(layer.experts, attribute)


def _forward_attribute(module: nn.Module) -> str:
    """`_old_forward` where accelerate has wrapped the module, so that we run inside its load."""
    return "_old_forward" if hasattr(module, "_old_forward") else "forward"


def _inner_forward(module: nn.Module) -> Callable[..., Tensor]:
    inner: Callable[..., Tensor] = getattr(module, _forward_attribute(module))
    return inner


def _is_experts(module: nn.Module) -> bool:
    """Structural: own expert count, own parameters, forward(x, *index*, *weights*)."""
    if not isinstance(getattr(module, "num_experts", None), int):
        return False
    if not any(True for _ in module.parameters()):
        return False
    names = list(inspect.signature(type(module).forward).parameters)[1:4]
    return len(names) == 3 and "ind" in names[1] and "weight" in names[2]
