"""`sere tune`: the fastest settings whose loss of quality stays within a budget.

One dial does most of it: tau, the loss that no single replacement may exceed. For every batch size
the largest tau within the budget is found by bisection (half of the passages); settings per layer
are then solved for by trading savings against losses; the paper's rule competes. Batch
sizes differ in what they bear: the policy says what to do from which size on, stock routing where
nothing pays. On the other half it is checked, and made more cautious where the search was lucky;
then it goes into the table for serving to find. What was found so far survives a killed run.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch

from sere.evaluation.evaluate import load
from sere.evaluation.passages import load_passages, passages_hash, say_if_seen
from sere.evaluation.quality import Judge
from sere.files import check_writable, locked, unfinished
from sere.models.hub import located
from sere.models.moe import MoELayer
from sere.policy import STOCK, Policy
from sere.results import pictures, provenance
from sere.results.journal import Journal, contents
from sere.step_cost.cost import CARD, Cost, from_bench, roofline
from sere.table import Table
from sere.tuning.choice import as_text, plot, policy_of
from sere.tuning.plan import Plan
from sere.tuning.search import TAUS, Budget, BudgetError, Point, Tuner


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
    check_writable(table_path, kind="table")
    table, folder = Table.load(table_path), located(model_name)
    table.check_made_for(folder)
    model, layers = load(folder, stream)
    cost = cost or _cost(layers, table.fingerprint.K, bench, device or {})
    say_if_seen(table, data)
    drawn = {"samples": samples, "prompt": prompt, "length": length, "seed": seed}
    passages = load_passages(model_name, folder, data, **drawn)
    half = _half(len(passages), max(batches), wanted)
    settings = {
        "model": model_name,
        "budget": asdict(wanted),
        "batches": list(batches),
        "passages": passages_hash(passages),
        "method": table.method,
        **contents(folder, [table]),
    }
    provenance.check_settings(output, settings)
    with locked(table_path), Journal(unfinished(output), settings) as journal:
        unseen = Judge(model, layers, passages[half:], journal, False, first=half)
        tuner = Tuner(table, Judge(model, layers, passages[:half], journal, False), wanted, cost)
        checker = replace(tuner, judge=unseen, title="check")
        _say_plan(tuner, checker, batches, per_layer)
        if dry_run:
            journal.forget()
            return {}
        sizes = {"search": half, "check": len(passages) - half}
        about = {"E": table.fingerprint.E, "cost": asdict(cost), "passages": sizes}
        found = _tuned(tuner, checker, sorted(batches), per_layer)
        result = {"provenance": provenance.provenance(), "settings": settings, **about, **found}
        _keep(result, output, table, table_path)
    return result


_FLAGS = "--bandwidth, --expert-mb, --tflops and --route-us"
ERROR, PAPER = Policy(S=1, min_active=1, tau=0.0), Policy(S=1)


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


def _half(passages: int, batch: int, budget: Budget) -> int:
    """How many passages to search on, in whole batches; as many at least are left to check on."""
    if passages < 4 * batch:
        raise BudgetError(
            f"{passages} passages for batches of {batch}: at least {4 * batch} are needed, two "
            "batches to search on and two to check, as one has no error to tell; raise --samples "
            f"({5 * batch} will do where few texts are alike), bring more text or lower --batch"
        )
    half = passages // (2 * batch) * batch
    budget.check_passages(half)
    return half


def _say_plan(tuner: Tuner, checker: Tuner, batches: Sequence[int], per_layer: bool) -> None:
    """What it will take, on stderr. Raises `BudgetError`."""
    plan = Plan.of(tuner.table, batches, per_layer, len(tuner.judge.passages))
    plan.seconds = _check_stock(tuner, checker, max(batches), tuner.judge.journal)
    print(plan.as_text(tuner.judge.model), file=sys.stderr)
    tuner.settings = plan.settings


def _check_stock(tuner: Tuner, checker: Tuner, batch: int, journal: Journal) -> float:
    """Seconds of a pass over the passages to search on; about 0 where a run resumes. Raises
    `BudgetError` where stock answers too little for the budget to mean anything."""
    try:
        start = time.perf_counter()
        tuner.check_stock(batch)
        taken = time.perf_counter() - start
        checker.check_stock(batch)
        return taken
    except BudgetError:
        journal.forget()
        raise


def _keep(result: dict[str, Any], output: str, table: Table, table_path: str) -> None:
    """What was found is on the screen before any disk can be full."""
    print(as_text(result))
    provenance.save_json(output, result)
    picture = pictures.beside(output)
    plot(result, picture)
    print(f"\nwritten: {output}, {picture}", end="; ")
    _store(result, table, table_path)


def _store(result: dict[str, Any], table: Table, path: str) -> None:
    """Put the choice into the table, where serving finds it; stock routing is a choice, too."""
    chosen = Policy.from_dict(result["policy"]) if result["policy"] else None
    replace(table, policy=chosen or STOCK).save(path)
    print("the policy" if chosen else "stock routing, as the choice,", f"is in {path}")


def _tuned(tuner: Tuner, checker: Tuner, batches: Sequence[int], per_layer: bool) -> dict[str, Any]:
    """What the search found, what the check made of it, and its figures there."""
    by_batch = tuner.judge.at_once([partial(_search, tuner, b, per_layer) for b in batches])
    searched = _chosen(tuner, by_batch)
    chosen = _confirmed(checker, searched, batches)
    held_out = checker.at_all([None, chosen], batches)
    if chosen:  # beside the front, on the same passages
        for found, (point,) in zip(by_batch, tuner.at_all([chosen], batches), strict=True):
            found["as_chosen"] = _as_dict(point)
    return {
        "policy": chosen.to_dict() if chosen else None,
        "searched": searched.to_dict() if searched else None,
        "by_batch": by_batch,
        "held_out": [
            {
                "batch": batch,
                "stock": _as_dict(stock),
                "chosen": _as_dict(point),
                "kept": point.within(checker.budget),
                "enable": bool(chosen and chosen.at(batch)) and point.seconds < stock.seconds,
            }
            for batch, (stock, point) in zip(batches, held_out, strict=True)
        ],
    }


def _search(tuner: Tuner, batch: int, per_layer: bool) -> dict[str, Any]:
    """What one batch size could have for itself, by the two rules."""
    (stock,) = tuner.points([None], batch)

    def by_similarity() -> tuple[None, list[Point]]:
        return None, tuner.by_similarity(PAPER, batch)

    def by_error() -> tuple[Point | None, list[Point]]:
        found, seen = tuner.boldest([replace(ERROR, tau=tau) for tau in TAUS], batch)
        if per_layer and found and found.seconds < stock.seconds:
            better, more = tuner.per_layer(found)
            found, seen = better or found, [*seen, *more]
        return found, seen

    paper: list[Point] = []
    found, seen = None, paper
    if batch > 1:  # a row that is alone keeps its experts, whatever the policy
        (_, paper), (found, seen) = tuner.judge.at_once([by_similarity, by_error])

    def fastest(points: Sequence[Point | None]) -> dict[str, Any] | None:
        fit = [p for p in points if p and p.within(tuner.budget) and p.seconds < stock.seconds]
        best = min(fit, key=lambda p: p.seconds, default=None)
        return _as_dict(best) if best else None

    return {
        "batch": batch,
        "stock": _as_dict(stock),
        "error": fastest([found]),
        "paper": fastest(paper),
        "points": [_as_dict(p) for p in (*paper, *seen)],
    }


def _chosen(tuner: Tuner, by_batch: list[dict[str, Any]]) -> Policy | None:
    """The fastest of the two rules, the paper's with each threshold, as that is one for all batch
    sizes; each with its best at every batch size."""
    stock = {found["batch"]: found["stock"]["seconds"] for found in by_batch}
    candidates = [(ERROR, {found["batch"]: policy_of(found["error"]) for found in by_batch})]
    kept = [p["policy"] for found in by_batch for p in _similar(found, tuner.budget)]
    for quantile in sorted({policy["rho_quantile"] for policy in kept}, key=str):
        base = replace(PAPER, rho_quantile=quantile)
        own = {found["batch"]: _with(quantile, found, tuner.budget) for found in by_batch}
        candidates.append((base, own))
    tried = [partial(tuner.together, _in_common(base, own), own) for base, own in candidates]
    fit = [
        (sum(p.seconds / stock[p.batch] for p in points), policy)
        for policy, points in tuner.judge.at_once(tried)
        if policy is not None
    ]
    return min(fit, key=lambda found: found[0])[1] if fit else None


def _similar(found: dict[str, Any], budget: Budget) -> list[dict[str, Any]]:
    """The points by the paper's rule that keep the budget and save time, the fastest first."""
    fit = [
        point
        for point in found["points"]
        if point["policy"]["tau"] is None
        and point["upper"] <= budget.limit
        and point["seconds"] < found["stock"]["seconds"]
    ]
    return sorted(fit, key=lambda point: point["seconds"])


