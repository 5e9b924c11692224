"""What a policy costs and saves: sums over decode batches, and the figures that they make.

Figures are means over decoded tokens, with standard errors over batches: rows of one batch share
their experts and are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby
from typing import Any

from torch import Tensor, nn
from tqdm import tqdm

from sere.evaluation.arms import Arm
from sere.evaluation.decoding import Passage
from sere.evaluation.layerwise import Waiting, run_by_layer
from sere.evaluation.passes import EvaluationError as EvaluationError
from sere.evaluation.passes import Pass, Stock
from sere.evaluation.passes import Sums as Sums
from sere.evaluation.rounds import Found, in_rounds, obtain
from sere.models.moe import MoELayer
from sere.models.skeleton import Skeleton
from sere.results.journal import Journal
from sere.results.provenance import said
from sere.text.unread import unread

# Passages per forward pass, and bytes of their logits; or one batch where that is more.
_TOGETHER = 128
LOGITS = 2**30


Piece = tuple[int, int, int, Arm]  # first passage, how many, batch size, arm


@dataclass
class Judge:
    """Measures arms on passages; what is finished is in the journal and not measured again.

    model: whole, or a skeleton whose layers are read one at a time, for all arms of a `measure`.
    first: the place of the first passage among all that share the journal.
    """

    model: nn.Module | Skeleton
    layers: list[MoELayer]
    passages: Sequence[Passage]
    journal: Journal
    layer_error: bool = True
    title: str = "evaluate"
    first: int = 0
    _stock: tuple[int, int, Stock] | None = None

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
        pieces: list[Piece] = [(*chunk, arm) for chunk in chunks for arm in arms]
        missing = [piece for piece in pieces if self.journal.get(self._key(piece)) is None]
        if isinstance(self.model, Skeleton):
            if missing:
                obtain(missing, self._read)
        else:
            for piece in tqdm(missing, self.title, leave=self.title == "evaluate"):
                own = self._pass(self.model, piece)
                self._add(piece, own, *own.run(), self._stock_of(self.model, piece))
        sums: dict[str, dict[int, list[Sums]]] = {a.name: {b: [] for b in batches} for a in arms}
        for piece in pieces:
            known = self.journal.get(self._key(piece))
            sums[piece[3].name][piece[2]] += [Sums(**part) for part in known]
        return sums

    def say_if_unread(self, stock: Sequence[Sums]) -> list[str]:
        """By what stock routing loses itself."""
        nats = sum(part.nll for part in stock) / sum(part.tokens for part in stock)
        return said(*filter(None, [unread(nats, self._vocabulary)]))

    @property
    def _vocabulary(self) -> int:
        model: Any = self.model.model if isinstance(self.model, Skeleton) else self.model
        size: int = model.config.get_text_config().vocab_size
        return size

    def at_once(self, searches: Sequence[Callable[[], Found]]) -> list[Found]:
        """What these return; where layers are read one at a time, what they measure is measured
        side by side, with as few readings as the longest of them needs alone."""
        return in_rounds(searches, self._read if isinstance(self.model, Skeleton) else None)

    def _together(self, batch: int) -> int:
        """Passages per forward pass: whole batches."""
        longest = max(len(passage.continuation) for passage in self.passages)
        fit: int = min(_TOGETHER, LOGITS // (4 * self._vocabulary * longest))
        return batch * max(1, fit // batch)

    def _key(self, piece: Piece) -> str:
        start, size, batch, arm = piece
        return f"{self.first + start}+{size}/{batch}/{arm.name}"

    def _pass(self, model: nn.Module, piece: Piece) -> Pass:
        start, size, batch, arm = piece
        chunk = list(self.passages[start : start + size])
        return Pass(model, self.layers, chunk, arm, batch, self.layer_error)

    def _add(self, piece: Piece, own: Pass, logits: Tensor, prompts: Tensor, stock: Stock) -> None:
        found = own.finished(logits, prompts, stock)
        self.journal.add(self._key(piece), [asdict(part) for part in found])

    def _stock_of(self, model: nn.Module, piece: Piece) -> Stock:
        start, size = piece[:2]
        if self._stock is None or self._stock[:2] != (start, size):
            self._stock = None  # two would not fit
            chunk = list(self.passages[start : start + size])
            self._stock = start, size, Stock(*Pass(model, self.layers, chunk).run())
        return self._stock[2]

    def _read(self, wanted: list[Piece]) -> None:
        """Stock's pass over every chunk, and behind it those of the arms that need it, in one
        reading of the weights. wanted: in any order, and some of them twice perhaps."""
        skeleton = self.model
        assert isinstance(skeleton, Skeleton)
        once = {self._key(piece): piece for piece in wanted}
        missing = sorted(once.values(), key=lambda piece: piece[:3])
        work: list[list[Waiting]] = []
        stock: list[Stock] = []  # of one chunk at a time

        def keep(logits: Tensor, prompts: Tensor) -> None:
            stock[:] = [Stock(logits, prompts)]

        def add(piece: Piece, own: Pass, logits: Tensor, prompts: Tensor) -> None:
            self._add(piece, own, logits, prompts, stock[0])

        for chunk, pieces in groupby(missing, key=lambda piece: piece[:2]):
            start, size = chunk
            passages = list(self.passages[start : start + size])
            stocks = Pass(skeleton.model, self.layers, passages)
            group = [Waiting(f"{self.first + start}+{size}", stocks, keep)]
            for piece in pieces:
                own = self._pass(skeleton.model, piece)
                group.append(Waiting(self._key(piece), own, partial(add, piece, own)))
            work.append(group)
        run_by_layer(skeleton, work, self.journal, self.title)


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
