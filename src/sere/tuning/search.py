"""The search for the fastest policy within a budget of quality.

A budget counts as kept if the upper end of the loss's one-sided 95 % interval is within it:
Student's over batches, as rows of one batch share their experts; for lost answers, which are rare,
at least Poisson's over answers. Most of a KL comes from a few batches, and the next may be among
them: three more as bad as the worst are reckoned with (what n batches did not show may be in 3 of
n), and likewise for changed tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from scipy import stats

from sere.evaluation.arms import Arm
from sere.evaluation.quality import Judge, Sums, figures, mean
from sere.models.outlay import time_in_words
from sere.policy import BATCH_KEYS, Policy
from sere.step_cost.cost import Cost
from sere.table import Table

TAUS = tuple(round(10 ** (-3.5 + i / 6), 6) for i in range(20))  # 0.0003 to 0.46
QUANTILES = (0.75, 0.5, 0.25)  # of the paper's threshold
PER_LAYER = (0.1, 0.3, 1.0, 3.0, 10.0)  # times the tau of all
SHARES = (1.0, 0.7, 0.5, 0.35)  # of the budget, for layers to spend until the whole keeps it
GROUPS = 12  # of neighbouring layers, at most: each costs as many settings as there are above
CONFIDENCE = 0.95
ENOUGH = 128  # batches: with fewer, rare bad ones may be unseen, and intervals too short
BUDGETS = {
    "kl": "nats per token from stock, on average",
    "top1": "share of tokens whose most likely next token changes",
    "exact_match": "share of answers that were right and are no longer",
}


class BudgetError(ValueError):
    """A budget that cannot be read or met."""


def most(seen: int) -> float:
    """How many events may have been to be expected where so many were seen: the upper end of
    Poisson's one-sided 95 % interval; 3 for none (the rule of three)."""
    return float(stats.chi2.ppf(CONFIDENCE, 2 * seen + 2)) / 2


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
        if name not in BUDGETS or not 0 < limit < math.inf or (name != "kl" and limit > 1):
            kinds = "; ".join(f"{k}: {v}" for k, v in BUDGETS.items())
            raise BudgetError(f"budget {text!r}: expected NAME=LOSS, e.g. kl=0.01 ({kinds})")
        return cls(name, limit)

    def loss(self, found: Sequence[Sums], stock: Sequence[Sums]) -> tuple[float, float]:
        """(loss, upper end of its interval) of an arm; answers are lost by those that stock gets
        right, and none that is newly right makes up for one."""
        if self.name == "kl":
            parts = [(part.kl, part.tokens) for part in found]
        elif self.name == "top1":
            parts = [(float(part.tokens - part.top1), part.tokens) for part in found]
        else:
            pairs = zip(found, stock, strict=True)
            parts = [(float(mine.lost_answers), theirs.exact) for mine, theirs in pairs]
        loss, error = mean(parts)
        worst = max((each for each, _ in parts), default=0.0)
        return loss, self.upper(loss, error, len(parts), round(sum(n for _, n in parts)), worst)

    def upper(self, loss: float, error: float, batches: int, of: int, worst: float = 0.0) -> float:
        """Upper end of a loss's interval, which is infinite for a single batch.

        error: its standard error over batches. of: how many tokens, or answers that stock gets
        right, it is a share of. worst: what the worst batch adds to it, before it is a share.
        """
        if batches < 2 or not of:
            return math.inf
        upper = loss + float(stats.t.ppf(CONFIDENCE, batches - 1)) * error
        if self.name == "exact_match":
            return max(upper, most(round(loss * of)) / of)
        least = 1.0 if self.name == "top1" else 0.0  # a whole token changes
        return upper + most(0) * max(worst, least) / of

    @property
    def needed(self) -> int:
        """How many right answers, or tokens, can keep the budget, if none is lost."""
        return 0 if self.name == "kl" else math.ceil(most(0) / self.limit)

    def check_passages(self, passages: int) -> None:
        """Raise `BudgetError` if so few could not keep it even with nothing lost."""
        if self.name == "exact_match" and passages < self.needed:
            raise BudgetError(
                f"{passages} passages cannot show that less than {self.limit:g} of the answers are "
                f"lost, even if none is: at least {self.needed} are needed for the search, and as "
                "many for the check; raise --samples or the budget"
            )

    def check_answers(self, right: int, passages: int) -> None:
        """Raise `BudgetError` if stock gets so few right that nothing could be lost or shown."""
        if self.name == "exact_match" and right < self.needed:
            raise BudgetError(
                f"{self.name}={self.limit:g}: stock routing gets {right} of {passages} passages "
                f"right to the last token, and at least {self.needed} right ones are needed to "
                "see what is lost. Exact match needs prompts with answers that the model gets "
                'right, lines of {"prompt", "answer"}; raise --samples if it gets most of yours '
                "right, else give a budget of kl or top1, which any text will do for"
            )

    def check_tokens(self, tokens: int) -> None:
        """Raise `BudgetError` if so few could not keep it even if none of them changed."""
        if self.name == "top1" and tokens < self.needed:
            raise BudgetError(
                f"{tokens} decoded tokens cannot show that less than {self.limit:g} of them "
                f"change, even if none does: at least {self.needed} are needed for the search, and "
                "as many for the check; raise --samples, --length or the budget"
            )


