"""The search for the fastest policy within a budget of quality.

A budget counts as kept if the upper end of the loss's one-sided 95 % interval is within it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from sere.arms import Arm
from sere.cost import Cost
from sere.policy import BATCH_KEYS, Policy
from sere.quality import Judge, Sums, answers_lost, figures, mean
from sere.table import Table

TAUS = tuple(round(10 ** (-3.5 + i / 6), 6) for i in range(20))  # 0.0003 to 0.46
_PER_LAYER = (0.1, 0.3, 1.0, 3.0, 10.0)  # times the tau of all
SURE = 1.645  # one-sided 95 %
RULE_OF_THREE = 3.0  # ... of a share of which nothing was seen in n: 3 / n
BUDGETS = {
    "kl": "nats per token from stock, on average",
    "top1": "share of tokens whose most likely next token changes",
    "exact_match": "share of answers that were right and are no longer",
}


class BudgetError(ValueError):
    """A budget that cannot be read or met."""


@dataclass(frozen=True)
class Budget:
    """A loss of quality, by name of `BUDGETS`, that must not be exceeded."""

    name: str
    limit: float

    @classmethod
    def parse(cls, text: str) -> Budget:
        """From "kl=0.01"."""
        name, _, value = text.partition("=")
        try:
            limit = float(value)
        except ValueError:
            limit = math.nan
        if name not in BUDGETS or not limit > 0 or (name != "kl" and limit > 1):
            kinds = "; ".join(f"{k}: {v}" for k, v in BUDGETS.items())
            raise BudgetError(f"budget {text!r}: expected NAME=LOSS, e.g. kl=0.01 ({kinds})")
        return cls(name, limit)

    def loss(self, found: Sequence[Sums], stock: Sequence[Sums]) -> tuple[float, float]:
        """(loss, upper end of its interval) of an arm."""
        if self.name == "kl":
            loss, error = mean([(part.kl, part.tokens) for part in found])
        elif self.name == "top1":
            loss, error = mean([(part.tokens - part.top1, part.tokens) for part in found])
        else:
            loss, error = answers_lost(found, stock)
            least = RULE_OF_THREE / max(sum(part.passages for part in found), 1)
            return loss, max(loss + SURE * (0.0 if math.isnan(error) else error), least)
        return loss, loss + SURE * (0.0 if math.isnan(error) else error)

    def check_passages(self, passages: int) -> None:
        """Raise `BudgetError` if so few could not keep it even with nothing lost."""
        if self.name == "exact_match" and RULE_OF_THREE / passages > self.limit:
            raise BudgetError(
                f"{passages} passages cannot show that less than {self.limit:g} of the answers are "
                f"lost, even if none is: at least {math.ceil(RULE_OF_THREE / self.limit)} are "
                "needed for the search, and as many for the check; raise --samples or the budget"
            )


@dataclass(frozen=True)
class Point:
    """One policy at one batch size: what it loses, what it reads, how long a step takes."""

    policy: Policy | None
    batch: int
    active: float
    loss: float
    upper: float
    seconds: float

    def within(self, budget: Budget) -> bool:
        return self.upper <= budget.limit


@dataclass
class Tuner:
    """Looks policies up; `search` and `held_out` never share a passage."""

    table: Table
    judge: Judge
    budget: Budget
    cost: Cost

    def points(self, policies: Sequence[Policy | None], batch: int) -> list[Point]:
        """Measured, in order; stock is measured along with them."""
        arms = [Arm(p.to_json() if p else "stock", p, self.table) for p in (None, *policies)]
        unique = list({arm.name: arm for arm in arms}.values())
        sums = self.judge.measure(unique, [batch])
        stock = sums["stock"][batch]
        names = [p.to_json() if p else "stock" for p in policies]
        return [
            self._point(p, batch, sums[name][batch], stock)
            for p, name in zip(policies, names, strict=True)
        ]

    def _point(
        self, policy: Policy | None, batch: int, sums: list[Sums], stock: list[Sums]
    ) -> Point:
        loss, upper = self.budget.loss(sums, stock)
        active, layers = figures(sums)["active"][0], len(self.table.layers)
        routed = policy is not None and policy.at(batch) is not None
        seconds = self.cost.seconds(active, batch, layers, routed=routed)
        return Point(policy, batch, active, loss, upper, seconds)

    def largest_tau(self, base: Policy, batch: int) -> tuple[Point | None, list[Point]]:
        """The largest tau of `TAUS` within the budget, by bisection, and all that was measured."""
        low, high, best, seen = 0, len(TAUS) - 1, None, []
        while low <= high:
            middle = (low + high) // 2
            (point,) = self.points([replace(base, tau=TAUS[middle])], batch)
            seen.append(point)
            if point.within(self.budget):
                best, low = point, middle + 1
            else:
                high = middle - 1
        return best, seen

    def together(
        self, base: Policy, own: dict[int, Policy | None]
    ) -> tuple[Policy | None, list[Point]]:
        """One policy that does at every batch size what suits it best, and its points.

        base: what they have in common. own: by batch size, ascending; None is stock routing. Steps
        of a batch shrink as its answers end, and small steps follow other settings: what no longer
        keeps the budget together gets more cautious, down to stock routing, and so does what then
        is no faster than stock.
        """
        own = dict(own)
        stock = {batch: self.points([None], batch)[0].seconds for batch in own}
        while any(own.values()):
            policy = composed(base, own)
            points = [self.points([policy], batch)[0] for batch in own]
            over = [p.batch for p in points if not p.within(self.budget)]
            if over:
                blamed = max(b for b in own if own[b] and (b <= max(over) or b == min(own)))
                own[blamed] = self._more_cautious(own[blamed])
                continue
            slow = [p.batch for p in points if own[p.batch] and p.seconds >= stock[p.batch]]
            if not slow:
                return policy, points
            own |= dict.fromkeys(slow)
        return None, []

    def _more_cautious(self, policy: Policy | None) -> Policy | None:
        if policy is None:
            return None
        if policy.tau is None:
            more = replace(policy, S=policy.S + 1)
            return more if more.S < self.table.fingerprint.K else None
        lower = [tau for tau in TAUS if tau < policy.tau]
        return replace(policy, tau=lower[-1], layers={}) if lower else None

    def per_layer(self, found: Point) -> tuple[Point | None, list[Point]]:
        """A tau for each layer, faster than one for all within the same budget, if there is one.

        Each layer is measured alone at some taus; the largest sum of savings for a sum of losses is
        then a choice per layer at one exchange rate, which is lowered until the whole keeps the
        budget when measured together.
        """
        assert found.policy is not None and found.policy.tau is not None
        K, base = self.table.fingerprint.K, found.policy
        taus = [min(base.tau * factor, 1.9) for factor in _PER_LAYER]  # type: ignore[operator]
        layers = list(self.table.layers)

        def alone(layer: int, tau: float) -> Policy:
            others = {i: {"S": K, "rho": 0.0} for i in layers if i != layer}
            return replace(base, tau=tau, layers=others)

        policies = [alone(layer, tau) for layer in layers for tau in taus]
        curves = self.points([None, *policies], found.batch)
        stock, best, seen = curves[0].active, None, []
        for share in (1.0, 0.7, 0.5, 0.35):
            chosen = _exchange(layers, taus, curves[1:], stock, share * self.budget.limit)
            policy = replace(base, tau=min(chosen.values()), layers=_differing(chosen))
            (point,) = self.points([policy], found.batch)
            seen.append(point)
            if point.within(self.budget) and point.seconds < (best or found).seconds:
                best = point
                break
        return best, seen


def composed(base: Policy, own: dict[int, Policy | None]) -> Policy:
    """`base` with `batches`; what one batch size has in common with the next smaller is said once.
    Below the smallest, `base` holds; stock, if that is stock."""
    batches: dict[int, dict[str, Any] | None] = {}
    before: dict[str, Any] | None = {}
    smallest = min(own)
    for batch, policy in sorted(own.items()):
        override = None if policy is None else _override(base, policy)
        if override != before:
            batches[1 if batch == smallest and policy is None else batch] = override
        before = override
    return replace(base, batches=batches)


def _override(base: Policy, policy: Policy) -> dict[str, Any]:
    own = {k: v for k in BATCH_KEYS if (v := getattr(policy, k)) != getattr(base, k)}
    layers = {index: dict(o) for index, o in policy.layers.items()}
    return own | ({"layers": layers} if layers else {})


def _differing(chosen: dict[int, float]) -> dict[int, dict[str, float]]:
    common = min(chosen.values())
    return {layer: {"tau": tau} for layer, tau in chosen.items() if tau != common}


def _exchange(
    layers: list[int], taus: list[float], curves: list[Point], stock: float, budget: float
) -> dict[int, float]:
    """By layer the tau that saves most for its loss, at the rate that spends the budget."""
    of = {layer: curves[i * len(taus) : (i + 1) * len(taus)] for i, layer in enumerate(layers)}

    def at(rate: float) -> tuple[dict[int, float], float]:
        chosen, spent = {}, 0.0
        for layer, points in of.items():
            best = max(
                range(len(taus)), key=lambda j: stock - points[j].active - rate * points[j].loss
            )
            chosen[layer] = taus[best]
            spent += max(points[best].loss, 0.0)
        return chosen, spent

    low, high = -6.0, 12.0  # powers of ten
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if at(10**middle)[1] > budget else (low, middle)
    return at(10**high)[0]
