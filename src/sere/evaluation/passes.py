"""One arm's forward pass over some passages, and what it adds up to beside stock's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sere.evaluation.arms import Arm
from sere.evaluation.decoding import (
    Passage,
    Reading,
    RouterOutput,
    Step,
    decoded,
    output_matrix,
    router_logits,
)
from sere.models.adapters import Changed
from sere.models.moe import MoELayer

# How far prefill may be off where an architecture cannot run its prompts' rows apart.
_ROUNDING = 1e-3


class EvaluationError(ValueError):
    """An evaluation that would not mean anything, and why."""


@dataclass
class Sums:
    """What one batch under one arm adds up to.

    tokens: those whose logits a decode step made; nll, kl, top1 are sums over them, kl in nats from
    stock to the arm. exact: continuations whose every token was the most likely one. lost_answers:
    continuations that were so under stock and are not under the arm. steps: decode steps; rows:
    their rows. prompt_difference: largest difference of a prompt's logits from stock.
    read: what all layers' steps read, in units of one expert's weights: active experts, and maps.
    By layer index: active experts summed over steps, before and after; energy of the difference
    that the arm makes to the layer's output, and of the output itself.
    """

    tokens: int = 0
    nll: float = 0.0
    kl: float = 0.0
    top1: float = 0.0
    passages: int = 0
    exact: int = 0
    lost_answers: int = 0
    steps: int = 0
    rows: int = 0
    prompt_difference: float = 0.0
    read: float = 0.0
    before: dict[str, int] = field(default_factory=dict)
    after: dict[str, int] = field(default_factory=dict)
    lost: dict[str, float] = field(default_factory=dict)
    energy: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Stock:
    """What `Reading.run` gives under stock routing."""

    logits: Tensor
    prompts: Tensor


class Pass:
    """A forward pass over `passages`, decoded in batches of `batch`.

    arm: None runs stock routing and adds nothing up.
    layer_error: also add up what the arm does to the layers' outputs.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: list[MoELayer],
        passages: list[Passage],
        arm: Arm | None = None,
        batch: int | None = None,
        layer_error: bool = False,
    ) -> None:
        self.passages, self._model, self._layers, self._arm = passages, model, layers, arm
        self._batch, self._layer_error = batch or len(passages), layer_error
        self.reading = Reading(passages, self._batch)
        self._sums = [Sums() for _ in range(-(-len(passages) // self._batch))]
        self._steps: list[tuple[Step, Changed]] = []
        self._seen: dict[int, RouterOutput] = {}

    @property
    def K(self) -> int:
        """Experts per token, where an arm's table tells."""
        return self._arm.table.fingerprint.K if self._arm else 0

    def state(self) -> list[dict[str, Any]]:
        """What it has added up in the layers that it is through."""
        return [asdict(own) for own in self._sums]

    def resume(self, state: list[dict[str, Any]]) -> None:
        """Go on from what `state` was at the end of a layer."""
        self._sums = [Sums(**own) for own in state]

    @contextmanager
    def routed(self, layers: list[MoELayer]) -> Iterator[None]:
        """Let the arm route these layers."""
        asking = layers if self._arm and self._arm.needs_logits else []
        with router_logits(self._model, asking) as seen, decoded(layers, self.reading, self._route):
            self._seen = seen
            yield

    def run(self) -> tuple[Tensor, Tensor]:
        """In memory, see `Reading.run`."""
        with self.routed(self._layers):
            return self.reading.run(self._model)

    def _route(self, layer: MoELayer, step: Step) -> Changed:
        arm = self._arm
        if arm is None:
            return Changed(step.ids, step.weights)
        logits = self._seen[layer.index][step.rows] if arm.needs_logits else None
        new = arm.route(layer, step.ids, step.weights, logits, hidden=step.hidden)
        own, key = self._sums[self.reading.batch_of[step.number]], str(layer.index)
        if layer is self._layers[0]:
            own.steps += 1
            own.rows += len(step.rows)
        own.before[key] = own.before.get(key, 0) + _distinct(step.ids, step.weights)
        own.after[key] = own.after.get(key, 0) + (active := _distinct(new.ids, new.weights))
        own.read += active + new.beside
        if self._layer_error:
            self._steps.append((step, new))
            if len(self._steps) == len(self.reading.sizes):
                _add_errors(self._sums, self.reading, layer, self._steps)
                self._steps.clear()
        return new

    def finished(self, logits: Tensor, prompts: Tensor, stock: Stock) -> list[Sums]:
        """The sums of every batch. Raises `EvaluationError` if the arm changes what stock computes
        for the prompts."""
        assert self._arm is not None
        differences = _differences(self._model, self.passages, prompts, stock.prompts)
        _check_prompts(self._arm, self._layers, torch.tensor(differences).max().item())
        lengths = [len(passage.continuation) for passage in self.passages]
        pairs = zip(torch.split(logits, lengths), torch.split(stock.logits, lengths), strict=True)
        for i, (passage, pair) in enumerate(zip(self.passages, pairs, strict=True)):
            own = self._sums[i // self._batch]
            own.prompt_difference = max(own.prompt_difference, differences[i])
            _add_passage(own, passage, *pair)
        return self._sums


def _differences(
    model: nn.Module, passages: list[Passage], mine: Tensor, stock: Tensor
) -> list[float]:
    """By passage, the largest difference of its prompt's logits; of what the output matrix is given
    [prompts, H], as equal inputs have equal logits."""
    if torch.equal(mine, stock):
        return [0.0] * len(passages)
    head, lengths = output_matrix(model), [passage.start for passage in passages]
    with torch.no_grad():
        return [
            (head(a).float() - head(b).float()).abs().max().item()
            for a, b in zip(torch.split(mine, lengths), torch.split(stock, lengths), strict=True)
        ]


def _check_prompts(arm: Arm, layers: list[MoELayer], difference: float) -> None:
    """Prompts' rows run apart in every layer whose experts allow it: not a bit may differ then."""
    exact = all(layer.adapter.runs_apart for layer in layers)
    if not difference <= (0 if exact else _ROUNDING):
        raise EvaluationError(
            f"{arm.name}: the prompt's logits differ from stock by up to {difference:.2g} "
            f"({'nothing' if exact else f'{_ROUNDING:g}'} is allowed here); decode rows must not "
            "touch them: please report which model this is"
        )


def _distinct(ids: Tensor, weights: Tensor) -> int:
    return len(torch.unique(ids[weights != 0]))


def _add_errors(
    sums: list[Sums],
    reading: Reading,
    layer: MoELayer,
    steps: list[tuple[Step, Changed]],
) -> None:
    """What all decode steps' changes do to one layer's output."""
    hidden, ids, weights, new_ids, new_weights = (
        torch.cat(parts)
        for parts in zip(
            *((s.hidden, s.ids, s.weights, new.ids, new.weights) for s, new in steps), strict=True
        )
    )
    stock = layer.mixture(hidden, ids, weights)
    mixture = layer.mixture(hidden, new_ids, new_weights)
    start = 0
    for step, new in steps:
        if new.added is not None:
            mixture[start : start + len(step.rows)] += new.added
        start += len(step.rows)
    lost = (mixture - stock).square().sum(1)
    energy = stock.square().sum(1)
    key, start = str(layer.index), 0
    for number, size in enumerate(reading.sizes):
        own, rows = sums[reading.batch_of[number]], slice(start, start + size)
        own.lost[key] = own.lost.get(key, 0.0) + lost[rows].sum().item()
        own.energy[key] = own.energy.get(key, 0.0) + energy[rows].sum().item()
        start += size


def _add_passage(own: Sums, passage: Passage, logits: Tensor, stock: Tensor) -> None:
    """logits, stock: [continuation, vocabulary], the first row by prefill."""
    wanted = torch.tensor(passage.continuation, device=logits.device)
    mine, theirs = logits.log_softmax(-1), stock.log_softmax(-1)
    likeliest, stocks = mine.argmax(-1), theirs.argmax(-1)
    right = torch.equal(likeliest, wanted)
    own.passages += 1
    own.exact += int(right)
    own.lost_answers += int(torch.equal(stocks, wanted) and not right)
    own.tokens += len(wanted) - 1
    own.nll -= mine[1:].gather(1, wanted[1:, None]).sum().item()
    p = theirs[1:].exp()
    # what stock never says adds nothing, also where both logits are -inf and differ by nan
    own.kl += (p * (theirs[1:] - mine[1:])).masked_fill(p == 0, 0).sum().item()
    own.top1 += (likeliest == stocks)[1:].sum().item()
