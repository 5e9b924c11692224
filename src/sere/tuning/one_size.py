"""What one batch size could have for itself, by each kind of policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from sere.policy import Policy
from sere.tuning.budget import Budget
from sere.tuning.by_layer import by_layer
from sere.tuning.kinds import ANY_LOSS, PAPER, TAUS, Kind, first_choices, pools_of
from sere.tuning.search import Point, Tuner, halvings


def search(tuner: Tuner, kinds: Sequence[Kind], batch: int, per_layer: bool) -> dict[str, Any]:
    """Every kind with one tau for all layers and no pool; then pools, where first choices alone
    name more experts than they hold; then, for the fastest kind, a tau by layer."""
    (stock,) = tuner.points([None], batch)
    seen: dict[str, list[Point]] = {kind.name: [] for kind in (PAPER, *kinds)}
    if batch > 1:  # a row that is alone keeps its experts, whatever the policy
        found = tuner.judge.at_once(
            [
                partial(tuner.by_similarity, PAPER.base, batch),
                *(partial(_plain, tuner, kind, batch) for kind in kinds),
            ]
        )
        seen = dict(zip(seen, found, strict=True))
        alone = next(p for p in seen[PAPER.name] if p.policy == PAPER.base)
        for kind, more in zip(kinds, _pools(tuner, kinds, seen, alone, stock), strict=True):
            seen[kind.name] += more
        fastest = {kind.name: fit[0] for kind in kinds if (fit := _fit(tuner, seen[kind.name]))}
        name = min(fastest, key=lambda name: fastest[name].seconds, default="")
        if per_layer and name and fastest[name].seconds < stock.seconds:
            seen[name] += by_layer(tuner, fastest[name])
    points = [as_dict(p, name) for name, own in seen.items() for p in own]
    size = {"batch": batch, "stock": as_dict(stock, "stock"), "points": points}
    own = {name: best(size, tuner.budget, name) for name in seen}
    maps = {kind.name: own[kind.name] for kind in kinds if kind.maps}
    return {**size, "error": own["error"], "paper": own["paper"], "maps": maps}


def _plain(tuner: Tuner, kind: Kind, batch: int) -> list[Point]:
    return tuner.boldest([kind.at(tau) for tau in TAUS], batch)


def _pools(
    tuner: Tuner, kinds: Sequence[Kind], seen: dict[str, list[Point]], alone: Point, stock: Point
) -> list[list[Point]]:
    """By kind, what was measured with pools. alone: S = 1 and nothing else."""
    pools = pools_of(tuner.table, alone.active)
    planned = pools_of(tuner.table, first_choices(tuner.table.fingerprint.E, alone.batch))
    tuner.expect_less(len(kinds) * (len(planned) - len(pools)) * halvings(len(TAUS) + 1))

    def tried(kind: Kind, pool: float, S: int) -> list[Point]:
        fit = _fit(tuner, seen[kind.name])
        bound = min([stock.seconds, *(p.seconds for p in fit)])
        policies = [kind.at(tau, S, pool) for tau in (*TAUS, ANY_LOSS)]
        return tuner.boldest(policies, alone.batch, faster_than=bound)

    searches = [partial(tried, kind, pool, S) for kind in kinds for pool, S in pools]
    found = tuner.judge.at_once(searches)
    n = len(pools)
    by_kind = [found[i * n : (i + 1) * n] for i in range(len(kinds))]
    return [[point for each in own for point in each] for own in by_kind]


def _fit(tuner: Tuner, points: Sequence[Point]) -> list[Point]:
    """Those that keep the budget, the fastest first."""
    return sorted((p for p in points if p.within(tuner.budget)), key=lambda p: p.seconds)


def as_dict(point: Point, kind: str) -> dict[str, Any]:
    policy = point.policy.to_dict() if point.policy else None
    return {**asdict(point), "policy": policy, "kind": kind}


def fitting(size: dict[str, Any], budget: Budget, kind: str) -> list[dict[str, Any]]:
    """The points of a kind that keep the budget and save time, the fastest first."""
    fit = [
        point
        for point in size["points"]
        if point["kind"] == kind
        and point["upper"] <= budget.limit
        and point["seconds"] < size["stock"]["seconds"]
    ]
    return sorted(fit, key=lambda point: point["seconds"])


def best(
    size: dict[str, Any], budget: Budget, kind: str, pools: bool = True
) -> dict[str, Any] | None:
    """The fastest of these, or None. pools: whether it may have one."""
    fit = fitting(size, budget, kind)
    return next((p for p in fit if pools or p["policy"]["pool"] is None), None)


def policy_of(point: dict[str, Any] | None) -> Policy | None:
    """Of a point; None is stock routing, or no point at all."""
    return Policy.from_dict(point["policy"]) if point and point["policy"] else None
