"""`sere tune`: the fastest settings whose loss of quality stays within a budget.

One dial does most of it: tau, the loss that no single replacement may exceed. For every batch size
the largest tau within the budget is found by bisection (half of the passages); settings per layer
are then solved for by trading savings against losses; the paper's rule competes. Batch
sizes differ in what they bear: the policy says what to do from which size on, stock routing where
nothing pays. On the other half it is checked, and made more cautious where the search was lucky;
then it goes into the table for serving to find. What was found so far survives a killed run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from sere import demo_model, report
from sere.cost import Cost, from_bench, roofline
from sere.evaluate import load, load_passages, passages_hash
from sere.files import check_writable, replaced
from sere.journal import Journal, contents
from sere.policy import STOCK, Policy
from sere.quality import Judge
from sere.search import BUDGETS, ENOUGH, TAUS, Budget, BudgetError, Point, Tuner
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
    check_writable(output, table_path, data, bench)
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
            f"{len(passages)} passages for batches of {max(batches)}: at least {4 * max(batches)} "
            "are needed, two batches to search on and two to check, as one has no error to tell; "
            "raise --samples, bring more text or lower --batch"
        )
    half = len(passages) // (2 * max(batches)) * max(batches)
    wanted.check_passages(half)
    settings = {
        "model": model_name,
        "budget": asdict(wanted),
        "batches": list(batches),
        "passages": passages_hash(passages),
        "method": table.method,
        **contents(folder, [table]),
    }
    with Journal(f"{output}.unfinished", settings) as journal:
        tuner = Tuner(table, Judge(model, layers, passages[:half], journal, False), wanted, cost)
        unseen = Judge(model, layers, passages[half:], journal, False, first=half)
        checker = replace(tuner, judge=unseen, title="check")
        try:
            for one in (tuner, checker):
                one.check_stock(max(batches))
        except BudgetError:
            journal.forget()
            raise
        result = {
            "provenance": report.provenance(),
            "settings": settings,
            "cost": asdict(cost),
            "E": table.fingerprint.E,
            "passages": {"search": half, "check": len(passages) - half},
            **_tuned(tuner, checker, sorted(batches), per_layer),
        }
        report.save_json(output, result)
    plot(result, Path(output).with_suffix(".png"))
    print(as_text(result))
    chosen = Policy.from_dict(result["policy"]) if result["policy"] else None
    replace(table, policy=chosen or STOCK).save(table_path)
    where = f"written: {output}, {Path(output).with_suffix('.png')}"
    what = "the policy" if chosen else "stock routing, as the choice,"
    print(f"\n{where}; {what} is in {table_path}")
    return result


_FLAGS = "--bandwidth, --expert-mb, --tflops and --route-us"
RULES = ("error", "paper")
_MARKS = {"o": "expected error", "^": "the paper's rule", "*": "chosen, on held-out passages"}
_FLOOR = 1e-7  # losses of zero, on a logarithmic axis
ERROR, PAPER = Policy(S=1, min_active=1, tau=0.0), Policy(S=1)


def _tuned(tuner: Tuner, checker: Tuner, batches: Sequence[int], per_layer: bool) -> dict[str, Any]:
    """What the search found, what the check made of it, and its figures there."""
    by_batch = [_search(tuner, batch, per_layer) for batch in batches]
    searched = _chosen(tuner, by_batch)
    chosen = _confirmed(checker, searched, batches)
    held_out = [checker.points([None, chosen], batch) for batch in batches]
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
    # The paper's floor leaves a batch of one as it is.
    paper = tuner.by_similarity(PAPER, batch) if batch > 1 else []
    found, seen = tuner.boldest([replace(ERROR, tau=tau) for tau in TAUS], batch)
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
    """The fastest of the two rules, the paper's with each threshold, as that is one for all batch
    sizes; each with its best at every batch size."""
    stock = {found["batch"]: found["stock"]["seconds"] for found in by_batch}
    candidates = [(ERROR, {found["batch"]: _policy_of(found["error"]) for found in by_batch})]
    kept = [p["policy"] for found in by_batch for p in _similar(found, tuner.budget)]
    for quantile in sorted({policy["rho_quantile"] for policy in kept}, key=str):
        base = replace(PAPER, rho_quantile=quantile)
        own = {found["batch"]: _with(quantile, found, tuner.budget) for found in by_batch}
        candidates.append((base, own))
    fit = []
    for base, own in candidates:
        policy, points = tuner.together(_in_common(base, own), own)
        if policy is not None:
            fit.append((sum(p.seconds / stock[p.batch] for p in points), policy))
    return min(fit, key=lambda found: found[0])[1] if fit else None


def _policy_of(point: dict[str, Any] | None) -> Policy | None:
    return Policy.from_dict(point["policy"]) if point else None


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


def as_text(result: dict[str, Any]) -> str:
    """What was chosen and what it brings, on passages that it was not searched on; the fronts."""
    name, limit = result["settings"]["budget"].values()
    lines = [f"budget: {name} <= {limit:g} ({BUDGETS[name]})", *_choice(result, name)]
    lines += _unmeasured(result) + _few_batches(result)
    lines += ["", "fewer experts for more loss, on the passages of the search:", _fronts(result)]
    cost = Cost(**result["cost"])
    lines.append(f"predicted: decode speed of {cost.of}, {cost.source}")
    return "\n".join(lines)


def _unmeasured(result: dict[str, Any]) -> list[str]:
    smallest = min(result["settings"]["batches"])
    if smallest == 1 or not result["policy"]:
        return []
    return [f"steps of fewer than {smallest} rows were not measured and get stock: add --batch 1"]


def _few_batches(result: dict[str, Any]) -> list[str]:
    """A warning where intervals cannot be trusted: rare bad batches may be among the unseen."""
    half, sizes = result["passages"]["search"], result["settings"]["batches"]
    few = [f"{half // batch} of {batch}" for batch in sorted(sizes) if half // batch < ENOUGH]
    if not few or result["settings"]["budget"]["name"] == "exact_match":
        return []
    return [
        f"few batches in each half ({', '.join(few)}): below {ENOUGH} of them the interval may "
        "miss rare bad ones; raise --samples to be sure"
    ]


def _why_not(result: dict[str, Any]) -> str:
    limit = result["settings"]["budget"]["limit"]
    points = [p for found in result["by_batch"] for p in found["points"]]
    if any(point["upper"] <= limit for point in points):
        return "what keeps the budget saves no time"
    least = min((point["upper"] for point in points), default=math.nan)
    return f"nothing that was tried keeps the budget (the least loss is below {least:.2g})"


def _choice(result: dict[str, Any], name: str) -> list[str]:
    if not result["policy"]:
        lines = [f"{_why_not(result)}: do not enable re-routing"]
        if result["searched"]:
            lines.append(
                f"(The search found {Policy.from_dict(result['searched']).brief()}, which the "
                f"{result['passages']['check']} passages that it did not see do not confirm. Few "
                "batches leave wide intervals: raise --samples to be sure.)"
            )
        return lines
    chosen_policy = Policy.from_dict(result["policy"])
    rows = []
    for own, found in zip(result["by_batch"], result["held_out"], strict=True):
        stock, chosen = found["stock"], found["chosen"]
        here = chosen_policy.at(found["batch"])
        rows.append(
            [
                str(found["batch"]),
                f"{stock['rows']:.1f}",
                f"{stock['active']:.1f} -> {chosen['active']:.1f}",
                _loss(chosen),
                "yes" if found["kept"] else "NO",
                f"{stock['seconds'] / chosen['seconds']:.2f}x",
                "enable" if found["enable"] else "leave off",
                here.brief() if here else "stock",
                *((own[r] and Policy.from_dict(own[r]["policy"]).brief()) or "-" for r in RULES),
            ]
        )
    head = ["batch", "rows a step", "active experts", name, "kept", "predicted", "advice", "policy"]
    head += ["alone, by error", "alone, the paper's"]
    return [f"chosen: {chosen_policy.brief()}", "", report.text_table(head, rows)]


def _loss(point: dict[str, Any]) -> str:
    return f"{point['loss']:.2g} (< {point['upper']:.2g})"


def front(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The points of a batch size, stock among them, that no other beats in both loss and active
    experts; by active experts."""
    best: list[dict[str, Any]] = []
    for point in sorted([found["stock"], *found["points"]], key=lambda p: (p["active"], p["loss"])):
        if not best or point["loss"] < best[-1]["loss"]:
            best.append(point)
    return best


