"""`sere tune`: the fastest settings whose loss of quality stays within a budget.

One dial does most of it: tau, the loss that no single replacement may exceed. For every batch size
the largest tau within the budget is found by bisection (half of the passages), for experts that
stand in and, where the table has them, for linear maps; then with pools, where they can read less;
settings per layer are then solved for by trading savings against losses; the paper's rule competes.
Batch sizes differ in what they bear: the policy says what to do from which size on, stock routing
where nothing pays. On the other half it is checked, and made more cautious where the search was
lucky; then it goes into the table for serving to find. What was found so far survives a killed run.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch

from sere.evaluation.decoding import Passage
from sere.evaluation.evaluate import load
from sere.evaluation.passages import (
    SEARCHED,
    load_passages,
    passages_hash,
    say_if_seen,
    search_hashes,
)
from sere.evaluation.quality import Judge
from sere.files import check_writable, locked, unfinished
from sere.models.moe import MoELayer
from sere.models.outline import fetched
from sere.policy import STOCK, Policy, in_words
from sere.results import pictures, provenance
from sere.results.journal import Journal, contents
from sere.step_cost.cost import CARD, Cost, from_bench, roofline
from sere.table import Table
from sere.tuning import joint
from sere.tuning.budget import Budget, BudgetError
from sere.tuning.choice import as_text, caveats
from sere.tuning.kinds import Kind, kinds_of
from sere.tuning.one_size import as_dict, search
from sere.tuning.picture import plot
from sere.tuning.plan import Plan
from sere.tuning.search import Tuner
from sere.tuning.why import why

_SEARCH = {"version of the search": 2}  # of what its pieces are, in an unfinished run's file
_SECONDS = "seconds of stock routing"  # a piece of it


def run(
    model_name: str,
    table_path: str,
    *,
    budget: str,
    batches: Sequence[int],
    output: str,
    data: str | None = None,
    samples: int = 512,
    prompt: int = 64,
    length: int = 64,
    seed: int = 0,
    per_layer: bool = True,
    device: Mapping[str, float] | None = None,
    bench: str | None = None,
    cost: Cost | None = None,
    dry_run: bool = False,
    stream: bool | None = None,
) -> dict[str, Any]:
    """Search, check, store: `output` (JSON), a plot beside it, and the policy in the table.

    device: what `cost.roofline` is to know of where it is served. bench: a result of `sere bench`
    to take the cost from instead; cost: instead of both. dry_run: only say what it would take;
    returns {}. stream: one decoder layer at a time; None: if need be. Raises `BudgetError`.
    """
    _check_machine(bench, device)
    wanted = Budget.parse(budget)
    pictures.check_result(output, table_path, data, bench)
    folder = fetched(model_name)
    table = _table(table_path, folder)
    model, layers = load(folder, stream)
    cost = cost or _cost(layers, table.fingerprint.K, bench, device or {})
    told = say_if_seen(table, data)
    drawn = {"samples": samples, "prompt": prompt, "length": length, "seed": seed}
    passages = load_passages(model_name, folder, data, **drawn)
    half = _half(len(passages), samples, max(batches), wanted)
    settings = {
        "model": model_name,
        "budget": asdict(wanted),
        "batches": list(batches),
        "passages": passages_hash(passages),
        "method": table.method,
        **contents(folder, [table]),
    }
    provenance.check_settings(output, settings)
    with locked(table_path), Journal(unfinished(output), settings | _SEARCH) as journal:
        unseen = Judge(model, layers, passages[half:], journal, False, first=half)
        tuner = Tuner(table, Judge(model, layers, passages[:half], journal, False), wanted, cost)
        checker = replace(tuner, judge=unseen, title="check")
        kinds = kinds_of(table, layers)
        kept = _say_plan(tuner, checker, kinds, batches, per_layer).kept
        if dry_run:
            journal.keep() if kept else journal.forget()
            return {}
        sizes = {"search": half, "check": len(passages) - half}
        about = {"E": table.fingerprint.E, "cost": asdict(cost), "passages": sizes}
        about |= _tuned(tuner, checker, kinds, sorted(batches), per_layer)
        about["warnings"] = [*told, *tuner.unread]
        result = {"provenance": provenance.provenance(), "settings": settings, **about}
        return _finished(result, output, _searched(table, passages[:half]), table_path)


def _table(path: str, folder: str) -> Table:
    """That the policy is to be stored in."""
    table = Table.load(path)  # first: what is no table is not to be replaced, but named otherwise
    check_writable(path, kind="table")
    table.check_made_for(folder)
    return table


_FLAGS = "--bandwidth, --expert-mb, --tflops and --route-us"


def _check_machine(bench: str | None, device: Mapping[str, float] | None) -> None:
    if bench and device:
        raise ValueError(f"{bench} was measured: --bench leaves nothing for {_FLAGS} to say")


def _cost(
    layers: Sequence[MoELayer], K: int, bench: str | None, device: Mapping[str, float]
) -> Cost:
    if bench:
        return from_bench(bench, layers, K)
    cost = roofline(layers[0], K, **device)
    here = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return replace(cost, card="") if CARD.split()[-1] in here else cost


def _half(passages: int, samples: int, batch: int, budget: Budget) -> int:
    """How many passages to search on, in whole batches; as many at least are left to check on.
    samples: how many were asked for."""
    if passages < 4 * batch:
        raise BudgetError(
            f"{passages} passages for batches of {batch}: at least {4 * batch} are needed, two "
            "batches to search on and two to check, as one has no error to tell; raise --samples "
            f"({5 * batch} will do where few texts are alike), bring more text or lower --batch"
        )
    half = passages // (2 * batch) * batch
    budget.check_passages(half)
    _say_passages(samples, passages, half, batch)
    return half


def _say_passages(samples: int, found: int, half: int, batch: int) -> None:
    """Why those that are searched on are no half of those that were asked for."""
    fewer = (
        f" of {samples} (no more texts, or repeats, which count once)" if found < samples else ""
    )
    print(
        f"{found} passages{fewer}: {half} to search on, whole batches of {batch}, and the other "
        f"{found - half} to check",
        file=sys.stderr,
    )


def _say_plan(
    tuner: Tuner, checker: Tuner, kinds: Sequence[Kind], batches: Sequence[int], per_layer: bool
) -> Plan:
    """What it will take, also on stderr. Raises `BudgetError`."""
    journal = tuner.judge.journal
    plan = Plan.of(tuner.table, kinds, batches, per_layer, len(tuner.judge.passages))
    plan.kept, plan.file = _kept(journal), journal.path.name
    plan.seconds = _check_stock(tuner, checker, max(batches), journal)
    print(plan.as_text(tuner.judge.model), file=sys.stderr)
    tuner.settings = plan.settings
    return plan


def _kept(journal: Journal) -> int:
    """How many settings an earlier run has measured, or begun to."""
    return len({name.partition("/")[2] for name in journal} - {""})


def _check_stock(tuner: Tuner, checker: Tuner, batch: int, journal: Journal) -> float:
    """Seconds of a pass over the passages to search on, in this run or the one that it resumes; 0
    where neither knows. Raises `BudgetError` where stock answers too little for the budget to mean
    anything."""
    try:
        fresh, start = not len(journal), time.perf_counter()
        tuner.check_stock(batch)
        if fresh:
            journal.add(_SECONDS, time.perf_counter() - start)
        checker.check_stock(batch)
        return float(journal.get(_SECONDS) or 0)
    except BudgetError:
        journal.forget()
        raise


def _finished(result: dict[str, Any], output: str, table: Table, table_path: str) -> dict[str, Any]:
    """With the reason. What was found is on the screen before any disk can be full."""
    warnings = [*result["warnings"], *caveats(result)]
    result = {**result, "why": why(result), "warnings": warnings}
    print(as_text(result))
    provenance.save_json(output, result)
    picture = pictures.beside(output)
    plot(result, picture)
    print(f"\nwritten: {output}, {picture}", end="; ")
    _store(result, table, table_path)
    return result


def _searched(table: Table, passages: Sequence[Passage]) -> Table:
    """The table, with what its policy was searched on: see `evaluate`."""
    return replace(table, provenance={**table.provenance, SEARCHED: search_hashes(passages)})


def _store(result: dict[str, Any], table: Table, path: str) -> None:
    """Put the choice into the table, where serving finds it; stock routing is a choice, too."""
    chosen = Policy.from_dict(result["policy"]) if result["policy"] else None
    table.check_policy(chosen or STOCK)
    replace(table, policy=chosen or STOCK).save(path)
    before = f", in the place of {in_words(table.policy)}" if table.policy else ""
    print("the policy" if chosen else "stock routing, as the choice,", f"is in {path}{before}")


def _tuned(
    tuner: Tuner, checker: Tuner, kinds: Sequence[Kind], batches: Sequence[int], per_layer: bool
) -> dict[str, Any]:
    """What the search found, what the check made of it, and its figures there."""
    searches = [partial(search, tuner, kinds, batch, per_layer) for batch in batches]
    by_batch = tuner.judge.at_once(searches)
    searched = joint.chosen(tuner, kinds, by_batch)
    chosen = joint.confirmed(checker, searched, batches)
    held_out = checker.at_all([None, chosen], batches)
    if chosen:  # beside the front, on the same passages
        for found, (point,) in zip(by_batch, tuner.at_all([chosen], batches), strict=True):
            found["as_chosen"] = as_dict(point, "chosen")
    return {
        "policy": chosen.to_dict() if chosen else None,
        "searched": searched.to_dict() if searched else None,
        "by_batch": by_batch,
        "held_out": [
            {
                "batch": batch,
                "stock": as_dict(stock, "stock"),
                "chosen": as_dict(point, "chosen"),
                "kept": point.within(checker.budget),
                "enable": bool(chosen and chosen.at(batch)) and point.seconds < stock.seconds,
            }
            for batch, (stock, point) in zip(batches, held_out, strict=True)
        ],
    }
