"""The shadow check: every n-th step, what would stock routing have given in this layer?

The experts of one layer run once more, with the router's own choice, and the difference to what
the step used is written down. Layers take turns. A layer that differs by more than the bound stays
in turn; when it has done so `PATIENCE` times in a row, routing falls back to stock. One unusual
batch is thus forgiven, one bad layer among many is found, and a table that is wrong everywhere is
noticed within `PATIENCE` checks.

The check asks the host how many rows moved, so it cannot run inside a captured or compiled graph.
Where it is off, nothing of it is there: it takes hold of the layers that it watches.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sere.kernels import RowClass
from sere.policy import PolicyError, check_keys
from sere.serving.layer import ReroutedLayer
from sere.serving.rows import RowClasses
from sere.serving.symbols import symbol

PATIENCE = 3
"""Checks of one layer in a row that must exceed the bound before routing falls back to stock."""

_LOG = logging.getLogger("vllm.sere")


@dataclass(frozen=True)
class ShadowSettings:
    """every: steps with a re-routable row from one check to the next, >= 1.
    bound: relative error of a layer's output, > 0, above which stock routing is better."""

    every: int = 100
    bound: float = 0.5

    @classmethod
    def parse(cls, given: Any) -> ShadowSettings:
        """From the user's dict; raises `PolicyError`."""
        if not isinstance(given, Mapping):
            raise PolicyError(
                f'shadow={given!r}: expected settings, e.g. {{"every": 100, "bound": 0.2}}'
            )
        check_keys("shadow", given, ("every", "bound"))
        every, bound = given.get("every", cls.every), given.get("bound", cls.bound)
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise PolicyError(f"shadow: every={every!r}: expected a whole number of steps >= 1")
        if isinstance(bound, bool) or not isinstance(bound, (int, float)) or not 0 < bound < 1e9:
            raise PolicyError(f"shadow: bound={bound!r}: expected a relative error > 0, e.g. 0.2")
        return cls(every, float(bound))


@dataclass
class Figures:
    """What the checks of one layer found.

    checks: how many there were. exceeded: how many of them found more than the bound.
    error: the latest ||new - stock|| / ||stock|| over the re-routable rows' outputs.
    surrendered: the latest share of these rows' routing weight whose slots moved.
    error_sum, surrendered_sum: over all checks.
    """

    checks: int = 0
    exceeded: int = 0
    error: float = 0.0
    surrendered: float = 0.0
    error_sum: float = 0.0
    surrendered_sum: float = 0.0

    def add(self, error: float, surrendered: float, *, exceeded: bool) -> None:
        self.checks += 1
        self.exceeded += exceeded
        self.error, self.surrendered = error, surrendered
        self.error_sum += error
        self.surrendered_sum += surrendered


@dataclass
class _Stock:
    """The router's own choice, [T, K] each, kept from routing until the experts run; and the share
    of weight that moved away from it."""

    ids: Tensor
    weights: Tensor
    surrendered: float


