"""What a policy costs and saves: sums over decode batches, and the figures that they make.

Figures are means over decoded tokens, with standard errors over batches: rows of one batch share
their experts and are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sere.evaluation.arms import Arm
from sere.evaluation.decoding import Passage, Reading, Step, decoded, output_matrix, router_logits
from sere.models.adapters import Changed
from sere.models.moe import MoELayer
from sere.results.journal import Journal

# Passages per forward pass, and bytes of their logits; or one batch where that is more.
_TOGETHER = 128
LOGITS = 2**30
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
class _Stock:
    """What `Reading.run` gives under stock routing."""

    logits: Tensor
    prompts: Tensor


@dataclass
class Judge:
    """Measures arms on passages; what is finished is in the journal and not measured again.

    first: the place of the first passage among all that share the journal.
    """

    model: nn.Module
    layers: list[MoELayer]
    passages: Sequence[Passage]
    journal: Journal
    layer_error: bool = True
    title: str = "evaluate"
    first: int = 0
    _stock: tuple[int, int, _Stock] | None = None

    def measure(
        self, arms: Sequence[Arm], batches: Sequence[int]
    ) -> dict[str, dict[int, list[Sums]]]:
        """By arm's name and batch size: the sums of every batch.

        Raises `EvaluationError` if an arm changes what stock computes for the prompts.
        """
        sizes = {batch: self._together(batch) for batch in batches}
        chunks = sorted(
            (start, size, batch)
            for batch, size in sizes.items()
            for start in range(0, len(self.passages), size)
        )
        work = [(*chunk, arm) for chunk in chunks for arm in arms]
        sums: dict[str, dict[int, list[Sums]]] = {a.name: {b: [] for b in batches} for a in arms}
        for start, size, batch, arm in tqdm(work, self.title, leave=self.title == "evaluate"):
            piece = f"{self.first + start}+{size}/{batch}/{arm.name}"
            if (known := self.journal.get(piece)) is None:
                chunk = list(self.passages[start : start + size])
                known = [asdict(part) for part in self._measured(chunk, start, arm, batch)]
                self.journal.add(piece, known)
            sums[arm.name][batch] += [Sums(**part) for part in known]
        return sums

    def _together(self, batch: int) -> int:
        """Passages per forward pass: whole batches."""
        longest = max(len(passage.continuation) for passage in self.passages)
        config: Any = self.model.config
        vocabulary: int = config.get_text_config().vocab_size
        fit: int = min(_TOGETHER, LOGITS // (4 * vocabulary * longest))
        return batch * max(1, fit // batch)

    def _measured(self, chunk: list[Passage], start: int, arm: Arm, batch: int) -> list[Sums]:
        if self._stock is None or self._stock[:2] != (start, len(chunk)):
            self._stock = None  # two would not fit
            self._stock = start, len(chunk), _stock(self.model, self.layers, chunk)
        stock = self._stock[2]
        return _measured(self.model, self.layers, chunk, arm, batch, stock, self.layer_error)


def _stock(model: nn.Module, layers: list[MoELayer], passages: list[Passage]) -> _Stock:
    reading = Reading(passages, len(passages))
    with decoded(layers, reading, lambda _, step: (step.ids, step.weights)):
        return _Stock(*reading.run(model))


def _measured(
    model: nn.Module,
    layers: list[MoELayer],
    passages: list[Passage],
    arm: Arm,
    batch: int,
    stock: _Stock,
    layer_error: bool,
) -> list[Sums]:
    reading = Reading(passages, batch)
    sums = [Sums() for _ in range(-(-len(passages) // batch))]
    steps: list[tuple[Step, Changed]] = []

    def route(layer: MoELayer, step: Step) -> Changed:
        logits = seen[layer.index][step.rows] if arm.needs_logits else None
        new = arm.route(layer, step.ids, step.weights, logits, hidden=step.hidden)
        own, key = sums[reading.batch_of[step.number]], str(layer.index)
        if layer is layers[0]:
            own.steps += 1
            own.rows += len(step.rows)
        own.before[key] = own.before.get(key, 0) + _distinct(step.ids, step.weights)
        own.after[key] = own.after.get(key, 0) + (active := _distinct(new.ids, new.weights))
        own.read += active + new.beside
        if layer_error:
            steps.append((step, new))
            if len(steps) == len(reading.sizes):
                _add_errors(sums, reading, layer, steps)
                steps.clear()
        return new

    with _seen_logits(model, layers, arm) as seen, decoded(layers, reading, route):
        logits, prompts = reading.run(model)
    differences = _differences(model, passages, prompts, stock.prompts)
    _check_prompts(arm, layers, torch.tensor(differences).max().item())
    lengths = [len(passage.continuation) for passage in passages]
    pairs = zip(torch.split(logits, lengths), torch.split(stock.logits, lengths), strict=True)
    for i, (passage, pair) in enumerate(zip(passages, pairs, strict=True)):
        own = sums[i // batch]
        own.prompt_difference = max(own.prompt_difference, differences[i])
        _add_passage(own, passage, *pair)
    return sums


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


def _seen_logits(model: nn.Module, layers: list[MoELayer], arm: Arm) -> Any:
    return router_logits(model, layers if arm.needs_logits else [])


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


# --- figures ------------------------------------------------------------------------------------


def mean(parts: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Ratio of sums over batches [(sum, count)], and its standard error (nan for one batch;
    infinite as the ratio is)."""
    total, count = sum(s for s, _ in parts), sum(n for _, n in parts)
    if not count:
        return math.nan, math.nan
    ratio, B = total / count, len(parts)
    if B < 2:
        return ratio, math.nan
    if math.isinf(ratio):
        return ratio, math.inf
    spread = sum((s - ratio * n) ** 2 for s, n in parts) * B / (B - 1)
    return ratio, math.sqrt(spread) / count


