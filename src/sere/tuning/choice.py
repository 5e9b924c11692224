"""What `sere tune` found, for people: its choice and why, and the front of each batch size.

Also of results of earlier versions, which knew no maps: what they read were the active experts.
"""

from __future__ import annotations

from typing import Any

from sere.policy import Policy, in_full
from sere.results import provenance
from sere.step_cost.cost import Cost
from sere.tuning.budget import BUDGETS, ENOUGH
from sere.tuning.one_size import policy_of
from sere.tuning.why import why_not

RULES = ("error", "paper")


def as_text(result: dict[str, Any]) -> str:
    """What was chosen and what it brings, on passages that it was not searched on; the fronts."""
    name, limit = result["settings"]["budget"].values()
    lines = [f"budget: {name} <= {limit:g} ({BUDGETS[name]})", *_choice(result, name)]
    lines += caveats(result)
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


def read(point: dict[str, Any]) -> float:
    """What a step reads of a layer, in experts: active ones, and maps as their share of one."""
    return float(point.get("read", point["active"]))


def _mapped(result: dict[str, Any]) -> bool:
    return any(found.get("maps") for found in result["by_batch"])


def _read_head(result: dict[str, Any]) -> str:
    return "experts and maps read" if _mapped(result) else "active experts"


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


def caveats(result: dict[str, Any]) -> list[str]:
    """What a reader of the figures has to know."""
    return _unmeasured(result) + _few_batches(result)


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


def _choice(result: dict[str, Any], name: str) -> list[str]:
    if not result["policy"]:
        lines = [f"{why_not(result)}: do not enable re-routing"]
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
                f"{read(stock):.1f} -> {read(chosen):.1f}",
                _loss(chosen),
                "yes" if found["kept"] else "NO",
                _speed(stock, chosen, result),
                enable if found["enable"] else "leave off",
                in_place(chosen_policy, found["batch"]),
                *(_alone(own[rule]) for rule in RULES),
                *([_alone(_fastest(own["maps"]))] if _mapped(result) else []),
            ]
        )
    head = ["batch", "rows a step", _read_head(result), name, "kept", "predicted", "advice"]
    head += ["policy", "alone, by error", "alone, the paper's"]
    head += ["alone, by maps"] if _mapped(result) else []
    stored = [f"  {line}" for line in in_full(chosen_policy)] if chosen_policy.batches else []
    because = [f"why: {result['why']}"] if "why" in result else []
    table = provenance.text_table(head, rows)
    return [f"chosen: {chosen_policy.brief()}", *stored, *because, "", table]


def _alone(point: dict[str, Any] | None) -> str:
    return Policy.from_dict(point["policy"]).brief() if point else "-"


def _fastest(found: dict[str, dict[str, Any] | None]) -> dict[str, Any] | None:
    return min((p for p in found.values() if p), key=lambda p: float(p["seconds"]), default=None)


def _loss(point: dict[str, Any]) -> str:
    return f"{point['loss']:.2g} (< {point['upper']:.2g})"


def front(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The points of a batch size, stock among them, that no other beats in both loss and what is
    read; by what is read. Each holds for steps of any number of rows, the choice does not: see
    `as_chosen`."""
    return provenance.front([found["stock"], *found["points"]], lambda p: (read(p), p["loss"]))


def _fronts(result: dict[str, Any]) -> str:
    name, limit = result["settings"]["budget"].values()
    chosen = Policy.from_dict(result["policy"]) if result["policy"] else None
    rows: list[list[str]] = []
    for found in result["by_batch"]:
        rows += [[]] if rows else []
        points = [(point, policy_of(point), "-") for point in front(found)]
        if chosen and (own := found.get("as_chosen")):
            points.append((own, chosen, "yes"))
        for point, policy, mark in sorted(points, key=lambda each: read(each[0])):
            rows.append(
                [
                    str(found["batch"]),
                    f"{read(point):.1f}",
                    _loss(point),
                    "yes" if point["upper"] <= limit else "no",
                    _speed(found["stock"], point, result),
                    in_place(policy, found["batch"]) if policy else "stock",
                    mark,
                ]
            )
    return provenance.text_table(
        ["batch", _read_head(result), name, "within", "predicted", "policy", "chosen"], rows
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
