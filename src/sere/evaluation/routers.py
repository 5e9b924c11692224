"""What routers say of all experts, which other papers' rules need to know."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sere.models.moe import MoELayer

# Names of what is added to the scores before the top K are chosen, and not to their weights.
_BIASES = ("e_score_correction_bias", "expert_bias")


@dataclass(frozen=True)
class RouterOutput:
    """What a layer's router says of all experts.

    layer: its name. logits: [T, E]. bias: [E], by which the router's choice is biased and its
    weights are not; 0 in most models. groups, allowed: of how many groups of neighbouring experts a
    token may use how many; see `limited`.
    """

    layer: str
    logits: Tensor
    bias: Tensor
    groups: int = 1
    allowed: int = 1

    def __getitem__(self, rows: Tensor) -> RouterOutput:
        return replace(self, logits=self.logits[rows])

    def scores(self, ids: Tensor, weights: Tensor) -> Tensor:
        """[T, E] float32: softmax or sigmoid of the logits, whichever the weights [T, K] are
        proportional to; equal to, where every token has but one. Raises `ValueError` if they are
        to neither."""
        own, used = weights.float(), weights != 0
        alone = bool((used.sum(1) <= 1).all())  # all of its token's sum, whatever the scores
        places = ids.long().clamp(0, self.logits.shape[1] - 1)

        def misfit(scores: Tensor) -> Tensor:
            picked = scores.gather(1, places) * used
            if alone:
                return (own - picked).abs() / own.abs().clamp(min=1e-30)
            return (_shares(own) - _shares(picked)).abs()

        logits = self.logits.float()
        # so small a score weighs nothing, but a row that has no other still has a sum to divide by
        candidates = [s.clamp(min=1e-30) for s in (logits.softmax(-1), logits.sigmoid())]
        best = min(candidates, key=lambda scores: misfit(scores).mean().item())
        if (worst := misfit(best).max().item()) > self._rounding(weights):
            how = "that are, with one expert per token," if alone else "in proportion to"
            raise ValueError(
                f"{self.layer}: rivals expect weights {how} the softmax or the sigmoid of the "
                f"router's output; these are off by {worst:.2g} of a token's sum. They cannot be "
                "evaluated on this model"
            )
        return best

    def limited(self, scores: Tensor, ids: Tensor, weights: Tensor) -> tuple[RouterOutput, Tensor]:
        """The same, and the scores [T, E], where a token may use experts of some groups only: to it
        all others score nothing, so that no rule gives it any of them.

        A group is as good as its best expert (DeepSeek-V2) or its best two together (V3), whichever
        agrees with the router's choice. Raises `ValueError` if neither does.
        """
        if self.allowed >= self.groups:
            return self, scores
        wish = (scores + self.bias).view(len(scores), self.groups, -1)
        two = wish.topk(min(2, wish.shape[2])).values.sum(2)
        used = torch.zeros_like(scores).scatter_add_(
            1, ids.long().clamp(0, scores.shape[1] - 1), (weights != 0).float()
        )
        chosen = used.view(len(scores), self.groups, -1).sum(2) > 0

        def misfit(groups: Tensor) -> tuple[float, Tensor]:
            """By how much a group that is left out is better than one that was chosen."""
            first = groups.masked_fill(chosen, torch.inf)
            order = first.argsort(dim=1, descending=True, stable=True)
            within = torch.zeros_like(chosen).scatter_(1, order[:, : self.allowed], True)
            best = groups.masked_fill(within, -torch.inf).amax(1)
            worst = groups.masked_fill(~chosen, torch.inf).amin(1)
            return ((best - worst) / scores.amax(1)).max().item(), within

        off, within = min(map(misfit, (wish.amax(2), two)), key=lambda found: found[0])
        if off > self._rounding(weights) or (chosen.sum(1) > self.allowed).any():
            raise ValueError(
                f"{self.layer}: its router chooses among {self.allowed} groups of {self.groups}, "
                "and not those with the best expert or the best two: rivals cannot be evaluated on "
                "this model"
            )
        inside = within.repeat_interleave(scores.shape[1] // self.groups, dim=1)
        never = ~inside
        bias = self.bias.expand_as(scores).masked_fill(never, -torch.inf)
        logits = self.logits.masked_fill(never, -torch.inf)
        return RouterOutput(self.layer, logits, bias), scores.masked_fill(never, 0)

    def ranks(self, scores: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """[T, E]: the place of every expert in its token's order, 0 for the best.

        The order is that of score + bias; ties: what the router chose, then the lowest expert.
        Raises `ValueError` if the router's own choice is not the top of this order.
        """
        places = ids.long().clamp(0, scores.shape[1] - 1)
        own = torch.zeros_like(scores).scatter_add_(1, places, (weights != 0).float()) > 0
        wish = scores + self.bias
        others = wish.masked_fill(own, -torch.inf)
        excess = (others.amax(1) - wish.masked_fill(~own, torch.inf).amin(1)) / scores.amax(1)
        row = int(excess.argmax())
        if excess[row] > self._rounding(weights):
            raise ValueError(
                f"{self.layer}: rivals expect a router to choose the largest scores"
                f"{' + bias' if self.bias.any() else ''}; this one chose experts "
                f"{ids[row].tolist()} and passed over {int(others[row].argmax())}. They cannot be "
                "evaluated on this model"
            )
        order = wish.argsort(dim=1, descending=True, stable=True)
        own_first = own.gather(1, order).int().argsort(dim=1, descending=True, stable=True)
        return order.gather(1, own_first).argsort(dim=1)

    def _rounding(self, weights: Tensor) -> float:
        """What lies between a router that computes in its own precision and this, as a share."""
        return max(1e-5, *(torch.finfo(part.dtype).eps for part in (self.logits, weights)))


def _shares(weights: Tensor) -> Tensor:
    return weights / weights.sum(1, keepdim=True).clamp(min=1e-30)


class _Seen(dict[int, RouterOutput]):
    def __missing__(self, index: int) -> RouterOutput:
        raise ValueError(
            f"layer {index}: its router has not said anything of all experts before they are "
            "called; rivals need that and cannot be evaluated on this model"
        )


@contextmanager
def router_logits(model: nn.Module, layers: list[MoELayer]) -> Iterator[dict[int, RouterOutput]]:
    """By layer index, what the router said of all tokens [T, E] of the latest forward pass.

    Raises `ValueError` for a model whose routers are not modules beside their experts.
    """
    seen = _Seen()
    handles = [
        router.register_forward_hook(_keeping(seen, layer, _bias(model, layer), _groups(router)))
        for layer in layers
        for router in _routers(model, layer)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _block(model: nn.Module, layer: MoELayer) -> nn.Module:
    return model.get_submodule(layer.name.rpartition(".")[0])


def _routers(model: nn.Module, layer: MoELayer) -> list[nn.Module]:
    block = _block(model, layer)
    found = [
        module
        for name, module in block.named_children()
        if name in ("gate", "router") or type(module).__name__.endswith(("Router", "Gate"))
    ]
    if not found:
        raise ValueError(
            f"{layer.name}: no router beside it (has {[n for n, _ in block.named_children()]}); "
            "rivals need all experts' scores and cannot be evaluated on this model"
        )
    return found


def _groups(router: nn.Module) -> tuple[int, int]:
    """Of how many groups of experts a token may use how many."""
    if getattr(router, "topk_method", None) == "greedy":  # DeepSeek-V2-Lite: says, and ignores it
        return 1, 1
    found = [getattr(router, name, None) for name in ("num_group", "n_group", "topk_group")]
    groups = found[0] or found[1]
    return (groups, found[2] or groups) if groups else (1, 1)


def _bias(model: nn.Module, layer: MoELayer) -> Tensor:
    """[E]: of the router or of the block around it."""
    block = _block(model, layer)
    for name, value in (*block.named_parameters(), *block.named_buffers()):
        if name.rpartition(".")[2] in _BIASES and value.numel() == layer.E:
            return value.detach().flatten().float()
    return torch.zeros(layer.E)


def _keeping(
    seen: _Seen, layer: MoELayer, bias: Tensor, groups: tuple[int, int]
) -> Callable[[nn.Module, Any, Any], None]:
    def keep(_module: nn.Module, _arguments: Any, output: Any) -> None:
        for part in output if isinstance(output, tuple) else (output,):
            if part.is_floating_point() and part.shape[-1] == layer.E:
                logits = part.detach().flatten(0, -2)
                own = bias.to(logits.device)
                seen[layer.index] = RouterOutput(layer.name, logits, own, *groups)
                return

    return keep
