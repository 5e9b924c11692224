"""A policy is tried in the engine that is to serve it, before it serves: the same texts, decoded
token by token, by stock routing and by the policy in turn.

The steps are those that requests will get, with their compiled code and graphs: a row for each
text, as many experts as its company needs. A text's own next token is fed, whatever the model would
have said, so that both routings answer the same question. Each has a KV cache of its own; prompts
are read as the policy has it.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sere.kernels import COUNTERS
from sere.serving.hand_made import (
    Blocks,
    end,
    first_step,
    free_blocks,
    joining,
    next_step,
    places,
    run,
    taken,
)
from sere.serving.refusal import ServingError
from sere.serving.session import Session
from sere.serving.tiers import EXACT, FAST

PROMPT = 16
"""Tokens of a text that are read before it is decoded."""
STEPS = 8  # ... that one routing decodes before the other has its turn
TURNS = 4
LENGTH = PROMPT + TURNS * STEPS + 1
"""Tokens of a text."""
_ROWS = 16  # whose logits are compared at a time
_STOCK = str(EXACT)
_Said = tuple[list[int], Tensor]  # texts by row, and their rows' logits [n, vocabulary]
_Row = tuple[int, float, float, float, bool]  # text, KL, loss, stock's own, whether tokens agree


def room(worker: Any) -> int:
    """How many texts the KV cache has room for, twice each. Raises `ServingError`."""
    runner = worker.model_runner
    return free_blocks(runner) // (2 * sum(taken(runner, LENGTH)))


def try_out(worker: Any, session: Session, texts: Sequence[list[int]]) -> dict[str, Any] | None:
    """Decode texts of `LENGTH` tokens, all of them together, both ways; None of ranks that are not
    the first.

    requests: how many. stock_ms, ms: of a step, the median of each turn. before, after: experts
    that a layer reads, a mean. kl: nats from stock's distribution of the next token to the
    policy's, by text; loss: nats a token lost, by text; stock_loss: what stock loses itself. same:
    the share of rows whose likeliest token is stock's. vocabulary: tokens that may come next.
    Raises `ServingError` if they cannot be compared.
    """
    trial = _Trial(worker, session, texts)
    with trial.watching():
        turns = [trial.turn(number) for number in range(TURNS)]
    if trial.failed is not None:
        raise ServingError(trial.failed)
    if worker.rank:
        return None
    stock_ms, ms, found = zip(*turns, strict=True)
    return {
        "requests": len(texts),
        "stock_ms": [1e3 * s for s in stock_ms],
        "ms": [1e3 * s for s in ms],
        "before": trial.read("active_before"),
        "after": trial.read("active_after"),
        "vocabulary": trial.vocabulary,
        **_by_text([row for rows in found for row in rows], len(texts)),
    }


def _by_text(rows: Sequence[_Row], texts: int) -> dict[str, Any]:
    sums: dict[str, list[float]] = {name: [0.0] * texts for name in ("kl", "loss", "stock_loss")}
    for text, *nats, _ in rows:
        for own, value in zip(sums.values(), nats, strict=True):
            own[text] += value * texts / len(rows)
    return {**sums, "same": sum(same for *_, same in rows) / len(rows)}


class _Trial:
    """An `Observer` for the order of a batch's rows.

    vocabulary: of the logits. failed: why there are no figures. No rank leaves its turns before the
    others do, which would wait for it.
    """

    def __init__(self, worker: Any, session: Session, texts: Sequence[list[int]]) -> None:
        self._worker, self._session, self._texts = worker, session, texts
        blocks = places(worker.model_runner, [LENGTH] * (2 * len(texts)))
        default = session.settings.default
        self._policy = str(default if default < EXACT else FAST)
        self._blocks = {_STOCK: blocks[: len(texts)], self._policy: blocks[len(texts) :]}
        self._known: set[str] = set()  # requests that the worker knows
        self._order: list[int] = []  # texts, by row
        self._logits: Tensor | None = None
        self.failed: str | None = None
        self.vocabulary = 0
        self._counted: dict[str, int] = dict.fromkeys(COUNTERS, 0)

    def begin(self, requests: Sequence[str], lengths: Any, prefilling: Any) -> None:
        """See `Observer.begin`."""
        self._order = [int(name.split("_")[-1]) for name in requests]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Of every step this sees the logits; whatever it has changed is as before after it."""
        session, model = self._session, self._worker.get_model()
        make, gate = model.compute_logits, session.rows.gate
        serving, shadow = session.incidents.serving, session.shadow

        def compute_logits(*args: Any, **kwargs: Any) -> Any:
            self._logits = make(*args, **kwargs)
            return self._logits

        own = vars(model).get("compute_logits")
        session.observer, session.incidents.serving = self, False  # what fails is raised
        if shadow is not None:
            shadow.switch(on=False)
        model.compute_logits = compute_logits
        try:
            yield
        finally:
            if own is None:
                del model.compute_logits
            else:
                model.compute_logits = own
            session.rows.gate = gate
            session.observer, session.incidents.serving = None, serving
            if shadow is not None:
                shadow.switch(on=session.policy is not None)
            end(self._worker, self._known)

    def turn(self, number: int) -> tuple[float, float, list[_Row]]:
        """Seconds of a step by stock routing, and by the policy; and of every row but the first
        step's what `_Row` is."""
        start = PROMPT + number * STEPS
        stock: list[_Said] = []
        new: list[_Said] = []
        seconds = []
        for tier, made in ((_STOCK, stock), (self._policy, new)):
            if not number:
                self._read_prompts(tier)
            before = self._session.live.counters.sum(0)
            seconds.append(self._decode(tier, start, made))
            if tier == self._policy:
                self._count(self._session.live.counters.sum(0) - before)
        found: list[_Row] = []
        try:
            for step, pair in enumerate(zip(stock, new, strict=True)):
                found += self._compared(*pair, start + step + 1)
        except Exception as error:
            self.failed = self.failed or f"the routings' logits cannot be compared: {error}"
        if not all(math.isfinite(sum(nats)) for _, *nats, _ in found):
            self.failed = self.failed or "not all of the routings' logits are finite"
        return seconds[0], seconds[1], found

    def read(self, counter: str) -> float:
        """Experts that a layer read in a step of the policy's."""
        return self._counted[counter] / max(1, self._counted["steps"])

    def _count(self, figures: Tensor) -> None:
        for name, figure in zip(COUNTERS, figures.tolist(), strict=True):
            self._counted[name] += figure

    def _read_prompts(self, tier: str) -> None:
        at_once = self._worker.vllm_config.scheduler_config.max_num_batched_tokens // PROMPT
        for first in range(0, len(self._texts), at_once):
            part = range(first, min(first + at_once, len(self._texts)))
            self._join(tier, "prompt", part, 0, PROMPT)

    def _decode(self, tier: str, start: int, made: list[_Said]) -> float:
        """Median seconds of a step, without the first, in which requests join. made: is given each
        step's order and logits."""
        gate, seconds = self._session.rows.gate, []
        self._session.rows.gate = "all"  # vLLM takes the texts' own tokens for prompts
        try:
            names = self._join(tier, str(start), range(len(self._texts)), start, 1, made)
            for computed in range(start + 1, start + STEPS):
                seconds.append(self._timed(next_step(names, computed), made))
        finally:
            self._session.rows.gate = gate
        return statistics.median(seconds)

    def _join(
        self,
        tier: str,
        name: str,
        part: range,
        computed: int,
        rows: int,
        made: list[_Said] | None = None,
    ) -> list[str]:
        """The names of requests for some of the texts, whose first step is run; all others end."""
        names = {f"_sere_trial_{tier}_{name}_{i}": i for i in part}
        blocks: list[Blocks] = self._blocks[tier]
        new = [
            joining(n, self._texts[i], blocks[i], computed=computed, tier=tier)
            for n, i in names.items()
        ]
        output = first_step(new, dict.fromkeys(names, rows), self._known)
        self._known = set(names)
        self._timed(output, [] if made is None else made)
        return list(names)

    def _timed(self, output: Any, made: list[_Said]) -> float:
        self._logits = None
        self._wait()
        began = time.perf_counter()
        run(self._worker, output)
        self._wait()
        seconds = time.perf_counter() - began
        if not self._worker.rank and self.failed is None:
            self._keep(made)
        return seconds

    def _keep(self, made: list[_Said]) -> None:
        if self._logits is None:
            self.failed = "this engine's logits are not seen (it samples in parts)"
            return
        try:
            self.vocabulary = self._logits.shape[1]
            made.append((self._order, self._logits.cpu()))
        except Exception as error:
            self.failed = f"the logits do not fit into the host's memory: {error}"

    def _wait(self) -> None:
        if self._session.rows.buffer.device.type != "cpu":
            torch.accelerator.synchronize()

    def _compared(self, stock: _Said, new: _Said, place: int) -> Iterator[_Row]:
        """Of every row of one step, by text; place: of the token that is to be said."""
        device = self._session.rows.buffer.device
        row_of = {text: row for row, text in enumerate(new[0])}
        for first in range(0, len(stock[0]), _ROWS):
            texts = stock[0][first : first + _ROWS]
            said = torch.tensor([self._texts[i][place] for i in texts], device=device)[:, None]
            p, q = (
                logits.to(device, torch.float32).log_softmax(1)
                for logits in (
                    stock[1][first : first + _ROWS],
                    new[1][[row_of[text] for text in texts]],
                )
            )
            share = p.exp()  # what stock never says adds nothing: both may be -inf
            kl = (share * (p - q)).masked_fill(share == 0, 0).sum(1)
            own = -p.gather(1, said)[:, 0]
            lost = -own - q.gather(1, said)[:, 0]
            same = p.argmax(1) == q.argmax(1)
            rows = (found.tolist() for found in (kl, lost, own, same))
            yield from zip(texts, *rows, strict=True)