def figures(parts: Sequence[Sums], stock: Sequence[Sums] | None = None) -> dict[str, Any]:
    """What is reported of one arm at one batch size; every figure as [value, standard error].

    stock: the same batches under stock routing. Then also the differences from it, whose errors
    are paired: batches are hard or easy for both alike, and cancel.
    """

    def over(name: str, count: str) -> tuple[float, float]:
        return mean([(getattr(p, name), getattr(p, count)) for p in parts])

    nll = over("nll", "tokens")
    layers = list(parts[0].after)
    active = mean([(sum(p.after.values()), p.steps * len(layers)) for p in parts])
    before = mean([(sum(p.before.values()), p.steps * len(layers)) for p in parts])
    perplexity = math.exp(nll[0])
    return {
        "active": active,
        "active_before": before,
        "read": mean([(p.read, p.steps * len(layers)) for p in parts]),
        "kl": over("kl", "tokens"),
        "top1": over("top1", "tokens"),
        "perplexity": (perplexity, perplexity * nll[1]),
        "exact_match": over("exact", "passages"),
        "answers_lost_gross": over("lost_answers", "passages"),
        "rows_per_step": over("rows", "steps"),
        "active_by_layer": {k: mean([(p.after[k], p.steps) for p in parts]) for k in layers},
        "output_error_by_layer": {
            k: mean([(p.lost[k], p.energy[k]) for p in parts]) for k in layers if parts[0].energy
        },
        "batches": len(parts),
        "prompt_difference": max(p.prompt_difference for p in parts),
        **({} if stock is None else _over_stock(parts, stock)),
    }


def _over_stock(parts: Sequence[Sums], stock: Sequence[Sums]) -> dict[str, tuple[float, float]]:
    """Nats a token, perplexity and exact match, less stock's."""
    pairs = list(zip(parts, stock, strict=True))
    nll = mean([(p.nll - s.nll, p.tokens) for p, s in pairs])
    before = math.exp(sum(s.nll for s in stock) / sum(s.tokens for s in stock))
    more = math.exp(nll[0])
    return {
        "nll_over_stock": nll,
        "perplexity_over_stock": (before * (more - 1), before * more * nll[1]),
        "exact_match_over_stock": mean([(p.exact - s.exact, p.passages) for p, s in pairs]),
    }
