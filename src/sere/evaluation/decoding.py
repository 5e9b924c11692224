"""What batched decoding would compute, from one teacher-forced pass.

Decode step j of a batch feeds token j of every continuation that is long enough; those rows decide
together which experts are loaded. All tokens being known, one forward pass over whole passages can
compute every step at once: at each MoE layer its rows are taken apart by step, and the operator
that serving runs sees one step after the other. The result equals token-by-token decoding with a
cache (tested), and no engine is needed. Prompts keep their routing, as in serving.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sere.models.adapters import Changed
from sere.models.moe import MoELayer, routed


@dataclass(frozen=True)
class Passage:
    """A prompt and its continuation; start: index of the continuation's first token, >= 1."""

    tokens: list[int]
    start: int

    @property
    def continuation(self) -> list[int]:
        return self.tokens[self.start :]


class Reading:
    """Passages as one right-padded forward pass, decoded in batches of `batch`.

    rows: [n], the rows (of passages x positions, flattened) that are decoded, step after step.
    sizes: how many rows each step has. batch_of: the batch of each step. prompts: the rows of the
    prompts; what is neither of the two is padding. made: the rows whose logits say a continuation's
    tokens, passage after passage: the prompt's last, then those that are decoded.
    """

    def __init__(self, passages: Sequence[Passage], batch: int) -> None:
        length = max(len(passage.tokens) for passage in passages)
        self.ids = torch.zeros(len(passages), length, dtype=torch.long)
        self.mask = torch.zeros_like(self.ids)
        steps: dict[tuple[int, int], list[int]] = {}
        prompts: list[int] = []
        made: list[int] = []
        for i, passage in enumerate(passages):
            self.ids[i, : len(passage.tokens)] = torch.tensor(passage.tokens)
            self.mask[i, : len(passage.tokens)] = 1
            first, end = i * length + passage.start, i * length + len(passage.tokens)
            prompts.extend(range(i * length, first))
            made.extend(range(first - 1, end - 1))
            for j in range(len(passage.continuation) - 1):  # the last token is never fed
                steps.setdefault((i // batch, j), []).append(first + j)
        self.rows = torch.tensor([row for step in steps.values() for row in step])
        self.prompts, self.made = torch.tensor(prompts), torch.tensor(made)
        self.sizes = [len(step) for step in steps.values()]
        self.batch_of = [number for number, _ in steps]

    def run(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        """One forward pass: logits [made, vocabulary] float32, and what the output matrix is given
        of the prompts [prompts, H].

        No other row meets the output matrix: at 150,000 tokens a row's logits are 0.6 MB.
        """
        device = next(model.parameters()).device
        given: list[Tensor] = []

        def narrow(_module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor]:
            hidden = arguments[0].flatten(0, -2)
            given.append(hidden[self.prompts.to(hidden.device)])
            return (hidden[self.made.to(hidden.device)][None],)

        handle = output_matrix(model).register_forward_pre_hook(narrow)
        try:
            with torch.no_grad():
                output = model(
                    input_ids=self.ids.to(device),
                    attention_mask=self.mask.to(device),
                    use_cache=False,
                )
        finally:
            handle.remove()
        return output.logits[0].float(), given[0]


def output_matrix(model: Any) -> nn.Module:
    """The module that makes logits [n, vocabulary] of the last hidden states [n, H].

    Raises `ValueError` for a model without one.
    """
    found: nn.Module | None = model.get_output_embeddings()
    if found is None:
        raise ValueError(
            f"{type(model).__name__} has no output matrix: only a model that predicts the next "
            "token can be evaluated"
        )
    return found


@dataclass(frozen=True)
class Step:
    """One decode step at one layer.

    number: of the step. rows: [n], its rows of the forward pass. hidden: [n, H], what the experts
    get. ids, weights: [n, K], the router's choice.
    """

    number: int
    rows: Tensor
    hidden: Tensor
    ids: Tensor
    weights: Tensor


Route = Callable[[MoELayer, Step], tuple[Tensor, Tensor] | Changed]


@contextmanager
def decoded(layers: list[MoELayer], reading: Reading, route: Route) -> Iterator[None]:
    """Run forward passes over `reading` with `route(layer, step)` deciding every decode step's ids
    and weights [n, K], and what is added to the mixture.

    Rows of prompts run apart from all others, so that not even a rounding of theirs depends on how
    those are routed.
    """

    def change(layer: MoELayer, hidden: Tensor, ids: Tensor, weights: Tensor) -> Changed:
        if len(hidden) != reading.ids.numel():
            raise RuntimeError(
                f"{layer.name}: it sees {len(hidden)} rows where {reading.ids.numel()} tokens were "
                "fed: this architecture cannot be evaluated in one pass"
            )
        new_ids, new_weights, added = ids.clone(), weights.clone(), None
        for number, rows in enumerate(torch.split(reading.rows.to(ids.device), reading.sizes)):
            step = Step(number, rows, hidden[rows], ids[rows], weights[rows])
            new_ids[rows], new_weights[rows], more, _ = Changed(*route(layer, step))
            if more is not None:
                added = hidden.new_zeros(hidden.shape, dtype=more.dtype) if added is None else added
                added[rows] = more
        return Changed(new_ids, new_weights, added)

    with routed(layers, change, apart=reading.prompts):
        yield


# Names of what is added to the scores before the top K are chosen, and not to their weights.
_BIASES = ("e_score_correction_bias", "expert_bias")


@dataclass(frozen=True)
class RouterOutput:
    """What a layer's router says of all experts.

    layer: its name. logits: [T, E]. bias: [E], by which the router's choice is biased and its
    weights are not; 0 in most models.
    """

    layer: str
    logits: Tensor
    bias: Tensor

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

    Raises `ValueError` for a model whose routers are not modules beside their experts, or limit a
    token to some groups of experts.
    """
    seen = _Seen()
    handles = [
        router.register_forward_hook(_keeping(seen, layer, _bias(model, layer)))
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
    for router in found:
        groups, allowed = (getattr(router, name, None) for name in ("num_group", "topk_group"))
        if groups and allowed and allowed < groups:
            raise ValueError(
                f"{layer.name}: its router chooses among the experts of {allowed} groups of "
                f"{groups}; no rival says what its rule is then, and none can be evaluated on "
                "this model"
            )
    return found


def _bias(model: nn.Module, layer: MoELayer) -> Tensor:
    """[E]: of the router or of the block around it."""
    block = _block(model, layer)
    for name, value in (*block.named_parameters(), *block.named_buffers()):
        if name.rpartition(".")[2] in _BIASES and value.numel() == layer.E:
            return value.detach().flatten().float()
    return torch.zeros(layer.E)


def _keeping(seen: _Seen, layer: MoELayer, bias: Tensor) -> Callable[[nn.Module, Any, Any], None]:
    def keep(_module: nn.Module, _arguments: Any, output: Any) -> None:
        for part in output if isinstance(output, tuple) else (output,):
            if part.is_floating_point() and part.shape[-1] == layer.E:
                logits = part.detach().flatten(0, -2)
                seen[layer.index] = RouterOutput(layer.name, logits, bias.to(logits.device))
                return

    return keep
