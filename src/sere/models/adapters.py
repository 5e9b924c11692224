"""The shapes that routed experts take in transformers, behind one face.

Almost every architecture has a module `experts(hidden [T, H], ids [T, K], weights [T, K])` that
returns the mixture [T, H]: asked for one expert a token with weight 1, it gives that expert's own
output, so that nothing here knows how an architecture stores weights. Three have other shapes.

An adapter says which module's forward to replace (`hooked`), how to get one expert's output, and
how to hand the router's choice to a `change` of (hidden, ids, weights) that returns other ids and
weights.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Changed(NamedTuple):
    """What a layer's experts are to do.

    ids, weights: [T, K]. added: [T, H] float32, what is added to their mixture; rows of 0 stay as
    they are, to the bit. None: nothing. beside: what is read for it, in units of the weights of one
    expert; for who counts bytes.
    """

    ids: Tensor
    weights: Tensor
    added: Tensor | None = None
    beside: float = 0.0

    def plus(self, mixture: Tensor) -> Tensor:
        """The mixture, of any shape that holds [T, H], and what is added."""
        if self.added is None:
            return mixture
        whole = mixture.reshape(self.added.shape).clone()
        rows = self.added.any(1)
        whole[rows] = (whole[rows].float() + self.added[rows]).to(whole.dtype)
        return whole.view_as(mixture)


Change = Callable[[Tensor, Tensor, Tensor], Changed]
Forward = Callable[..., Any]


class Adapter(ABC):
    """hooked: the module whose forward is replaced. E: number of routed experts. runs_apart:
    whether `apart` can do what it says. adds: whether `changed` adds to the mixture what it is
    told to."""

    runs_apart = False
    adds = False

    def __init__(self, hooked: nn.Module, E: int) -> None:
        self.hooked, self.E = hooked, E

    @abstractmethod
    def output(self, hidden: Tensor, expert: int) -> Tensor:
        """One expert on every token, with weight 1: hidden [n, H] -> [n, H]."""

    def apart(self, inner: Forward, rows: Tensor) -> Forward:
        """A forward like `inner` that runs `rows` by themselves, if `runs_apart`."""
        return inner

    @abstractmethod
    def changed(self, inner: Forward, change: Change) -> Forward:
        """A forward like `inner` that runs with the ids and weights that `change` returns, and adds
        what it says, where it `adds`."""


class Mixture(Adapter):
    """`experts(hidden, ids, weights)`: 58 architectures."""

    runs_apart = True
    adds = True

    def __init__(self, experts: nn.Module) -> None:
        counts = ("num_routed_experts", "num_experts")  # longcat_flash has identity experts besides
        found: list[int] = [E for name in counts if (E := getattr(experts, name, None))]
        super().__init__(experts, found[0])
        # longcat_flash's forward cannot take a single slot
        self._slots = 2 if hasattr(experts, "zero_expert_num") else 1

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Structural: own expert count, own parameters, forward(x, *index*, *weights*)."""
        counts = (getattr(module, name, None) for name in ("num_experts", "num_routed_experts"))
        if not any(isinstance(E, int) for E in counts):
            return False
        if not any(True for _ in module.parameters()):
            return False
        names = list(inspect.signature(type(module).forward).parameters)[1:4]
        return len(names) == 3 and "ind" in names[1] and "weight" in names[2]

    def output(self, hidden: Tensor, expert: int) -> Tensor:
        ids = torch.full((len(hidden), self._slots), expert, device=hidden.device)
        weights = hidden.new_zeros(len(hidden), self._slots)
        weights[:, 0] = 1
        mixture: Tensor = inner_forward(self.hooked)(hidden, ids, weights)
        return mixture.view_as(hidden)  # dbrx returns [n, 1, H]

    def apart(self, inner: Forward, rows: Tensor) -> Forward:
        def forward(hidden: Tensor, ids: Tensor, weights: Tensor, *rest: Any) -> Any:
            flat = [tensor.flatten(0, -2) for tensor in (hidden, ids, weights)]
            others = torch.ones(len(flat[0]), dtype=torch.bool, device=hidden.device)
            others[rows.to(hidden.device)] = False
            parts = [part for part in (others, ~others) if part.any()]
            mixtures = [inner(*(tensor[part] for tensor in flat), *rest) for part in parts]
            whole = mixtures[0].new_empty(len(flat[0]), *mixtures[0].shape[1:])
            for part, mixture in zip(parts, mixtures, strict=True):
                whole[part] = mixture
            return whole.view_as(hidden) if hidden.ndim > 2 else whole

        return forward

    def changed(self, inner: Forward, change: Change) -> Forward:
        def forward(hidden: Tensor, ids: Tensor, weights: Tensor, *rest: Any) -> Any:
            flat = (hidden.flatten(0, -2), ids.flatten(0, -2), weights.flatten(0, -2))
            new = change(*flat)
            mixture = inner(hidden, new.ids.view_as(ids), new.weights.view_as(weights), *rest)
            return new.plus(mixture)

        return forward