def _with(quantile: float | None, found: dict[str, Any], budget: Budget) -> Policy | None:
    """The fastest of these with or without such a threshold; it then has it, which can only make it
    more cautious."""
    for point in _similar(found, budget):
        if point["policy"]["rho_quantile"] in (None, quantile):
            return replace(Policy.from_dict(point["policy"]), rho_quantile=quantile)
    return None


def _confirmed(checker: Tuner, chosen: Policy | None, batches: Sequence[int]) -> Policy | None:
    """The choice, more cautious wherever passages that the search did not see say so."""
    if chosen is None:
        return None
    own = {batch: chosen.at(batch) for batch in batches}
    return checker.together(replace(chosen, batches={}), own)[0]


def _in_common(base: Policy, own: Mapping[int, Policy | None]) -> Policy:
    """What holds where a batch size says nothing of its own: the most cautious of all settings."""
    wanted = [policy for policy in own.values() if policy]
    if base.tau is None:
        return replace(base, S=max((policy.S for policy in wanted), default=1))
    taus = [policy.tau for policy in wanted if policy.tau is not None]
    return replace(base, tau=min(taus, default=0.0))


def _as_dict(point: Point) -> dict[str, Any]:
    return {**asdict(point), "policy": point.policy.to_dict() if point.policy else None}
