"""`sere tune`: the fastest settings whose loss of quality stays within a budget.

One dial does most of it: tau, the loss that no single replacement may exceed. For every batch size
the largest tau within the budget is found by bisection (half of the passages); settings per layer
are then solved for by trading each layer's saving against its loss; the paper's rule competes. What
wins is checked on the other half, and goes into the table for serving to find.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from sere import demo_model, report
from sere.cost import Cost, roofline
from sere.evaluate import load, load_passages, passages_hash
from sere.files import check_writable, replaced
from sere.journal import Journal
from sere.policy import Policy
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
    cost: Cost | None = None,
) -> dict[str, Any]:
    """Search, check, store: `output` (JSON), a plot beside it, and the policy in the table.

    device: what `sere.cost.roofline` is to know of the machine to serve on; cost: instead of it.
    Raises `BudgetError` where there are too few passages to be sure of anything.
    """
    wanted = Budget.parse(budget)
    check_writable(output)
    check_writable(table_path)
    table = Table.load(table_path)
    folder = demo_model.resolve(model_name)
    model, layers = load(folder)
    passages = load_passages(
        model_name, folder, data, samples=samples, prompt=prompt, length=length, seed=seed
    )
    if len(passages) < 4 * max(batches):
        raise BudgetError(
            f"{len(passages)} passages for batches of {max(batches)}: at least "
            f"{4 * max(batches)} are needed for an error estimate; raise --samples or lower --batch"
        )
    cost = cost or roofline(layers[0], table.fingerprint.K, **(device or {}))
    half = len(passages) // (2 * max(batches)) * max(batches)
    settings = {
        "model": folder,
        "budget": asdict(wanted),
        "batches": list(batches),
        "passages": passages_hash(passages),
        "method": table.method,
    }
    with Journal(f"{output}.unfinished", settings) as journal:
        judge = Judge(model, layers, passages[:half], journal, False, "search")
        tuner = Tuner(table, judge, wanted, cost)
        by_batch = [_search(tuner, batch) for batch in batches]
        chosen = _common(tuner, by_batch, per_layer)
        with Journal(f"{output}.held-out.unfinished", settings) as other:
            unseen = Judge(model, layers, passages[half:], other, False, "check")
            checker = replace(tuner, judge=unseen)
            held_out = [checker.points([None, chosen], batch) for batch in batches]
    result = {
        "provenance": report.provenance(),
        "settings": settings,
        "cost": asdict(cost),
        "E": table.fingerprint.E,
        "policy": chosen.to_dict() if chosen else None,
        "by_batch": by_batch,
        "held_out": [
            {
                "batch": batch,
                "stock": _as_dict(stock),
                "chosen": _as_dict(point),
                "kept": point.within(wanted),
                "enable": bool(chosen) and point.seconds < stock.seconds,
            }
            for batch, (stock, point) in zip(batches, held_out, strict=True)
        ],
    }
    report.save_json(output, result)
    plot(result, Path(output).with_suffix(".png"))
    print(as_text(result))
    replace(table, policy=chosen).save(table_path)
    where = f"written: {output}, {Path(output).with_suffix('.png')}"
    print(f"\n{where}; the policy is in {table_path}" if chosen else f"\n{where}")
    return result


def _search(tuner: Tuner, batch: int) -> dict[str, Any]:
    """What one batch size could have for itself."""
    K = tuner.table.fingerprint.K
    stock, *paper = tuner.points([None, *(Policy(S=S) for S in range(1, K))], batch)
    best, seen = tuner.largest_tau(Policy(S=1, min_active=1), batch)
    fit = [p for p in (*paper, best) if p and p.within(tuner.budget) and p.seconds < stock.seconds]
    chosen = min(fit, key=lambda p: p.seconds, default=None)
    return {
        "batch": batch,
        "stock": _as_dict(stock),
        "best": _as_dict(chosen) if chosen else None,
        "points": [_as_dict(p) for p in (*paper, *seen)],
    }


def _common(tuner: Tuner, by_batch: list[dict[str, Any]], per_layer: bool) -> Policy | None:
    """One policy that keeps the budget at every batch size where anything helps at all."""
    wanting = [found for found in by_batch if found["best"]]
    if not wanting:
        return None
    candidates = [Policy.from_dict(found["best"]["policy"]) for found in wanting]
    sizes = [found["batch"] for found in wanting]

    def measured(policy: Policy) -> list[Point]:
        return [tuner.points([policy], batch)[0] for batch in sizes]

    fit = []
    for policy in candidates:
        points = measured(policy)
        if all(point.within(tuner.budget) for point in points):
            fit.append((sum(p.seconds for p in points), policy, points))
    if not fit:  # the most cautious of all
        taus = [policy.tau for policy in candidates if policy.tau is not None]
        return Policy(S=1, min_active=1, tau=min(taus)) if taus else None
    total, policy, points = min(fit, key=lambda found: found[0])
    if per_layer and policy.tau is not None:
        better, _ = tuner.per_layer(max(points, key=lambda p: p.batch))
        if better and better.policy:
            others = measured(better.policy)
            if (
                all(p.within(tuner.budget) for p in others)
                and sum(p.seconds for p in others) < total
            ):
                return better.policy
    return policy


def _as_dict(point: Point) -> dict[str, Any]:
    return {**asdict(point), "policy": point.policy.to_dict() if point.policy else None}


def as_text(result: dict[str, Any]) -> str:
    """What was chosen and what it brings, on passages that the search did not see."""
    name, limit = result["settings"]["budget"].values()
    lines = [f"budget: {name} <= {limit:g} ({BUDGETS[name]})"]
    if not result["policy"]:
        lines.append("nothing keeps the budget and saves time: do not enable re-routing")
        return "\n".join(lines)
    lines += [f"chosen: {Policy.from_dict(result['policy']).brief()}", ""]
    rows = []
    for own, found in zip(result["by_batch"], result["held_out"], strict=True):
        stock, chosen = found["stock"], found["chosen"]
        best = own["best"]["policy"] if own["best"] else None
        rows.append(
            [
                str(found["batch"]),
                f"{stock['active']:.1f} -> {chosen['active']:.1f}",
                f"{chosen['loss']:.2g} (< {chosen['upper']:.2g})",
                "yes" if found["kept"] else "NO",
                f"{stock['seconds'] / chosen['seconds']:.2f}x",
                "enable" if found["enable"] else "leave off",
                Policy.from_dict(best).brief() if best else "-",
            ]
        )
    head = ["batch", "active experts", name, "kept", "predicted", "advice", "best by itself"]
    lines.append(report.text_table(head, rows))
    lines.append(f"predicted: decode speed of the experts, {result['cost']['source']}")
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
