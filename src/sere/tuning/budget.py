"""A budget of quality, and when it counts as kept: if the upper end of the loss's one-sided 95 %
interval is within it.

Student's over batches, as rows of one batch share their experts; for lost answers, which are rare,
at least Poisson's over answers. Most of a KL comes from a few batches, and the next may be among
them: three more as bad as the worst are reckoned with (what n batches did not show may be in 3 of
n), and likewise for changed tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats

from sere.evaluation.quality import Sums, mean

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