class ScaledInputs(Adapter):
    """llama4: a dense router score [T, E] scales each expert's *input*.

    Two slots of a row on one expert become one input scaled by their sum; all released models have
    K=1, where this cannot happen.
    """

    def __init__(self, block: nn.Module) -> None:
        router: Any = block.router
        super().__init__(router, router.num_experts)
        self._experts: Any = block.experts
        self._K: int = router.top_k

    def output(self, hidden: Tensor, expert: int) -> Tensor:
        inputs = hidden.new_zeros(self.E, *hidden.shape)
        inputs[expert] = hidden
        outputs: Tensor = self._experts(inputs.flatten(0, 1))
        return outputs.view(self.E, *hidden.shape)[expert]

    def changed(self, inner: Forward, change: Change) -> Forward:
        def forward(hidden: Tensor) -> tuple[Tensor, Tensor]:
            scores, logits = inner(hidden)
            weights, ids = scores.topk(self._K)
            ids, weights, *_ = change(hidden, ids, weights)
            return torch.zeros_like(scores).scatter_add_(1, ids, weights), logits

        return forward


class SortedDispatch(Adapter):
    """jetmoe: the router gives slots sorted by expert, the block runs expert after expert."""

    def __init__(self, block: nn.Module) -> None:
        router: Any = block.router
        super().__init__(router, router.num_experts)
        self._block: Any = block
        self._K: int = router.top_k

    def output(self, hidden: Tensor, expert: int) -> Tensor:
        """Without the bias, which is added once to the mixture and not by an expert."""
        sizes = [len(hidden) if e == expert else 0 for e in range(self.E)]
        gate, up = self._block.input_linear(hidden, sizes).chunk(2, dim=-1)
        output: Tensor = self._block.output_linear(self._block.activation(gate) * up, sizes)
        return output

    def changed(self, inner: Forward, change: Change) -> Forward:
        def forward(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor, list[int], Tensor]:
            slots, rows, gates, sizes, logits = inner(hidden)
            experts = torch.arange(self.E, device=slots.device)
            chosen = experts.repeat_interleave(torch.tensor(sizes, device=slots.device))
            ids = torch.empty_like(slots).scatter_(0, slots, chosen).view(-1, self._K)
            weights = torch.empty_like(gates).scatter_(0, slots, gates).view(-1, self._K)
            new, scaled, *_ = change(hidden, ids, weights)
            if torch.equal(new, ids) and torch.equal(scaled, weights):
                return slots, rows, gates, sizes, logits  # even the order of equals, every bit
            slots = new.flatten().argsort(stable=True)
            sizes = new.flatten().bincount(minlength=self.E).tolist()
            return slots, slots // self._K, scaled.flatten()[slots], sizes, logits

        return forward


class OneHot(Adapter):
    """switch_transformers: K=1, as a mask [T, 1, E]; a dropped token's row is empty."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__(experts, int(experts.num_experts))  # type: ignore[arg-type]

    def output(self, hidden: Tensor, expert: int) -> Tensor:
        ids = torch.full((len(hidden), 1), expert, device=hidden.device)
        inner = inner_forward(self.hooked)
        mixture: Tensor = inner(hidden, self._mask(ids), hidden.new_ones(len(hidden), 1))
        return mixture

    def changed(self, inner: Forward, change: Change) -> Forward:
        def forward(hidden: Tensor, mask: Tensor, weights: Tensor) -> Any:
            ids = mask.argmax(-1).where(mask.any(-1), -1)
            ids, weights, *_ = change(hidden, ids, weights)
            return inner(hidden, self._mask(ids), weights)

        return forward

    def _mask(self, ids: Tensor) -> Tensor:
        return nn.functional.one_hot(ids.clamp(min=0), self.E) * (ids >= 0)[..., None]


_OF_CLASS: dict[str, Callable[[nn.Module], Adapter]] = {
    "Llama4TextMoe": ScaledInputs,
    "JetMoeMoE": SortedDispatch,
    "SwitchTransformersExperts": OneHot,
}


def adapter_of(module: nn.Module) -> Adapter | None:
    """The adapter of a module that holds routed experts; None for any other module."""
    if special := _OF_CLASS.get(type(module).__name__):
        return special(module)
    return Mixture(module) if Mixture.fits(module) else None


def forward_attribute(module: nn.Module) -> str:
    """`_old_forward` where accelerate has wrapped the module, so that we run inside its load."""
    return "_old_forward" if hasattr(module, "_old_forward") else "forward"


def inner_forward(module: nn.Module) -> Forward:
    """The module's forward inside whatever accelerate has wrapped around it."""
    inner: Forward = getattr(module, forward_attribute(module))
    return inner
