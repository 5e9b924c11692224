"""`sere bench`: how fast the real vLLM engine decodes, stock and re-routed taking turns.

First the gate: with S=K the engine does all of the work and moves nothing, and must write the same
tokens as stock, or no speed is reported. Then every round decodes one batch of random prompts under
each policy in one engine, so that ratios do not depend on what else the machine was doing. Beside
each measured time stands the time that the bytes read would take (`sere.step_cost.roofline`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tqdm import tqdm

from sere.files import unfinished
from sere.results import pictures, provenance
from sere.results.journal import Journal
from sere.serving.engine import Engine
from sere.speed.against import OFF, STOCK, measure_pairs
from sere.speed.result import as_text, caveats, plot, summary
from sere.speed.server import GATE_PROMPTS, Traffic, measure_server
from sere.speed.setup import (
    BenchError,
    Contender,
    Load,
    Subject,
    contenders_of,
    rank_of_maps,
    subject,
)
from sere.speed.turns import WARM_TOKENS, Switchable, gate, timed


def run(
    model: str,
    table: str | None,
    output: str,
    *,
    policies: Sequence[str],
    load: Load,
    rates: Sequence[float] = (),
    requests: int = 100,
    against: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Measure, print, write `output` (JSON) and a plot beside it.

    rates: if any, a server is measured under so many requests per second instead of closed batches.
    against: "off", the same engine with re-routing off; "stock", an engine without the plug-in (see
    `sere.speed.against`); None: "off" unless stock vLLM would take another expert kernel.
    The rest: see `sere.speed.setup.subject`. Raises `BenchError` or `GateError` if the gate fails.
    """
    pictures.check_result(output, table, options.get("trace"))
    with subject(model, table, load, rank=rank_of_maps(policies), **options) as served:
        contenders = contenders_of(policies, served.table)
        if rates and against == OFF:
            raise BenchError("servers are compared with a stock server: leave out --against off")
        rules = [[c.name, c.policy and c.policy.to_dict()] for c in contenders]
        pieces = {**served.facts, "rules": rules, "load": {**vars(load), "batches": None}}
        pieces["against"] = against
        settings = {**pieces, "batches": list(load.batches), "rates": [*rates, requests]}
        provenance.check_settings(output, settings)
        with Journal(unfinished(output), pieces) as journal:
            if rates:
                traffic = Traffic(
                    tuple(rates), requests, load.input_len, load.output_len, load.seed
                )
                found = _measure_server(served, contenders, load, traffic, journal)
            else:
                against = _measure(served, contenders, load, journal, against)
                if against == STOCK:
                    contenders = [contenders[0], Contender(OFF, None), *contenders[1:]]
                found = summary(contenders, load, journal, served)
            result = {
                "provenance": provenance.provenance(),
                "settings": settings,
                **served.facts,
                "against": against or STOCK,
                "load": {**vars(load), "batches": list(load.batches)},
                **found,
            }
            result["warnings"] = caveats(result)
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
    prompts = load.prompts(GATE_PROMPTS, 0, served.vocabulary)
    options = {**served.options, "max_num_seqs": max(load.batches)}
    rows = measure_server(
        served.folder, str(served.table), policies, traffic, prompts, options, journal, served.K
    )
    return {"requests": traffic.requests, "server": rows}


def _measure(
    served: Subject,
    contenders: Sequence[Contender],
    load: Load,
    journal: Journal,
    against: str | None,
) -> str:
    """Everything that the journal lacks; returns what policies were measured against."""
    against = against or journal.get("against")
    if against != STOCK:
        wanted = [f"{batch}/{turn}" for batch in load.batches for turn in range(load.rounds)]
        if journal.get("machine") and all(journal.get(piece) for piece in wanted):
            return OFF
        policies, most = [c.policy for c in contenders], max(load.batches)
        engine = Engine(
            served.folder, served.table, batch=most, policies=policies, **served.options
        )
        kernels = engine.kernels()
        if against == OFF or kernels["serving"] == kernels["stock"]:
            if not journal.get("machine"):
                journal.add("machine", engine.probe())
                journal.add("kernels", kernels)
            measure(engine, contenders, load, journal, K=served.K, vocabulary=served.vocabulary)
            return OFF
        engine.close()
        journal.add("against", STOCK)
    measure_pairs(served, contenders, load, journal)
    return STOCK


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
                journal.add(f"{batch}/gate", gate(engine, load, batch, K, vocabulary))
            warm = False
            for turn in range(load.rounds):
                if journal.get(f"{batch}/{turn}") is None:
                    prompts = load.prompts(batch, turn, vocabulary)
                    if not warm:
                        brief = replace(load, output_len=WARM_TOKENS)
                        for contender in contenders:
                            timed(engine, contender, prompts, brief)
                        warm = True
                    first = turn % len(contenders)
                    order = [*contenders[first:], *contenders[:first]]
                    found = {c.name: timed(engine, c, prompts, load) for c in order}
                    journal.add(f"{batch}/{turn}", found)
                progress.update()
