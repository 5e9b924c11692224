"""Policies looked up at one batch size: what they lose, read and take; and the boldest of some."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from sere.evaluation.arms import Arm
from sere.evaluation.quality import Judge, Sums, figures
from sere.models.outlay import time_in_words
from sere.policy import Policy
from sere.step_cost.cost import Cost
from sere.table import Table
from sere.tuning.budget import Budget
from sere.tuning.kinds import QUANTILES


@dataclass(frozen=True)
class Point:
    """One policy at one batch size: what it loses, what it reads, how long a step takes.

    rows: of a step, on average, which is fewer than `batch` as answers end before others.
    active: experts. read: the same and the maps that answer for others, each as its share of an
    expert.
    """

    policy: Policy | None
    batch: int
    rows: float
    active: float
    read: float
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
    _measured_now: int = 0
    unread: list[str] = field(default_factory=list)  # what is said of text that no model reads
    _begun: float = field(default_factory=time.monotonic)

    def check_stock(self, batch: int) -> None:
        """Raise `BudgetError` where the passages are too few, or none to lose answers of."""
        stock = self._measured([Arm("stock", None, self.table)], batch)["stock"]
        if not self.judge.first:  # once, and not of the passages to check on, too
            self.unread = self.judge.say_if_unread(stock)
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
        first, tried = self._tried + 1, max(len(arms) - 1, 1)
        self._tried += tried
        which = f"settings {first} to {self._tried}" if len(arms) > 2 else f"setting {first}"
        self.judge.title = f"{self.title}, batch {batch}, {which}{self._left(first - 1)}"
        known = len(self.judge.journal)
        found = self.judge.measure(arms, [batch])
        if len(self.judge.journal) > known:  # what an earlier run left takes no time
            self._measured_now += tried
        return {name: own[batch] for name, own in found.items()}

    def _left(self, tried: int) -> str:
        """How many settings there are, and how long the rest will take if it goes on like this."""
        if not tried or self.settings <= tried:
            return ""
        of = f" of about {self.settings}"
        if not self._measured_now:
            return of
        each = (time.monotonic() - self._begun) / self._measured_now
        return f"{of}, about {time_in_words(each * (self.settings - tried))} left"

    def _point(
        self, policy: Policy | None, batch: int, sums: list[Sums], stock: list[Sums]
    ) -> Point:
        loss, upper = self.budget.loss(sums, stock)
        found, layers = figures(sums), len(self.table.layers)
        active, read, rows = (found[name][0] for name in ("active", "read", "rows_per_step"))
        here = policy.at(batch) if policy else None
        maps = read - active if here and here.frees else None
        seconds = self.cost.seconds(active, rows, layers, routed=here is not None, maps=maps)
        return Point(policy, batch, rows, active, read, loss, upper, seconds)

    def boldest(
        self, policies: Sequence[Policy], batch: int, faster_than: float = math.inf
    ) -> list[Point]:
        """Of policies, each bolder than the one before, the last within the budget, by bisection:
        all that was measured. faster_than: seconds; ends where none within the budget can be."""
        low, high, seen, planned = 0, len(policies) - 1, list[Point](), halvings(len(policies))
        while low <= high:
            middle = (low + high) // 2
            (point,) = self.points([policies[middle]], batch)
            seen.append(point)
            if point.within(self.budget):
                low = middle + 1
            elif point.seconds >= faster_than:  # more cautious ones read still more
                break
            else:
                high = middle - 1
        self.expect_less(planned - len(seen))
        return seen

    def expect_less(self, settings: int) -> None:
        """Some that were planned are not needed."""
        self.settings = max(self.settings - settings, 0)

    def by_similarity(self, base: Policy, batch: int) -> list[Point]:
        """The paper's rule: every S, and with a threshold where S alone loses too much."""
        alone = self.points([replace(base, S=S) for S in range(1, self.table.fingerprint.K)], batch)
        with_rho = [
            [replace(point.policy, rho_quantile=quantile) for quantile in QUANTILES]
            for point in alone
            if point.policy and not point.within(self.budget)
        ]
        bolder = self.judge.at_once([partial(self.boldest, each, batch) for each in with_rho])
        return [*alone, *(point for seen in bolder for point in seen)]


def halvings(count: int) -> int:
    """Steps of a bisection."""
    return math.ceil(math.log2(count + 1))