@dataclass(frozen=True)
class Point:
    """One policy at one batch size: what it loses, what it reads, how long a step takes.

    rows: of a step, on average, which is fewer than `batch` as answers end before others.
    """

    policy: Policy | None
    batch: int
    rows: float
    active: float
    loss: float
    upper: float
    seconds: float

    def within(self, budget: Budget) -> bool:
        return self.upper <= budget.limit


@dataclass
class Tuner:
    """Looks policies up; `search` and `check` never share a passage."""

    table: Table
    judge: Judge
    budget: Budget
    cost: Cost
    title: str = "search"
    settings: int = 0  # about how many there will be, if it is known
    _tried: int = 0
    _begun: float = field(default_factory=time.monotonic)

    def check_stock(self, batch: int) -> None:
        """Raise `BudgetError` where the passages are too few, or none to lose answers of."""
        stock = self._measured([Arm("stock", None, self.table)], batch)["stock"]
        self.budget.check_answers(sum(s.exact for s in stock), sum(s.passages for s in stock))
        self.budget.check_tokens(sum(s.tokens for s in stock))

    def points(self, policies: Sequence[Policy | None], batch: int) -> list[Point]:
        """Measured, in order; stock is measured along with them."""
        arms = [Arm(p.to_json() if p else "stock", p, self.table) for p in (None, *policies)]
        sums = self._measured(list({arm.name: arm for arm in arms}.values()), batch)
        return [
            self._point(p, batch, sums[arm.name], sums["stock"])
            for p, arm in zip(policies, arms[1:], strict=True)
        ]

    def at_all(
        self, policies: Sequence[Policy | None], batches: Sequence[int]
    ) -> list[list[Point]]:
        """The same at every batch size."""
        return self.judge.at_once([partial(self.points, policies, batch) for batch in batches])

    def _measured(self, arms: list[Arm], batch: int) -> dict[str, list[Sums]]:
        first, self._tried = self._tried + 1, self._tried + max(len(arms) - 1, 1)
        which = f"settings {first} to {self._tried}" if len(arms) > 2 else f"setting {first}"
        self.judge.title = f"{self.title}, batch {batch}, {which}{self._left(first - 1)}"
        return {name: found[batch] for name, found in self.judge.measure(arms, [batch]).items()}

    def _left(self, tried: int) -> str:
        """How many settings there are, and how long the rest will take if it goes on like this."""
        if not tried or self.settings <= tried:
            return ""
        left = (time.monotonic() - self._begun) * (self.settings - tried) / tried
        return f" of about {self.settings}, about {time_in_words(left)} left"

    def _point(
        self, policy: Policy | None, batch: int, sums: list[Sums], stock: list[Sums]
    ) -> Point:
        loss, upper = self.budget.loss(sums, stock)
        found, layers = figures(sums), len(self.table.layers)
        active, rows = found["active"][0], found["rows_per_step"][0]
        routed = policy is not None and policy.at(batch) is not None
        seconds = self.cost.seconds(active, rows, layers, routed=routed)
        return Point(policy, batch, rows, active, loss, upper, seconds)

    def boldest(self, policies: Sequence[Policy], batch: int) -> tuple[Point | None, list[Point]]:
        """Of policies, each bolder than the one before, the last within the budget, by bisection;
        and all that was measured."""
        low, high, best, seen = 0, len(policies) - 1, None, []
        while low <= high:
            middle = (low + high) // 2
            (point,) = self.points([policies[middle]], batch)
            seen.append(point)
            if point.within(self.budget):
                best, low = point, middle + 1
            else:
                high = middle - 1
        return best, seen

    def by_similarity(self, base: Policy, batch: int) -> list[Point]:
        """The paper's rule: every S, and with a threshold where S alone loses too much."""
        alone = self.points([replace(base, S=S) for S in range(1, self.table.fingerprint.K)], batch)
        with_rho = [
            [replace(point.policy, rho_quantile=quantile) for quantile in QUANTILES]
            for point in alone
            if point.policy and not point.within(self.budget)
        ]
        bolder = self.judge.at_once([partial(self.boldest, each, batch) for each in with_rho])
        return [*alone, *(point for _, seen in bolder for point in seen)]

    def together(
        self, base: Policy, own: dict[int, Policy | None]
    ) -> tuple[Policy | None, list[Point]]:
        """One policy that does at every batch size what suits it best, and its points.

        base: what they have in common. own: by batch size, ascending; None is stock routing. Steps
        of a batch shrink as its answers end, and small steps follow other settings: where that
        breaks the budget the boldest of these gets more cautious, down to stock routing; and what
        then is no faster than stock is left to it.
        """
        own = dict(own)
        stock = {p.batch: p.seconds for (p,) in self.at_all([None], list(own))}
        while any(own.values()):
            policy = composed(base, own)
            points = [point for (point,) in self.at_all([policy], list(own))]
            over = [p.batch for p in points if not p.within(self.budget)]
            if over:
                heard = {b: policy for b, policy in own.items() if policy and b <= max(over)}
                blamed = max(heard, key=lambda b: (_boldness(heard[b]), b))
                own[blamed] = self._more_cautious(heard[blamed])
                continue
            slow = [p.batch for p in points if own[p.batch] and p.seconds >= stock[p.batch]]
            if not slow:
                return policy, points
            own |= dict.fromkeys(slow)
        return None, []

    def _more_cautious(self, policy: Policy) -> Policy | None:
        if policy.tau is None:
            more = replace(policy, S=policy.S + 1)
            return more if more.S < self.table.fingerprint.K else None
        lower = [tau for tau in TAUS if tau < policy.tau]
        return replace(policy, tau=lower[-1], layers={}) if lower else None

    def per_layer(self, found: Point) -> tuple[Point | None, list[Point]]:
        """A tau for each layer, faster than one for all within the same budget, if there is one.

        Each layer (of many: each group of neighbours) is measured alone at some taus; the largest
        sum of savings for a sum of losses is then a choice per group at one exchange rate, which is
        lowered until the whole keeps the budget when measured together.
        """
        assert found.policy is not None and found.policy.tau is not None
        K, base = self.table.fingerprint.K, found.policy
        taus = [round(min(base.tau * factor, 1.9), 6) for factor in PER_LAYER]  # type: ignore[operator]
        layers = list(self.table.layers)
        groups = neighbours(layers, GROUPS)

        def alone(group: list[int], tau: float) -> Policy:
            others = {i: {"S": K, "rho": 0.0} for i in layers if i not in group}
            return replace(base, tau=tau, layers=others)

        policies = [alone(group, tau) for group in groups for tau in taus]
        curves = self.points([None, *policies], found.batch)
        stock, best, seen = curves[0].active, None, []
        for share in SHARES:
            rates = _exchange(taus, curves[1:], stock, share * self.budget.limit)
            chosen = {i: tau for group, tau in zip(groups, rates, strict=True) for i in group}
            policy = replace(base, tau=min(chosen.values()), layers=_differing(chosen))
            (point,) = self.points([policy], found.batch)
            seen.append(point)
            if point.within(self.budget) and point.seconds < (best or found).seconds:
                best = point
                break
        return best, seen


