"""Other published ways to touch fewer experts, as exact rules: baselines for `sere evaluate`.

Each rule gets one decode batch and says which experts every token uses ([T, E] bool). They are
written to be compared with, not to be fast, and are never served. A token's order of experts is its
router's own (score + bias, where it has one), and it never uses more than it was routed to, nor
any outside the groups that its router lets it choose from.

* top_k: every token keeps the first k.
* skip: an expert goes if its weight is below beta times its token's largest. A simplification of
  NAEE (arXiv 2402.14800), whose beta is each layer's median of that ratio for K=2, and of what
  arXiv 2512.21911 makes of it for K>2, the tail's mass against its median: tables hold no medians,
  so one beta is given for all layers.
* oea: opportunistic expert activation (arXiv 2511.02237): each token's first k0 are loaded; the
  rest of its K slots go to its own next-ranked experts among the loaded.
* xshare: (arXiv 2602.07265) each token's first k0, then the experts of the largest summed score up
  to `budget`; every token chooses its top K again among them.
* lynx: affinity binning (arXiv 2411.08982 v3): logits in bins by their distance from the token's
  best; within a bin the popular experts win; every token chooses again among the winners. In a
  batch of one nothing is popular, and ties decide (lowest expert).
* frequency: static pruning, the `budget` experts that calibration saw most; others are masked.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sere.kernels.distinct import fillers
from sere.policy import PolicyError, check_keys


@dataclass(frozen=True)
class Routed:
    """What a router said of one decode batch.

    ids, weights: [T, K], its choice. logits: [T, E]. scores: [T, E], what weights are in proportion
    to. ranks: [T, E], the place of each expert in its token's order, 0 for the best, the chosen
    ones first. load: [E], share of the choices during calibration.
    """

    ids: Tensor
    weights: Tensor
    logits: Tensor
    scores: Tensor
    ranks: Tensor
    load: Tensor

    @property
    def slots(self) -> Tensor:
        """[T, 1]: how many of its K slots a token uses; those of weight 0 are empty."""
        return (self.weights != 0).sum(1, keepdim=True)

    @property
    def chosen(self) -> Tensor:
        """[T, E] bool."""
        return self.ranks < self.slots

    def first(self, n: int | Tensor, among: Tensor) -> Tensor:
        """[T, E] bool: each token's first n (a number or [T, 1]) of those that `among` (bool, [E]
        or [T, E]) admits."""
        return _largest((-self.ranks).masked_fill(~among, -self.ranks.shape[1]), n) & among


Rule = Callable[..., Tensor]


def _largest(values: Tensor, n: int | Tensor) -> Tensor:
    """Bool, of the shape of values: the n largest along the last dimension; ties: lowest expert."""
    return values.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1) < n


def top_k(batch: Routed, *, k: int) -> Tensor:
    return batch.chosen & (batch.ranks < k)


def skip(batch: Routed, *, beta: float) -> Tensor:
    own = batch.scores * batch.chosen
    return batch.chosen & (own >= beta * own.max(1, keepdim=True).values)


def oea(batch: Routed, *, k0: int) -> Tensor:
    own = top_k(batch, k=k0)
    free = batch.slots - own.sum(1, keepdim=True)
    return own | batch.first(free, among=own.any(0) & ~own)


def xshare(batch: Routed, *, budget: int, k0: int = 1) -> Tensor:
    loaded = top_k(batch, k=k0).any(0)
    utility = batch.scores.sum(0).masked_fill(loaded, -torch.inf)
    more = max(budget - int(loaded.sum()), 0)
    return batch.first(batch.slots, among=loaded | _largest(utility, more))


def lynx(batch: Routed, *, alpha: float, beta: float) -> Tensor:
    T = len(batch.logits)
    distance = (batch.logits - batch.logits.max(1, keepdim=True).values).double()
    bins = (alpha * distance).ceil().clamp(-beta, 0)
    # times T^(beta + 1), which makes whole numbers: no order of summing may break a tie
    heat = float(T) ** (bins + beta)
    affinity = bins * float(T) ** (beta + 1) + heat.sum(0) - heat
    winners = _largest(affinity, batch.slots).any(0)
    return batch.first(batch.slots, among=winners)


def frequency(batch: Routed, *, budget: int) -> Tensor:
    if not batch.load.any():
        raise PolicyError(
            "rival frequency: the table has seen no token choose an expert in some layer: use one "
            "that was calibrated on text"
        )
    return batch.first(batch.slots, among=_largest(batch.load, budget))


RULES: dict[str, Rule] = {
    rule.__name__: rule for rule in (top_k, skip, oea, xshare, lynx, frequency)
}
WEIGHTS = ("renormalise", "keep")
_COUNTS = ("k", "k0", "budget")


@dataclass(frozen=True)
class Rival:
    """One rule with its numbers, e.g. `Rival("oea", {"k0": 1})`.

    weights: "renormalise" brings those of a token's experts to the sum that its router gave it
    (where routers normalise, as in all these papers' models, that is renormalising); "keep" leaves
    each expert the weight that the router gave it, or would have at the same scale.

    Raises `PolicyError` for a rule, number or name that it does not know.
    """

    name: str
    numbers: Mapping[str, float]
    weights: str = "renormalise"

    def __post_init__(self) -> None:
        if self.name not in RULES:
            raise PolicyError(f"rival {self.name!r}: expected one of {', '.join(RULES)}")
        if self.weights not in WEIGHTS:
            raise PolicyError(
                f"rival {self.name}: weights={self.weights!r}: expected one of {', '.join(WEIGHTS)}"
            )
        known = dict(list(inspect.signature(RULES[self.name]).parameters.items())[1:])
        check_keys(f"rival {self.name}", self.numbers, [*known, "weights"])
        missing = [n for n, p in known.items() if p.default is p.empty and n not in self.numbers]
        if missing:
            raise PolicyError(f"rival {self.name}: needs {', '.join(missing)}")
        for number, value in self.numbers.items():
            _check(self.name, number, value)

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Rival:
        """From {"rival": name, number: value ...}, which may hold "weights"."""
        numbers = dict(settings)
        name, weights = numbers.pop("rival"), numbers.pop("weights", "renormalise")
        return cls(name, numbers, weights)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able settings; `from_dict` gives an equal rival back."""
        own = {} if self.weights == "renormalise" else {"weights": self.weights}
        return {"rival": self.name, **self.numbers, **own}

    def __hash__(self) -> int:
        return hash((self.name, *sorted(self.numbers.items()), self.weights))

    def __str__(self) -> str:
        numbers = list(self.to_dict().items())[1:]
        return " ".join([self.name, *(f"{k}={v}" for k, v in numbers)])

    def check_against(self, K: int, E: int) -> None:
        """Raise `PolicyError` for a number that a model with K of E experts has no meaning for."""
        for number, limit, what in (("k", K, "K"), ("k0", K, "K"), ("budget", E, "E")):
            if self.numbers.get(number, 1) > limit:
                raise PolicyError(
                    f"rival {self.name}: {number}={self.numbers[number]}: expected at most the "
                    f"model's {what}={limit}, which is its stock routing"
                )

    def route(self, batch: Routed) -> tuple[Tensor, Tensor]:
        """New ids and weights [T, K].

        No row names an expert twice: free slots have weight 0 and name experts that other rows of
        the batch use, as in rule 9 of the operator. A row that keeps its experts keeps its slots
        as they are.
        """
        K = batch.ids.shape[1]
        self.check_against(K, batch.scores.shape[1])
        used = RULES[self.name](batch, **self.numbers)
        values, ids = (batch.scores * used).topk(K, dim=1)
        of = used if self.weights == "renormalise" else batch.chosen
        left = (batch.scores * of).sum(1, keepdim=True)  # 0: all of a token's groups are masked
        scale = batch.weights.sum(1, keepdim=True) / left.clamp(min=1e-37)
        turn = torch.arange(len(ids), device=ids.device)
        spare = fillers(ids, values > 0, values <= 0, used.any(0), turn)
        ids = torch.where(values > 0, ids, spare).to(batch.ids.dtype)
        weights = (values * scale).to(batch.weights.dtype)
        same = (used == batch.chosen).all(1, keepdim=True)
        return torch.where(same, batch.ids, ids), torch.where(same, batch.weights, weights)


def _check(rival: str, number: str, value: Any) -> None:
    """Raise `PolicyError` for a value that no model has a meaning for."""
    real = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if number in _COUNTS:
        valid, expected = real and isinstance(value, int) and value >= 1, "a whole number >= 1"
    elif rival == "skip":
        valid, expected = real and 0 <= value <= 1, "a share of the largest weight, 0 to 1"
    else:
        valid, expected = real and value > 0, "a number > 0"
    if not valid:
        raise PolicyError(f"rival {rival}: {number}={value!r}: expected {expected}")
