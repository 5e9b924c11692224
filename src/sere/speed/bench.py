"""`sere bench`: how fast the real vLLM engine decodes, stock and re-routed taking turns.

First the gate: with S=K the engine does all of the work and moves nothing, and must write the same
tokens as stock, or no speed is reported. Then every round decodes one batch of random prompts under
each policy in one engine, so that ratios do not depend on what else the machine was doing. Beside
each measured time stands the time that the bytes read would take (`sere.step_cost.roofline`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from tqdm import tqdm

from sere.files import unfinished
from sere.policy import Policy
from sere.results import pictures, provenance
from sere.results.journal import Journal
from sere.serving.engine import Batch, Engine
from sere.speed.result import as_text, plot, summary
from sere.speed.server import GATE_PROMPTS, Traffic, measure_server
from sere.speed.setup import (
    BenchError,
    Contender,
    Load,
    Subject,
    contenders_of,
    subject,
)

_WARM_TOKENS = 4


class Switchable(Protocol):
    """What is needed of an engine (`sere.serving.engine.Engine`)."""

    def set_policy(self, policy: Policy | None) -> None: ...
    def set_merge(self, on: bool) -> None: ...
    def reset_stats(self) -> None: ...
    def stats(self) -> dict[int, dict[str, int]]: ...
    def generate(
        self, prompts: Sequence[list[int]], max_tokens: int, *, to_the_end: bool
    ) -> Batch: ...


def run(
    model: str,
    table: str | None,
    output: str,
    *,
    policies: Sequence[str],
    load: Load,
    rates: Sequence[float] = (),
    requests: int = 100,
    **options: Any,
) -> dict[str, Any]:
    """Measure, print, write `output` (JSON) and a plot beside it.

    rates: if any, a server is measured under so many requests per second instead of closed batches.
    The rest: see `sere.speed.setup.subject`. Raises `BenchError` or `GateError` if the gate fails.
    """
    pictures.check_result(output, table)
    with subject(model, table, load, **options) as served:
        contenders = contenders_of(policies, served.table)
        rules = [[c.name, c.policy and c.policy.to_dict(), c.merge] for c in contenders]
        pieces = {**served.facts, "rules": rules, "load": {**vars(load), "batches": None}}
        with Journal(unfinished(output), pieces) as journal:
            if rates:
                traffic = Traffic(
                    tuple(rates), requests, load.input_len, load.output_len, load.seed
                )
                found = _measure_server(served, contenders, load, traffic, journal)
            else:
                _measure(served, contenders, load, journal)
                found = summary(contenders, load, journal, served)
            result = {
                "provenance": provenance.provenance(),
                **served.facts,
                "load": {**vars(load), "batches": list(load.batches)},
                **found,
            }
            print(as_text(result))
            provenance.save_json(output, result)
    if not rates:
        plot(result, pictures.beside(output))
        output = f"{output}, {pictures.beside(output)}"
    print(f"\nwritten: {output}")
    return result


def _measure_server(
    served: Subject,
    contenders: Sequence[Contender],
    load: Load,
    traffic: Traffic,
    journal: Journal,
) -> dict[str, Any]:
    policies = [(c.name, c.policy) for c in contenders if c.policy]
    if any(contender.merge for contender in contenders):
        raise BenchError("merge is set when a server starts: leave it out with --rate")
    prompts = load.prompts(GATE_PROMPTS, 0, served.vocabulary)
    options = {**served.options, "max_num_seqs": max(load.batches)}
    rows = measure_server(
        served.folder, str(served.table), policies, traffic, prompts, options, journal, served.K
    )
    return {"requests": traffic.requests, "server": rows}


def _measure(
    served: Subject, contenders: Sequence[Contender], load: Load, journal: Journal
) -> None:
    """Everything that the journal lacks."""
    wanted = [f"{batch}/{turn}" for batch in load.batches for turn in range(load.rounds)]
    if journal.get("machine") and all(journal.get(piece) for piece in wanted):
        return
    engine = Engine(served.folder, served.table, batch=max(load.batches), **served.options)
    if not journal.get("machine"):
        journal.add("machine", engine.probe())
    measure(engine, contenders, load, journal, K=served.K, vocabulary=served.vocabulary)


def measure(
    engine: Switchable,
    contenders: Sequence[Contender],
    load: Load,
    journal: Journal,
    *,
    K: int,
    vocabulary: int,
) -> None:
    """Gate, warm-up and rounds of every batch size. Raises `BenchError` if the gate fails."""
    total = len(load.batches) * load.rounds
    with tqdm(total=total, desc="bench", unit="round") as progress:
        for batch in load.batches:
            if journal.get(f"{batch}/gate") is None:
                journal.add(f"{batch}/gate", _gate(engine, load, batch, K, vocabulary))
            warm = False
            for turn in range(load.rounds):
                if journal.get(f"{batch}/{turn}") is None:
                    prompts = load.prompts(batch, turn, vocabulary)
                    if not warm:
                        brief = replace(load, output_len=_WARM_TOKENS)
                        for contender in contenders:
                            _timed(engine, contender, prompts, brief)
                        warm = True
                    first = turn % len(contenders)
                    order = [*contenders[first:], *contenders[:first]]
                    found = {c.name: _timed(engine, c, prompts, load) for c in order}
                    journal.add(f"{batch}/{turn}", found)
                progress.update()


def _gate(
    engine: Switchable, load: Load, batch: int, K: int, vocabulary: int
) -> dict[str, list[float]]:
    """Active experts of stock routing by layer, if S=K writes what stock writes."""
    prompts = load.prompts(batch, 0, vocabulary)

    def written(policy: Policy | None) -> list[list[int]]:
        engine.set_policy(policy)
        return engine.generate(prompts, load.output_len, to_the_end=True).token_ids

    engine.set_merge(False)
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


def _timed(
    engine: Switchable, contender: Contender, prompts: list[list[int]], load: Load
) -> dict[str, Any]:
    engine.set_policy(contender.policy)
    engine.set_merge(contender.merge)
    engine.reset_stats()
    batch = engine.generate(prompts, load.output_len, to_the_end=True)
    return {
        "tpot_ms": 1e3 * batch.decode_s / (load.output_len - 1),
        "active": _active(engine.stats()) if contender.policy else None,
    }


def _active(stats: Mapping[int, Mapping[str, int]]) -> dict[str, list[float]]:
    """[before, after] of every layer, a mean over decode steps."""
    return {
        str(index): [
            counters["active_before"] / max(counters["steps"], 1),
            counters["active_after"] / max(counters["steps"], 1),
        ]
        for index, counters in stats.items()
    }
