"""One turn of a policy in an engine: the gate, and the time of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from sere.policy import Policy
from sere.serving.engine import Batch
from sere.speed.setup import BenchError, Contender, Load

WARM_TOKENS = 4


class Decoding(Protocol):
    """What is needed of any engine (`sere.serving.engine.Engine`)."""

    def generate(
        self, prompts: Sequence[list[int]], max_tokens: int, *, to_the_end: bool
    ) -> Batch: ...


class Switchable(Decoding, Protocol):
    """And of one that re-routes."""

    def set_policy(self, policy: Policy | None) -> None: ...
    def reset_stats(self) -> None: ...
    def stats(self) -> dict[int, dict[str, int]]: ...


def gate(
    engine: Switchable, load: Load, batch: int, K: int, vocabulary: int
) -> dict[str, list[float]]:
    """Active experts of stock routing by layer. Raises `BenchError` if S=K writes other tokens."""
    prompts = load.prompts(batch, 0, vocabulary)

    def written(policy: Policy | None) -> list[list[int]]:
        engine.set_policy(policy)
        return engine.generate(prompts, load.output_len, to_the_end=True).token_ids

    stock = written(None)
    engine.reset_stats()
    exact = written(Policy(S=K))
    stats = engine.stats()
    if exact != stock:
        again = written(None)
        cause = (
            "S=K changes the tokens: please report"
            if again == stock
            else "two runs of stock vLLM differ from each other: this engine is not deterministic"
        )
        raise BenchError(f"batch {batch}: {cause}; no speed is reported")
    return _active(stats)


def timed(
    engine: Switchable, contender: Contender, prompts: list[list[int]], load: Load
) -> dict[str, Any]:
    """Milliseconds a token, and active experts by layer (None for stock routing), of one batch."""
    engine.set_policy(contender.policy)
    engine.reset_stats()
    batch = engine.generate(prompts, load.output_len, to_the_end=True)
    return {
        "tpot_ms": _tpot_ms(batch, load),
        "active": _active(engine.stats()) if contender.policy else None,
    }


def timed_stock(engine: Decoding, prompts: list[list[int]], load: Load) -> dict[str, Any]:
    """The same of an engine that knows of no policies."""
    return {
        "tpot_ms": _tpot_ms(engine.generate(prompts, load.output_len, to_the_end=True), load),
        "active": None,
    }


def _tpot_ms(batch: Batch, load: Load) -> float:
    return 1e3 * batch.decode_s / (load.output_len - 1)


def _active(stats: Mapping[int, Mapping[str, int]]) -> dict[str, list[float]]:
    """[before, after] of every layer, a mean over decode steps."""
    return {
        str(index): [
            counters["active_before"] / max(counters["steps"], 1),
            counters["active_after"] / max(counters["steps"], 1),
        ]
        for index, counters in stats.items()
    }
