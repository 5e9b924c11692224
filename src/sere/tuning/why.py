"""Why the tuner chose what it chose, in one sentence."""

from __future__ import annotations

import math
from typing import Any

from sere.policy import Policy
from sere.step_cost.cost import Cost
from sere.tuning.budget import Budget
from sere.tuning.kinds import PAPER, in_words, kind_of

_SHARES = {0.5: "half", 0.375: "three eighths"}
_SHORT = {"error": "stand-ins by expected error", "paper": "the paper's rule"}
_LOSSES = {
    "kl": "{:.2g} nats a token",
    "top1": "{:.2%} of the most likely tokens",
    "exact_match": "{:.2%} of the answers",
}


def why(result: dict[str, Any]) -> str:
    """Of the largest batch size at which something is chosen: there it saves most."""
    held = [each for each in result["held_out"] if each["enable"]]
    if not result["policy"] or not held:
        return why_not(result)
    largest = max(held, key=lambda each: each["batch"])
    batch, name = largest["batch"], result["settings"]["budget"]["name"]
    size = next(each for each in result["by_batch"] if each["batch"] == batch)
    policy = Policy.from_dict(result["policy"])
    here = policy.at(batch)
    assert here is not None
    chosen, stock = largest["chosen"], largest["stock"]
    card = Cost(**result["cost"]).card
    return (
        f"{_named(here)} from {policy.bucket(batch)} rows on, because {_pooled(size, here, result)}"
        "it is the fastest found that keeps the budget at all batch sizes together: at batch "
        f"{batch} {_speed(stock, chosen)}{f' on {card}' if card else ''} is predicted, as it reads "
        f"{chosen['read']:.1f} of {result['E']} experts{_maps_too(chosen)} where stock reads "
        f"{stock['read']:.1f}, at a loss of {_LOSSES[name].format(chosen['loss'])}"
        f"{_others(size, here, Budget(**result['settings']['budget']))}"
    )


def _speed(stock: dict[str, Any], point: dict[str, Any]) -> str:
    return f"{stock['seconds'] / point['seconds']:.2f}x"


def _maps_too(point: dict[str, Any]) -> str:
    maps = point["read"] - point["active"]
    return f" ({maps:.1f} of them are maps' bytes)" if maps else ""


def _named(policy: Policy) -> str:
    kind = in_words(kind_of(policy))
    tau = "" if policy.tau is None else f"tau={policy.tau:g}"
    if policy.pool is None:
        return f"{kind} with {tau or f'S={policy.S}'}"
    share = _SHARES.get(float(policy.pool), f"{policy.pool}")
    return f"a pool of {share} of the experts with S={policy.S}, {tau} and {kind}"


def _pooled(size: dict[str, Any], policy: Policy, result: dict[str, Any]) -> str:
    """Why a pool can pay there at all."""
    if policy.pool is None:
        return ""
    (alone,) = [p for p in size["points"] if p["policy"] == PAPER.base.to_dict()]
    named, E = alone["active"] / result["E"], result["E"]
    return (
        f"first choices alone (S=1) name {named:.0%} of the experts there and the pool "
        f"{policy.pool_of(E) / E:.0%}, and "
    )


def _others(size: dict[str, Any], policy: Policy, budget: Budget) -> str:
    """What it could do at that batch size alone, and what else could: without a pool, or with one;
    the other kinds."""
    mine, points = kind_of(policy), [p for p in size["points"] if p["upper"] <= budget.limit]
    groups: dict[str, list[dict[str, Any]]] = {}
    for point in points:
        pooled = point["policy"]["pool"] is not None
        if point["kind"] != mine:
            other = _SHORT.get(point["kind"], "other maps" if policy.frees else "maps")
            groups.setdefault(other, []).append(point)
        elif pooled is (policy.pool is not None):
            groups.setdefault("this", []).append(point)
        else:
            groups.setdefault("a pool" if pooled else "no pool", []).append(point)
    fastest = {who: min(own, key=lambda p: float(p["seconds"])) for who, own in groups.items()}
    parts = [
        f"{who} {_speed(size['stock'], fastest[who])}"
        for who in ("this", *sorted(groups.keys() - {"this"}))
        if who in fastest
    ]
    return (
        f" (at this batch size by itself: {', '.join(parts)})" if groups.keys() != {"this"} else ""
    )


def why_not(result: dict[str, Any]) -> str:
    limit = result["settings"]["budget"]["limit"]
    points = [p for found in result["by_batch"] for p in found["points"]]
    if not points:
        return "a row that is alone keeps its experts, and no larger batch was asked for"
    if any(point["upper"] <= limit for point in points):
        card = Cost(**result["cost"]).card
        return "what keeps the budget saves no time" + (f" on {card}" if card else "")
    least = min((point["upper"] for point in points), default=math.nan)
    return f"nothing that was tried keeps the budget (the least loss is below {least:.2g})"
