"""`sere tune`: the fastest settings whose loss of quality stays within a budget.

One dial does most of it: tau, the loss that no single replacement may exceed. For every batch size
the largest tau within the budget is found by bisection (half of the passages); settings per layer
are then solved for by trading savings against losses; the paper's rule competes. Batch
sizes differ in what they bear: the policy says what to do from which size on, stock routing where
nothing pays. On the other half it is checked, and made more cautious where the search was lucky;
then it goes into the table for serving to find.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from sere import demo_model, report
from sere.cost import Cost, from_bench, roofline
from sere.evaluate import load, load_passages, passages_hash
from sere.files import check_writable, replaced
from sere.journal import Journal
from sere.policy import STOCK, Policy
from sere.quality import Judge
from sere.search import BUDGETS, Budget, BudgetError, Point, Tuner
from sere.table import Table


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
) -> dict[str, Any]:
    """Search, check, store: `output` (JSON), a plot beside it, and the policy in the table.

    device: what `sere.cost.roofline` is to know of the machine to serve on. bench: a result of
    `sere bench` to take the cost from instead; cost: instead of both. Raises `BudgetError` where
    there are too few passages to be sure of anything.
    """
    if bench and device:
        raise ValueError(f"{bench} was measured: --bench leaves nothing for {_FLAGS} to say")
    wanted = Budget.parse(budget)
    check_writable(output)
    check_writable(table_path)
    table = Table.load(table_path)
    folder = demo_model.resolve(model_name)
    table.check_made_for(folder)
    model, layers = load(folder)
    K = table.fingerprint.K
    if cost is None:
        measured = from_bench(bench, layers, K) if bench else None
        cost = measured or roofline(layers[0], K, **(device or {}))
    passages = load_passages(
        model_name, folder, data, samples=samples, prompt=prompt, length=length, seed=seed
    )
    if len(passages) < 4 * max(batches):
        raise BudgetError(
            f"{len(passages)} passages for batches of {max(batches)}: at least "
            f"{4 * max(batches)} are needed for an error estimate; raise --samples or lower --batch"
        )
    half = len(passages) // (2 * max(batches)) * max(batches)
    wanted.check_passages(half)
    settings = {
        "model": model_name,
        "budget": asdict(wanted),
        "batches": list(batches),
        "passages": passages_hash(passages),
        "method": table.method,
    }
    with Journal(f"{output}.unfinished", settings) as journal:
        judge = Judge(model, layers, passages[:half], journal, False, "search")
        tuner = Tuner(table, judge, wanted, cost)
        by_batch = [_search(tuner, batch, per_layer) for batch in sorted(batches)]
        searched = chosen = _chosen(tuner, by_batch)
        with Journal(f"{output}.held-out.unfinished", settings) as other:
            unseen = Judge(model, layers, passages[half:], other, False, "check")
            checker = replace(tuner, judge=unseen)
            chosen = _confirmed(checker, chosen, sorted(batches))
            held_out = [checker.points([None, chosen], batch) for batch in sorted(batches)]
    result = {
        "provenance": report.provenance(),
        "settings": settings,
        "cost": asdict(cost),
        "E": table.fingerprint.E,
        "policy": chosen.to_dict() if chosen else None,
        "searched": searched.to_dict() if searched else None,
        "passages": {"search": half, "check": len(passages) - half},
        "by_batch": by_batch,
        "held_out": [
            {
                "batch": batch,
                "stock": _as_dict(stock),
                "chosen": _as_dict(point),
                "kept": point.within(wanted),
                "enable": bool(chosen and chosen.at(batch)) and point.seconds < stock.seconds,
            }
            for batch, (stock, point) in zip(sorted(batches), held_out, strict=True)
        ],
    }
    report.save_json(output, result)
    plot(result, Path(output).with_suffix(".png"))
    print(as_text(result))
    replace(table, policy=chosen or STOCK).save(table_path)
    where = f"written: {output}, {Path(output).with_suffix('.png')}"
    what = "the policy" if chosen else "stock routing, as the choice,"
    print(f"\n{where}; {what} is in {table_path}")
    return result


_FLAGS = "--bandwidth, --expert-mb and --tflops"
RULES = ("error", "paper")
ERROR, PAPER = Policy(S=1, min_active=1, tau=0.0), Policy(S=1)


def _search(tuner: Tuner, batch: int, per_layer: bool) -> dict[str, Any]:
    """What one batch size could have for itself, by the two rules."""
    K = tuner.table.fingerprint.K
    stock, *paper = tuner.points([None, *(replace(PAPER, S=S) for S in range(1, K))], batch)
    found, seen = tuner.largest_tau(ERROR, batch)
    if per_layer and found and found.seconds < stock.seconds:
        better, more = tuner.per_layer(found)
        found, seen = better or found, [*seen, *more]

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
    """The faster of the two rules, each with its best at every batch size."""
    stock = {found["batch"]: found["stock"]["seconds"] for found in by_batch}
    fit = []
    for rule, base in zip(RULES, (ERROR, PAPER), strict=True):
        own = {
            found["batch"]: Policy.from_dict(found[rule]["policy"]) if found[rule] else None
            for found in by_batch
        }
        policy, points = tuner.together(_in_common(base, own), own)
        if policy is not None:
            fit.append((sum(p.seconds / stock[p.batch] for p in points), policy))
    return min(fit, key=lambda found: found[0])[1] if fit else None


def _confirmed(checker: Tuner, chosen: Policy | None, batches: Sequence[int]) -> Policy | None:
    """The choice, more cautious wherever passages that the search did not see say so."""
    if chosen is None:
        return None
    own = {batch: chosen.at(batch) for batch in batches}
    return checker.together(replace(chosen, batches={}), own)[0]


def _in_common(base: Policy, own: Mapping[int, Policy | None]) -> Policy:
    """For steps smaller than any measured: the most cautious of all settings."""
    wanted = [policy for policy in own.values() if policy]
    if base.tau is None:
        return replace(base, S=max((policy.S for policy in wanted), default=1))
    taus = [policy.tau for policy in wanted if policy.tau is not None]
    return replace(base, tau=min(taus, default=0.0))


def _as_dict(point: Point) -> dict[str, Any]:
    return {**asdict(point), "policy": point.policy.to_dict() if point.policy else None}


def as_text(result: dict[str, Any]) -> str:
    """What was chosen and what it brings, on passages that the search did not see."""
    name, limit = result["settings"]["budget"].values()
    lines = [f"budget: {name} <= {limit:g} ({BUDGETS[name]})"]
    if not result["policy"]:
        lines.append("nothing keeps the budget and saves time: do not enable re-routing")
        if result["searched"]:
            lines.append(
                f"(The search found {Policy.from_dict(result['searched']).brief()}, which the "
                f"{result['passages']['check']} passages that it did not see do not confirm. Few "
                "batches leave wide intervals: raise --samples to be sure.)"
            )
        return "\n".join(lines)
    chosen_policy = Policy.from_dict(result["policy"])
    lines += [f"chosen: {chosen_policy.brief()}", ""]
    rows = []
    for own, found in zip(result["by_batch"], result["held_out"], strict=True):
        stock, chosen = found["stock"], found["chosen"]
        here = chosen_policy.at(found["batch"])
        rows.append(
            [
                str(found["batch"]),
                f"{stock['active']:.1f} -> {chosen['active']:.1f}",
                f"{chosen['loss']:.2g} (< {chosen['upper']:.2g})",
                "yes" if found["kept"] else "NO",
                f"{stock['seconds'] / chosen['seconds']:.2f}x",
                "enable" if found["enable"] else "leave off",
                here.brief() if here else "stock",
                *(Policy.from_dict(b["policy"]).brief() if (b := own[r]) else "-" for r in RULES),
            ]
        )
    head = ["batch", "active experts", name, "kept", "predicted", "advice", "policy"]
    head += ["alone, by error", "alone, the paper's"]
    lines.append(report.text_table(head, rows))
    cost = Cost(**result["cost"])
    lines.append(f"predicted: decode speed of {cost.of}, {cost.source}")
    return "\n".join(lines)


def plot(result: dict[str, Any], path: Path) -> None:
    """The front at every batch size: loss against active experts."""
    from matplotlib.figure import Figure

    name, limit = result["settings"]["budget"].values()
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for found in result["by_batch"]:
        points = sorted((p["active"], max(p["loss"], 1e-7)) for p in found["points"])
        axes.plot(*zip(*points, strict=True), "o", label=f"batch {found['batch']}")
    axes.axhline(limit, color="black", linestyle=":", label="budget")
    axes.set_yscale("log")
    axes.set_xlabel(f"active experts per layer and step (of {result['E']})")
    axes.set_ylabel(name)
    axes.legend()
    axes.grid(alpha=0.3)
    with replaced(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
