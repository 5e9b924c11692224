"""What `sere tune` found, for people: its choice and why, the front of each batch size, a plot."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from sere.policy import Policy, in_full
from sere.results import pictures, provenance
from sere.step_cost.cost import Cost
from sere.tuning.search import BUDGETS, ENOUGH

RULES = ("error", "paper")
_MARKS = {"o": "expected error", "^": "the paper's rule", "*": "chosen, on held-out passages"}
_FLOOR = 1e-7  # losses of zero, on a logarithmic axis


def as_text(result: dict[str, Any]) -> str:
    """What was chosen and what it brings, on passages that it was not searched on; the fronts."""
    name, limit = result["settings"]["budget"].values()
    lines = [f"budget: {name} <= {limit:g} ({BUDGETS[name]})", *_choice(result, name)]
    lines += _unmeasured(result) + _few_batches(result)
    lines += ["", "fewer experts for more loss, on the passages of the search:", _fronts(result)]
    lines += _beaten(result)
    cost = Cost(**result["cost"])
    lines.append(f"predicted: decode speed of {cost.of}, {cost.source}")
    if cost.card:
        lines.append(
            f"{cost.card} is not here, and what is predicted holds on one only: measure with `sere "
            "bench` where you serve, and give its result as --bench"
        )
    return "\n".join(lines)


def _speed(stock: dict[str, Any], point: dict[str, Any], result: dict[str, Any]) -> str:
    """A predicted speed-up, with the card that it is predicted for."""
    card = Cost(**result["cost"]).card
    return f"{stock['seconds'] / point['seconds']:.2f}x" + (f" on {card}" if card else "")


def in_place(policy: Policy, batch: int) -> str:
    """What a policy does at a batch size, and below it: a batch shrinks as its answers end."""
    here, start = policy.at(batch), policy.bucket(batch)
    words = here.brief() if here else "stock"
    if start <= 1 or policy.at(start - 1) == here:
        return words
    below = policy.at(start - 1)
    return f"{words}, below {start} {'as above' if below else 'stock'}"


def _unmeasured(result: dict[str, Any]) -> list[str]:
    smallest = min((b for b in result["settings"]["batches"] if b > 1), default=2)
    if smallest == 2 or not result["policy"]:
        return []
    return [f"steps of fewer than {smallest} rows were not measured and get stock: add --batch 2"]


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
    if not points:
        return "a row that is alone keeps its experts, and no larger batch was asked for"
    if any(point["upper"] <= limit for point in points):
        card = Cost(**result["cost"]).card
        return "what keeps the budget saves no time" + (f" on {card}" if card else "")
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
    rows, card = [], Cost(**result["cost"]).card
    for own, found in zip(result["by_batch"], result["held_out"], strict=True):
        stock, chosen = found["stock"], found["chosen"]
        enable = "enable" if not card else f"enable on {card}"
        rows.append(
            [
                str(found["batch"]),
                f"{stock['rows']:.1f}",
                f"{stock['active']:.1f} -> {chosen['active']:.1f}",
                _loss(chosen),
                "yes" if found["kept"] else "NO",
                _speed(stock, chosen, result),
                enable if found["enable"] else "leave off",
                in_place(chosen_policy, found["batch"]),
                *((own[r] and Policy.from_dict(own[r]["policy"]).brief()) or "-" for r in RULES),
            ]
        )
    head = ["batch", "rows a step", "active experts", name, "kept", "predicted", "advice", "policy"]
    head += ["alone, by error", "alone, the paper's"]
    stored = [f"  {line}" for line in in_full(chosen_policy)] if chosen_policy.batches else []
    return [f"chosen: {chosen_policy.brief()}", *stored, "", provenance.text_table(head, rows)]


def _loss(point: dict[str, Any]) -> str:
    return f"{point['loss']:.2g} (< {point['upper']:.2g})"


def front(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The points of a batch size, stock among them, that no other beats in both loss and active
    experts; by active experts. Each holds for steps of any number of rows, the choice does not:
    see `as_chosen`."""
    return provenance.front([found["stock"], *found["points"]], lambda p: (p["active"], p["loss"]))


def _fronts(result: dict[str, Any]) -> str:
    name, limit = result["settings"]["budget"].values()
    chosen = Policy.from_dict(result["policy"]) if result["policy"] else None
    rows: list[list[str]] = []
    for found in result["by_batch"]:
        rows += [[]] if rows else []
        points = [(point, policy_of(point), "-") for point in front(found)]
        if chosen and (own := found.get("as_chosen")):
            points.append((own, chosen, "yes"))
        for point, policy, mark in sorted(points, key=lambda each: float(each[0]["active"])):
            rows.append(
                [
                    str(found["batch"]),
                    f"{point['active']:.1f}",
                    _loss(point),
                    "yes" if point["upper"] <= limit else "no",
                    _speed(found["stock"], point, result),
                    in_place(policy, found["batch"]) if policy else "stock",
                    mark,
                ]
            )
    return provenance.text_table(
        ["batch", "active experts", name, "within", "predicted", "policy", "chosen"], rows
    )


def _beaten(result: dict[str, Any]) -> list[str]:
    """Why a chosen row may have a row of the front above it that is better in all columns."""
    limit = result["settings"]["budget"]["limit"]
    beaten = [
        str(found["batch"])
        for found in result["by_batch"]
        if (own := found.get("as_chosen"))
        and any(
            p["seconds"] < own["seconds"] and p["loss"] <= own["loss"] and p["upper"] <= limit
            for p in found["points"]
        )
    ]
    if not beaten:
        return []
    return [
        f"batch {', '.join(beaten)}: a row of the front is faster and loses less than what was "
        "chosen; it holds for steps of any size, and the choice is one policy for all sizes, which "
        "passages that the search did not see have made more cautious"
    ]


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
    pictures.save(figure, path)


def policy_of(point: dict[str, Any] | None) -> Policy | None:
    """Of a point; None is stock routing, or no point at all."""
    return Policy.from_dict(point["policy"]) if point and point["policy"] else None
