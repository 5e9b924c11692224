"""Other published ways to touch fewer experts, as exact rules: baselines for `sere evaluate`.

Each rule gets one decode batch and says how much of each expert every token takes ([T, E], 0 for
none). They are written to be compared with, not to be fast, and are never served.

* top_k: every token keeps its k largest slots.
* skip: a slot goes if its weight is below beta times its token's largest (NAEE, arXiv 2402.14800).
* oea: opportunistic expert activation (arXiv 2511.02237): each token's top k0 are loaded; the rest
  of its K slots go to its own next-ranked experts among the loaded.
* xshare: (arXiv 2602.07265) each token's top k0, then the experts of the largest summed score up to
  `budget`; every token chooses its top K again among them.
* lynx: affinity binning (arXiv 2411.08982 v3): scores in bins by their distance from the token's
  best; within a bin the popular experts win; every token chooses again among the winners.
* frequency: static pruning, the `budget` experts that calibration saw most; others are masked.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sere.policy import PolicyError, check_keys


@dataclass(frozen=True)
class Routed:
    """What a router said of one decode batch.

    ids, weights: [T, K], its choice. logits: [T, E]. scores: [T, E], their softmax or sigmoid.
    load: [E], share of the choices during calibration.
    """

    ids: Tensor
    weights: Tensor
    logits: Tensor
    scores: Tensor
    load: Tensor

    @property
    def K(self) -> int:
        return self.ids.shape[1]

    @property
    def chosen(self) -> Tensor:
        """[T, E] bool."""
        chosen = torch.zeros_like(self.scores, dtype=torch.bool)
        return chosen.scatter_(1, self.ids.long(), self.weights != 0)


Rule = Callable[..., Tensor]


def _top(values: Tensor, k: int) -> Tensor:
    """[T, E] bool: each row's k largest values above minus infinity; ties: lowest expert."""
    order = values.argsort(dim=1, descending=True, stable=True)[:, :k]
    top = torch.zeros_like(values, dtype=torch.bool).scatter_(1, order, True)
    return top & (values > -torch.inf)


def _own_top(batch: Routed, k: int) -> Tensor:
    """[T, E] bool: the k largest slots of each row's own choice."""
    return _top(batch.scores.masked_fill(~batch.chosen, -torch.inf), k)


def _again(batch: Routed, loaded: Tensor) -> Tensor:
    """Every row's top K among the loaded experts, by score."""
    return batch.scores * _top(batch.scores.masked_fill(~loaded, -torch.inf), batch.K)


def top_k(batch: Routed, *, k: int) -> Tensor:
    return batch.scores * _own_top(batch, k)


def skip(batch: Routed, *, beta: float) -> Tensor:
    own = batch.scores * batch.chosen
    return own * (own >= beta * own.max(1, keepdim=True).values)


def oea(batch: Routed, *, k0: int) -> Tensor:
    own = _own_top(batch, k0)
    preferred = batch.scores.masked_fill(~own.any(0), -torch.inf).masked_fill(own, torch.inf)
    return batch.scores * _top(preferred, batch.K)


def xshare(batch: Routed, *, budget: int, k0: int = 1) -> Tensor:
    loaded = _own_top(batch, k0).any(0)
    utility = batch.scores.sum(0).masked_fill(loaded, -torch.inf)
    more = max(budget - int(loaded.sum()), 0)
    return _again(batch, loaded | _top(utility[None], more)[0])


def lynx(batch: Routed, *, alpha: float, beta: float) -> Tensor:
    T = len(batch.logits)
    distance = batch.logits - batch.logits.max(1, keepdim=True).values
    bins = (alpha * distance).ceil().clamp(-beta, 0)
    heat = float(T) ** bins
    common = (heat.sum(0) - heat) / T
    return _again(batch, _top(bins + common, batch.K).any(0))


def frequency(batch: Routed, *, budget: int) -> Tensor:
    return _again(batch, _top(batch.load[None], budget)[0])


RULES: dict[str, Rule] = {
    rule.__name__: rule for rule in (top_k, skip, oea, xshare, lynx, frequency)
}


@dataclass(frozen=True)
class Rival:
    """One rule with its numbers, e.g. `Rival("oea", {"k0": 1})`."""

    name: str
    numbers: Mapping[str, float]

    def __post_init__(self) -> None:
        if self.name not in RULES:
            raise PolicyError(f"rival {self.name!r}: expected one of {', '.join(RULES)}")
        known = dict(list(inspect.signature(RULES[self.name]).parameters.items())[1:])
        check_keys(f"rival {self.name}", self.numbers, list(known))
        missing = [n for n, p in known.items() if p.default is p.empty and n not in self.numbers]
        if missing:
            raise PolicyError(f"rival {self.name}: needs {', '.join(missing)}")

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Rival:
        """From {"rival": name, number: value ...}."""
        numbers = dict(settings)
        return cls(numbers.pop("rival"), numbers)

    def __str__(self) -> str:
        return " ".join([self.name, *(f"{k}={v}" for k, v in self.numbers.items())])

    def route(self, batch: Routed) -> tuple[Tensor, Tensor]:
        """New ids and weights [T, K]: the rule's shares, brought to the row's own sum of weights.

        Where the router normalises, as all these papers' models do, that is renormalising. Free
        slots name the row's first expert, with weight 0.
        """
        shares = RULES[self.name](batch, **self.numbers)
        values, ids = shares.topk(batch.K, dim=1)
        mass = batch.weights.sum(1, keepdim=True)
        weights = values * (mass / values.sum(1, keepdim=True))
        ids = torch.where(values > 0, ids, ids[:, :1])
        return ids.to(batch.ids.dtype), weights.to(batch.weights.dtype)