def _boldness(policy: Policy) -> float:
    """The larger, the bolder, among policies of one rule."""
    if policy.tau is None:
        return -policy.S
    return max([policy.tau, *(float(own.get("tau", 0)) for own in policy.layers.values())])


def composed(base: Policy, own: dict[int, Policy | None]) -> Policy:
    """`base` with `batches`; what one batch size has in common with the next smaller is said once.
    Below the smallest, of which nothing is known, routing is stock."""
    batches: dict[int, dict[str, Any] | None] = {1: None}
    before: dict[str, Any] | None = None
    for batch, policy in sorted(own.items()):
        override = None if policy is None else _override(base, policy)
        if override != before:
            batches[batch] = override
        before = override
    return replace(base, batches={b: o for b, o in batches.items() if (b, o) != (1, {})})


def _override(base: Policy, policy: Policy) -> dict[str, Any]:
    own = {k: v for k in BATCH_KEYS if (v := getattr(policy, k)) != getattr(base, k)}
    layers = {index: dict(o) for index, o in policy.layers.items()}
    return own | ({"layers": layers} if layers else {})


def _differing(chosen: dict[int, float]) -> dict[int, dict[str, float]]:
    common = min(chosen.values())
    return {layer: {"tau": tau} for layer, tau in chosen.items() if tau != common}


def neighbours(layers: list[int], count: int) -> list[list[int]]:
    """At most so many groups of layers that follow each other, of about one size."""
    n = min(count, len(layers))
    return [layers[i * len(layers) // n : (i + 1) * len(layers) // n] for i in range(n)]


def _exchange(taus: list[float], curves: list[Point], stock: float, budget: float) -> list[float]:
    """By group the tau that saves most for its loss, at the rate that spends the budget.

    curves: of one group after the other, a point for each tau.
    """
    groups = [curves[i : i + len(taus)] for i in range(0, len(curves), len(taus))]

    def at(rate: float) -> list[int]:
        return [
            max(range(len(taus)), key=lambda j: stock - own[j].active - rate * own[j].loss)
            for own in groups
        ]

    def spent(chosen: list[int]) -> float:
        return sum(max(own[j].loss, 0.0) for own, j in zip(groups, chosen, strict=True))

    low, high = -6.0, 12.0  # powers of ten
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(at(10**middle)) > budget else (low, middle)
    return [taus[j] for j in at(10**high)]