class Shadow:
    """The check of one worker."""

    def __init__(
        self, settings: ShadowSettings, rows: RowClasses, fall_back: Callable[[str], None]
    ) -> None:
        """fall_back: called with the reason when stock routing is better."""
        self.settings = settings
        self.figures: dict[int, Figures] = {}
        self._rows = rows
        self._fall_back = fall_back
        self._on = True
        self._steps = 0
        self._turn = 0
        self._streak = 0
        self._due: int | None = None  # the layer that is checked in the step under way
        self._kept: _Stock | None = None

    def switch(self, *, on: bool) -> None:
        """A policy was set (on), or stock routing: what was found so far decides nothing more."""
        self._on, self._streak, self._due, self._kept = on, 0, None, None

    def reset(self) -> None:
        """Forget all figures."""
        self.figures = {index: Figures() for index in self.figures}

    def watch(self, index: int, layer: ReroutedLayer, experts: Any) -> None:
        """Take hold of a layer. experts: vLLM's `RoutedExperts` of that layer. In forward order."""
        self.figures[index] = Figures()
        layer.forward = functools.partial(self._route, index, layer.forward)  # type: ignore[method-assign]
        run = experts.forward_modular
        *_, alone = getattr(experts, "_sere", (run,))  # without what linear maps add
        experts.forward_modular = functools.partial(self._mix, index, run, alone)

    def _route(
        self, index: int, forward: Callable[..., Tensor], topk_ids: Tensor, topk_weights: Tensor
    ) -> Tensor:
        """Stands in for the layer's `forward`."""
        if index == next(iter(self.figures)):
            self._due = self._begin_step()
        if index != self._due:
            return forward(topk_ids, topk_weights)
        ids, weights = topk_ids.clone(), topk_weights.clone()
        new = forward(topk_ids, topk_weights)
        carried = (weights.float().abs() * self._fast(len(ids))[:, None]).nan_to_num()
        gone = (ids[:, :, None] != new[:, None, :]).all(2)  # experts that the row names no more
        told = torch.stack([(carried * gone).sum(), carried.sum()])
        # A rank that checked by itself would wait for the others: the first one's word counts.
        moved, whole = symbol("get_tp_group")().broadcast(told, src=0).tolist()
        if moved:
            self._kept = _Stock(ids, weights, moved / whole)
        else:
            self.figures[index].add(0.0, 0.0, exceeded=False)
            self._turn += 1
        return new

    def _begin_step(self) -> int | None:
        """The layer to check in the step that begins, if any."""
        if not (self._on and self._rows.fast):
            return None
        self._steps += 1
        if self._steps % self.settings.every:
            return None
        layers = list(self.figures)
        return layers[self._turn % len(layers)]

    def _mix(
        self,
        index: int,
        run: Callable[..., Any],
        alone: Callable[..., Any],
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        **kwargs: Any,
    ) -> Any:
        """Stands in for the experts' `forward_modular`; x: [T, H]."""
        stock, self._kept = self._kept, None
        if stock is None:
            return run(x=x, topk_weights=topk_weights, topk_ids=topk_ids, **kwargs)
        exact = self._stock_output(alone, x, stock, topk_ids.dtype)
        new = run(x=x, topk_weights=topk_weights, topk_ids=topk_ids, **kwargs)
        if exact is None and isinstance(new, Tensor):
            exact = torch.full_like(new, math.nan)  # other ranks wait for this one's part
        if isinstance(exact, Tensor) and isinstance(new, Tensor):
            self._judge(index, exact, new, stock.surrendered)
        else:
            self._on = False
            _LOG.error("sere: no shadow check: this model's expert outputs are not final tensors")
        return new

    def _stock_output(
        self, run: Callable[..., Any], x: Tensor, stock: _Stock, ids: torch.dtype
    ) -> Any:
        """What the experts make of the router's own choice; None where they fail."""
        try:  # without the shared experts; on a copy, as kernels may write over their input
            out = run(x=x.clone(), topk_weights=stock.weights, topk_ids=stock.ids.to(ids))
        except Exception as error:
            self._rows.incidents.survive("the shadow check", error)
            return None
        return out.clone() if isinstance(out, Tensor) else out  # it may lie in a workspace

    def _judge(self, index: int, exact: Tensor, new: Tensor, surrendered: float) -> None:
        fast = self._fast(len(new))
        group = symbol("get_tp_group")()  # a rank's output is its part of a sum
        new, exact = (group.all_reduce(out[fast].float()) for out in (new, exact))
        difference = (new - exact).norm() / exact.norm().clamp(min=torch.finfo(exact.dtype).tiny)
        # All ranks must decide alike, to the last bit: the first one's figure counts.
        (error,) = group.broadcast(difference[None], src=0).tolist()
        error = math.inf if math.isnan(error) else error
        exceeded = error > self.settings.bound
        self.figures[index].add(error, surrendered, exceeded=exceeded)
        self._streak = self._streak + 1 if exceeded else 0
        self._turn += not exceeded
        if self._streak >= PATIENCE:
            reason = (
                f"layer {index} differed from stock routing by {error:.1%}, more than the bound of "
                f"{self.settings.bound:.1%}, in {PATIENCE} checks in a row"
            )
            self._fall_back(reason)
            if group.rank_in_group == 0:
                _LOG.error(
                    "sere: FALLING BACK TO STOCK ROUTING: %s. Is the table right for this model, "
                    "the policy not too greedy? sere_policy switches re-routing on again.",
                    reason,
                )

    def _fast(self, T: int) -> Tensor:
        """[T] bool: rows that are re-routed."""
        rows = self._rows.of(T)
        return (rows != RowClass.VOID) & (rows != RowClass.EXACT)