def _fronts(result: dict[str, Any]) -> str:
    name, limit = result["settings"]["budget"].values()
    chosen = Policy.from_dict(result["policy"]) if result["policy"] else None
    rows: list[list[str]] = []
    for found in result["by_batch"]:
        here = chosen and chosen.at(found["batch"])
        rows += [[]] if rows else []
        for point in front(found):
            policy = _policy_of(point) if point["policy"] else None
            rows.append(
                [
                    str(found["batch"]),
                    f"{point['active']:.1f}",
                    _loss(point),
                    "yes" if point["upper"] <= limit else "no",
                    f"{found['stock']['seconds'] / point['seconds']:.2f}x",
                    policy.brief() if policy else "stock",
                    "yes" if policy == here else "-",
                ]
            )
    return report.text_table(
        ["batch", "active experts", name, "within", "predicted", "policy", "chosen"], rows
    )


def plot(result: dict[str, Any], path: Path) -> None:
    """Loss against active experts: every point, the front of each batch size, and the choice."""
    from matplotlib.figure import Figure

    name, limit = result["settings"]["budget"].values()
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()

    def draw(points: list[dict[str, Any]], style: str, **more: Any) -> None:
        places = [(p["active"], max(p["loss"], _FLOOR)) for p in points]
        axes.plot(*zip(*places, strict=True), style, **more) if places else None

    for number, (found, held) in enumerate(
        zip(result["by_batch"], result["held_out"], strict=True)
    ):
        colour = f"C{number}"
        draw(front(found), "-", color=colour, label=f"batch {found['batch']}")
        by_error = [p["policy"]["tau"] is not None for p in found["points"]]
        for rule, marker in ((True, "o"), (False, "^")):
            own = [
                p for p, is_error in zip(found["points"], by_error, strict=True) if is_error is rule
            ]
            draw(own, marker, color=colour, alpha=0.7)
        if held["chosen"]["policy"]:
            draw([held["chosen"]], "*", color=colour, markersize=15, markeredgecolor="black")
    for style, label in _MARKS.items():
        axes.plot([], [], style, color="grey", label=label)
    axes.axhline(limit, color="black", linestyle=":", label="budget")
    axes.set_yscale("log")
    axes.set_xlabel(f"active experts per layer and step (of {result['E']})")
    axes.set_ylabel(name)
    axes.legend()
    axes.grid(alpha=0.3)
    with replaced(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
