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
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sere.moe import MoELayer, routed


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
    prompts; what is neither of the two is padding.
    """

    def __init__(self, passages: Sequence[Passage], batch: int) -> None:
        length = max(len(passage.tokens) for passage in passages)
        self.ids = torch.zeros(len(passages), length, dtype=torch.long)
        self.mask = torch.zeros_like(self.ids)
        steps: dict[tuple[int, int], list[int]] = {}
        prompts: list[int] = []
        for i, passage in enumerate(passages):
            self.ids[i, : len(passage.tokens)] = torch.tensor(passage.tokens)
            self.mask[i, : len(passage.tokens)] = 1
            prompts.extend(range(i * length, i * length + passage.start))
            for j in range(len(passage.continuation) - 1):  # the last token is never fed
                steps.setdefault((i // batch, j), []).append(i * length + passage.start + j)
        self.rows = torch.tensor([row for step in steps.values() for row in step])
        self.prompts = torch.tensor(prompts)
        self.sizes = [len(step) for step in steps.values()]
        self.batch_of = [number for number, _ in steps]

    def logits(self, model: nn.Module, stretch: slice = slice(None)) -> Tensor:
        """[passages, length, vocabulary] float32."""
        device = next(model.parameters()).device
        with torch.no_grad():
            output = model(
                input_ids=self.ids.to(device), attention_mask=self.mask.to(device), use_cache=False
            )
        logits: Tensor = output.logits[:, stretch]
        return logits.float()


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


Route = Callable[[MoELayer, Step], tuple[Tensor, Tensor]]


@contextmanager
def decoded(layers: list[MoELayer], reading: Reading, route: Route) -> Iterator[None]:
    """Run forward passes over `reading` with `route(layer, step)` deciding every decode step's ids
    and weights [n, K].

    Rows of prompts run apart from all others, so that not even a rounding of theirs depends on how
    those are routed.
    """

    def change(
        layer: MoELayer, hidden: Tensor, ids: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        if len(hidden) != reading.ids.numel():
            raise RuntimeError(
                f"{layer.name}: it sees {len(hidden)} rows where {reading.ids.numel()} tokens were "
                "fed: this architecture cannot be evaluated in one pass"
            )
        new_ids, new_weights = ids.clone(), weights.clone()
        for number, rows in enumerate(torch.split(reading.rows.to(ids.device), reading.sizes)):
            step = Step(number, rows, hidden[rows], ids[rows], weights[rows])
            new_ids[rows], new_weights[rows] = route(layer, step)
        return new_ids, new_weights

    with routed(layers, change, apart=reading.prompts):
        yield


@contextmanager
def router_logits(model: nn.Module, layers: list[MoELayer]) -> Iterator[dict[int, Tensor]]:
    """By layer index, the router's latest output over all experts [T, E].

    Raises `ValueError` for a model whose routers are not modules beside their experts.
    """
    seen: dict[int, Tensor] = {}
    handles = [
        router.register_forward_hook(_keeping(seen, layer))
        for layer in layers
        for router in _routers(model, layer)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _routers(model: nn.Module, layer: MoELayer) -> list[nn.Module]:
    block = model.get_submodule(layer.name.rpartition(".")[0])
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


def _keeping(seen: dict[int, Tensor], layer: MoELayer) -> Callable[[nn.Module, Any, Any], None]:
    def keep(_module: nn.Module, _arguments: Any, output: Any) -> None:
        for part in output if isinstance(output, tuple) else (output,):
            if part.is_floating_point() and part.shape[-1] == layer.E:
                seen[layer.index] = part.detach().flatten(0, -2).float()
                return

    return keep


def scores_of(logits: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """[T, E]: softmax or sigmoid of the logits, whichever the weights are proportional to."""
    candidates = [logits.softmax(-1), logits.sigmoid()]

    def spread(scores: Tensor) -> float:
        ratio = weights.float() / scores.gather(1, ids.long()).clamp(min=1e-20)
        return (ratio.std(1) / ratio.mean(1)).nan_to_num(0).median().item()

    return min(candidates, key=spread)
