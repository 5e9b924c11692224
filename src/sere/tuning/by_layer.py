"""A tau for each layer, where that is faster than one for all within the same budget."""

from __future__ import annotations

from dataclasses import replace

from sere.policy import Policy
from sere.tuning.search import Point, Tuner

PER_LAYER = (0.1, 0.3, 1.0, 3.0, 10.0)  # times the tau of all
SHARES = (1.0, 0.7, 0.5, 0.35)  # of the budget, for layers to spend until the whole keeps it
GROUPS = 12  # of neighbouring layers, at most: each costs as many settings as there are above


def by_layer(tuner: Tuner, found: Point) -> list[Point]:
    """What was measured; the last is faster than `found` within the budget, if any is.

    Each layer (of many: each group of neighbours) is measured alone at some taus; the largest sum
    of savings for a sum of losses is then a choice per group at one exchange rate, which is lowered
    until the whole keeps the budget when measured together.
    """
    assert found.policy is not None and found.policy.tau is not None
    K, base = tuner.table.fingerprint.K, found.policy
    taus = [round(min(base.tau * factor, 1.9), 6) for factor in PER_LAYER]  # type: ignore[operator]
    layers = list(tuner.table.layers)
    groups = neighbours(layers, GROUPS)

    def alone(group: list[int], tau: float) -> Policy:
        others = {i: {"S": K, "rho": 0.0} for i in layers if i not in group}
        return replace(base, tau=tau, layers=others)

    policies = [alone(group, tau) for group in groups for tau in taus]
    curves = tuner.points([None, *policies], found.batch)
    stock, seen = curves[0].read, []
    for share in SHARES:
        rates = _exchange(taus, curves[1:], stock, share * tuner.budget.limit)
        chosen = {i: tau for group, tau in zip(groups, rates, strict=True) for i in group}
        policy = replace(base, tau=min(chosen.values()), layers=_differing(chosen))
        (point,) = tuner.points([policy], found.batch)
        seen.append(point)
        if point.within(tuner.budget) and point.seconds < found.seconds:
            break
    return seen


def _differing(chosen: dict[int, float]) -> dict[int, dict[str, float]]:
    common = min(chosen.values())
    return {layer: {"tau": tau} for layer, tau in chosen.items() if tau != common}


def neighbours(layers: list[int], count: int) -> list[list[int]]:
    """At most so many groups of layers that follow each other, of about one size."""
    n = min(count, len(layers))
    return [layers[i * len(layers) // n : (i + 1) * len(layers) // n] for i in range(n)]


def _exchange(taus: list[float], curves: list[Point], stock: float, budget: float) -> list[float]:
    """By group the tau that saves most for its loss, at the rate that spends the budget.

    curves: of one group after the other, a point for each tau. stock: what it reads.
    """
    groups = [curves[i : i + len(taus)] for i in range(0, len(curves), len(taus))]

    def at(rate: float) -> list[int]:
        return [
            max(range(len(taus)), key=lambda j: stock - own[j].read - rate * own[j].loss)
            for own in groups
        ]

    def spent(chosen: list[int]) -> float:
        return sum(max(own[j].loss, 0.0) for own, j in zip(groups, chosen, strict=True))

    low, high = -6.0, 12.0  # powers of ten
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(at(10**middle)) > budget else (low, middle)
    return [taus[j] for j in at(10**high)]
