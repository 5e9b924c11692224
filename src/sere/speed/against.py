"""`sere bench --against stock`: an engine without the plug-in and one that re-routes take turns.

Two engines cannot share a process, and seldom a GPU. So each gets a process of its own, one after
the other: stock, ours, ours, stock, ... A round is a pair of neighbours, and speed-ups are ratios
within a pair. `python -m sere.speed.against` is such a process: it reads its job from standard
input, and its last line is what it found.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import entry_points
from typing import Any

from tqdm import tqdm

from sere.policy import Policy
from sere.results.journal import Journal
from sere.serving.engine import PLUGIN, Engine
from sere.serving.random_weights import LOAD_FORMAT
from sere.speed.setup import BenchError, Contender, Load, Subject
from sere.speed.turns import WARM_TOKENS, gate, timed, timed_stock

STOCK, OFF = "stock", "off"
RESULT = "AGAINST "
_TURNS = 3  # of every contender in a process; the median counts
_TAIL = 3000


def measure_pairs(
    served: Subject, contenders: Sequence[Contender], load: Load, journal: Journal
) -> None:
    """Everything that the journal lacks; as `bench.measure` leaves it, with "off" beside stock.

    contenders: stock first. Raises `BenchError` if an engine fails or the gate does.
    """
    ours = [Contender(OFF, None), *contenders[1:]]
    with tqdm(total=load.rounds, desc="bench", unit="pair") as progress:
        for turn in range(load.rounds):
            if not all(journal.get(f"{batch}/{turn}") for batch in load.batches):
                order = [[contenders[0]], ours]
                found: dict[str, Any] = {}
                for arms in order if turn % 2 == 0 else reversed(order):
                    rerouting = arms is ours
                    found[OFF if rerouting else STOCK] = _in_a_process(
                        served, arms, load, turn, rerouting
                    )
                _note(journal, load, turn, found)
            progress.update()


def _note(journal: Journal, load: Load, turn: int, found: dict[str, Any]) -> None:
    ours, stock = found[OFF], found[STOCK]
    if journal.get("machine") is None:
        journal.add("machine", ours["machine"])
        journal.add("kernels", ours["kernels"])
    for batch in map(str, load.batches):
        if journal.get(f"{batch}/gate") is None:
            journal.add(f"{batch}/gate", ours["gates"][batch])
            journal.add(f"{batch}/as stock", ours["tokens"][batch] == stock["tokens"][batch])
        journal.add(f"{batch}/{turn}", {**stock["times"][batch], **ours["times"][batch]})


def _in_a_process(
    served: Subject, arms: Sequence[Contender], load: Load, turn: int, rerouting: bool
) -> dict[str, Any]:
    job = {
        "folder": served.folder,
        "table": str(served.table) if rerouting else None,
        "options": served.options,
        "arms": [[a.name, a.policy.to_dict() if a.policy else None] for a in arms],
        "load": vars(load),
        "turn": turn,
        "K": served.K,
        "vocabulary": served.vocabulary,
    }
    environment = dict(os.environ)
    if not rerouting and served.options.get("load_format") != LOAD_FORMAT:
        environment["VLLM_PLUGINS"] = ",".join(other_plugins(environment))
    done = subprocess.run(
        [sys.executable, "-m", __name__],
        input=json.dumps(job),
        env=environment,
        capture_output=True,
        text=True,
    )
    for line in done.stdout.splitlines():
        if line.startswith(RESULT):
            found: dict[str, Any] = json.loads(line.removeprefix(RESULT))
            if found.get("failed"):
                raise BenchError(found["failed"])
            return found
    which = "that re-routes" if rerouting else "without the plug-in"
    raise BenchError(f"the engine {which} failed:\n{(done.stdout + done.stderr)[-_TAIL:]}")


def other_plugins(environment: Mapping[str, str]) -> list[str]:
    """The plug-ins of vLLM that would be loaded, but for this one."""
    if "VLLM_PLUGINS" in environment:
        names = environment["VLLM_PLUGINS"].split(",")
    else:
        points = entry_points()
        groups = [group for group in points.groups if group.startswith("vllm.")]
        names = [point.name for group in groups for point in points.select(group=group)]
    return sorted(set(names) - {PLUGIN})


def measured(job: dict[str, Any]) -> dict[str, Any]:
    """In the process of its own. times: by batch size and arm, as in the journal of `sere bench`.
    tokens: what stock routing wrote. Of an engine that re-routes also gates, machine, kernels."""
    load = Load(**{**job["load"], "batches": tuple(job["load"]["batches"])})
    policies, most = [Policy.from_dict(p) for _, p in job["arms"] if p], max(load.batches)
    engine = Engine(job["folder"], job["table"], batch=most, policies=policies, **job["options"])
    found: dict[str, Any] = {"times": {}, "tokens": {}, "gates": {}}
    if job["table"]:
        found |= {"machine": engine.probe(), "kernels": engine.kernels()}
    for batch in load.batches:
        prompts = load.prompts(batch, 0, job["vocabulary"])
        if job["table"]:
            found["gates"][str(batch)] = gate(engine, load, batch, job["K"], job["vocabulary"])
        written = engine.generate(prompts, load.output_len, to_the_end=True)
        found["tokens"][str(batch)] = written.token_ids
        found["times"][str(batch)] = _times(engine, load, batch, job)
    return found


def _times(engine: Engine, load: Load, batch: int, job: dict[str, Any]) -> dict[str, Any]:
    arms = [Contender(n, Policy.from_dict(p) if p else None) for n, p in job["arms"]]
    prompts = load.prompts(batch, job["turn"], job["vocabulary"])

    def turn(load: Load) -> dict[str, dict[str, Any]]:
        if job["table"]:
            return {arm.name: timed(engine, arm, prompts, load) for arm in arms}
        return {STOCK: timed_stock(engine, prompts, load)}

    turn(replace(load, output_len=WARM_TOKENS))
    turns = [turn(load) for _ in range(_TURNS)]
    return {arm.name: _median([found[arm.name] for found in turns]) for arm in arms}


def _median(turns: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Routes are the same in every turn: their prompts are."""
    return {**turns[-1], "tpot_ms": statistics.median(turn["tpot_ms"] for turn in turns)}


if __name__ == "__main__":
    try:
        _found = measured(json.loads(sys.stdin.read()))
    except BenchError as error:
        _found = {"failed": str(error)}
    print(RESULT + json.dumps(_found), flush=True)
