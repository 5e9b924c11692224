"""What each expert of a layer makes of a row, by the engine's own kernels: asked one by one, past
whoever observes them, and in step with the other ranks, whatever fails on one of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from sere.serving import expert_kernels
from sere.serving.refusal import ServingError
from sere.serving.symbols import symbol

_T = TypeVar("_T")
# Kernels that take any number of slots a row; others are built for K of them.
_ANY_SLOTS = ("CPU", "Triton", "Marlin", "BatchedTriton")
_AGREES = {torch.float32: 1e-4}  # how far a layer's mixture may be from what its experts add up to
_ROUNDS = 3e-2  # ... in dtypes of 16 bits, or with quantised weights


@dataclass
class Experts:
    """One layer's experts, asked past whoever observes them.

    runner: vLLM's `MoERunner`. run: its own `forward_modular`. ranks: how many have a part of each
    row's output. most: rows of a kernel call. note: called with what fails, raises it unless a step
    must go on.
    """

    runner: Any
    run: Callable[..., Any]
    ranks: int
    most: int
    note: Callable[[Exception], None]
    _routed: tuple[Tensor, Tensor, int] | None = None  # weights, ids, width of x: for their kinds

    @property
    def name(self) -> str:
        return str(self.runner.layer_name)

    @property
    def E(self) -> int:
        return logical(self.runner)

    @property
    def H(self) -> int:
        """The width of what is mapped: kernels may be given more, which is 0."""
        return int(self.runner.moe_config.hidden_dim_unpadded)

    def outputs(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor | None:
        """[E, n, H] float32: every expert on every row of x [n, H], reduced over ranks; None where
        there is no room for that. weights, ids: as the router gives them, for their dtypes and
        number of slots."""
        self._routed = (weights[:0], ids[:0], x.shape[1])
        E, (n, H) = self.E, x.shape
        found = self._tried(partial(x.new_empty, E, n, H, dtype=torch.float32))
        at_once = max(1, self.most // n)
        for first in range(0, E, at_once):
            some = range(first, min(first + at_once, E))
            out = self._alone(len(some) * n, partial(_each, x, some))
            if found is not None:
                found[first : some.stop] = out.view(len(some), n, H)
        return found

    def output(self, x: Tensor, u: int) -> Tensor:
        """[n, H] float32: expert u on rows [n, H] as `Observation.kept` has them, reduced over
        ranks; once the layer has been observed."""
        assert self._routed is not None
        wide = torch.nn.functional.pad(x, (0, self._routed[2] - x.shape[1]))
        expert = torch.tensor([u], device=x.device)
        split = torch.split(wide, self.most)
        parts = [
            self._alone(len(part), lambda own=part: (own.clone(), expert.expand(len(own))))  # type: ignore[misc]
            for part in split
        ]
        return torch.cat(parts)[:, : self.H]

    def _alone(self, n: int, rows: Callable[[], tuple[Tensor, Tensor]]) -> Tensor:
        """[n, H] float32: what one expert makes of each row; rows: makes rows [n, H] and experts
        [n]."""
        return self._mixture(n, lambda: self._sent(*rows()))

    def _sent(self, x: Tensor, experts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows [n, H], each as the kernel takes it that goes to one expert; experts: [n]."""
        assert self._routed is not None
        weights, ids, _ = self._routed
        any_slots = expert_kernels.serving(self.runner).startswith(_ANY_SLOTS)
        K = 1 if any_slots else ids.shape[1]
        # Slots beyond the first have no weight, and other experts, as kernels may count them.
        named = (experts[:, None] + torch.arange(K, device=x.device)) % self.E
        share = torch.zeros(len(x), K, dtype=weights.dtype, device=x.device)
        share[:, 0] = 1
        return x, share, named.to(ids.dtype)

    def check(self, x: Tensor, weights: Tensor, ids: Tensor, outputs: Tensor | None) -> None:
        """Note a `ServingError` unless the outputs [E, n, H] add up to the layer's own mixture."""
        whole = self._mixture(len(x), lambda: (x.clone(), weights.clone(), ids.clone()))
        if outputs is not None:
            self._tried(lambda: self._compare(whole, x, weights, ids, outputs))

    def _compare(
        self, whole: Tensor, x: Tensor, weights: Tensor, ids: Tensor, outputs: Tensor
    ) -> None:
        """Raise it."""
        real = (ids >= 0) & (ids < len(outputs))
        share = torch.where(real, weights, 0).float()
        rows = torch.arange(len(x), device=x.device)[:, None]
        picked = outputs[ids.long().clamp(0, len(outputs) - 1), rows]  # [n, K, H]
        added = (share[:, :, None] * picked).sum(1)
        tiny = torch.finfo(torch.float32).tiny
        error = ((added - whole).norm() / whole.norm().clamp(min=tiny)).item()
        quantised = self.runner.routed_experts.quant_config is not None
        bound = _ROUNDS if quantised else _AGREES.get(x.dtype, _ROUNDS)
        if not error <= bound:
            raise ServingError(
                f"sere cannot calibrate in this engine: in {self.name} the experts' outputs, asked "
                "for one by one, add up to another mixture than its own (off by "
                f"{error:.1%}, {bound:.2%} allowed; kernel {expert_kernels.serving(self.runner)}): "
                "choose another --moe-backend, or calibrate without --engine"
            )

    def _mixture(self, n: int, rows: Callable[[], tuple[Tensor, Tensor, Tensor]]) -> Tensor:
        """[n, H] float32, without shared experts, reduced over ranks. rows: makes them [n, H], with
        their weights and ids [n, K]."""
        assert self._routed is not None
        some, _, H = self._routed
        whole = self._tried(lambda: self._own(*rows()))
        if whole is None:  # other ranks wait for it
            whole = some.new_full((n, H), math.nan, dtype=torch.float32)
        if self.ranks > 1 and not self.runner._fused_output_is_reduced:
            whole = symbol("get_tp_group")().all_reduce(whole)
        return whole

    def _tried(self, make: Callable[[], _T]) -> _T | None:
        """None for what fails and is noted; what it held is let go by then."""
        try:
            return make()
        except Exception as error:
            self.note(error)
        return None

    def _own(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """This rank's part of a mixture [n, H] float32."""
        out = self.run(x=x, topk_weights=weights, topk_ids=ids)
        if isinstance(out, Tensor):
            return out.float()
        raise ServingError(
            f"sere cannot calibrate in this engine: {self.name} defers its sums; "
            "choose another --moe-backend, or calibrate without --engine"
        )


def _each(x: Tensor, experts: range) -> tuple[Tensor, Tensor]:
    """Rows [n, H] once for each expert, and that expert: [n len(experts), H], [n len(experts)]."""
    ids = torch.arange(experts.start, experts.stop, device=x.device)
    return x.repeat(len(experts), 1), ids.repeat_interleave(len(x))


def logical(runner: Any) -> int:
    """How many experts a layer (vLLM's `MoERunner`) has, whoever holds them."""
    return int(runner.moe_config.num_logical_experts)
