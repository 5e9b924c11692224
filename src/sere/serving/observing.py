"""What all experts of a layer make of the rows that it gets, by the engine's own kernels, weights
and scales: a layer's `forward_modular` is replaced on the instance while the engine reads text, and
given back.

Nothing of a row is kept but sums [E, E], unless linear maps are to be fitted to it: see
`fitted_maps`. Beyond those, a layer holds at a time: outputs of all experts on some rows (256 MiB
at most), two float64 copies of a part of them (128 MiB each), and a kernel call's rows, at most as
many as the engine's workspaces were profiled for.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor

from sere.fitting.mapping import Rows
from sere.serving import expert_kernels
from sere.serving.refusal import ServingError
from sere.serving.symbols import symbol
from sere.similarity.sums import LayerSums, chosen
from sere.statistics import LayerStatistics

_LOG = logging.getLogger("vllm.sere")
_HOOKED = "forward_modular"
_CHUNK = 128  # rows whose outputs exist at a time, at most
_BYTES = 2**28
# Kernels that take any number of slots a row; others are built for K of them.
_ANY_SLOTS = ("CPU", "Triton", "Marlin", "BatchedTriton")
_AGREES = {torch.float32: 1e-4}  # how far a layer's mixture may be from what its experts add up to
_ROUNDS = 3e-2  # ... in dtypes of 16 bits, or with quantised weights


class Observer(Protocol):
    """Who is told of each step before it runs."""

    def begin(self, requests: Sequence[str], lengths: Any, prefilling: Any) -> None:
        """The step's requests, rows of each (None for one each), and which read their prompt; in
        batch order."""


class Observation:
    """One worker's part: sums of every layer, by decoder layer index.

    closed: nothing more is added up, as the sums are read. broken: why they are of no use, where
    that must not end a step.
    """

    def __init__(
        self,
        runners: Sequence[Any],
        method: str,
        *,
        rows: int,
        adds_up: bool,
        ranks: int,
        serves: bool = False,
        keeps: bool = False,
    ) -> None:
        """runners: vLLM's `MoERunner` of each layer. method: of `similarity.measures`.

        rows: what a kernel call may have at most. adds_up: whether this rank keeps the sums; every
        rank runs its part of all experts. ranks: how many have a part of each row's output.
        serves: whether the steps are requests', who must not notice if something fails.
        keeps: whether inputs are kept, for linear maps (`kept`), on every rank.
        """
        if reason := next(filter(None, map(_obstacle, runners)), None):
            raise ServingError(f"sere cannot calibrate in this engine: {reason}")
        self._runners = runners
        self._rows, self._adds_up, self._ranks, self._serves = rows, adds_up, ranks, serves
        self.closed = False
        self.broken: str | None = None
        self.sums = {r.layer_id: LayerSums(_E(r), method) for r in runners}
        self.kept = {r.layer_id: Rows() for r in runners} if keeps else {}
        self.asked: dict[int, Experts] = {}  # of the layers that were read, by index
        # Rows of the pass, their fold, and which of them the fit of maps does not see.
        self._parts: list[tuple[slice | Tensor, int, Sequence[bool]]] = []
        self._requests: Mapping[str, tuple[int, bool]] = {}
        self._checked: set[int] = set()

    def expect(self, requests: Mapping[str, tuple[int, bool]]) -> None:
        """A pass over these requests follows: the part of the text that each belongs to, and
        whether a fit of maps does not see it."""
        self._requests, self._parts = requests, []

    def begin(self, requests: Sequence[str], lengths: Any, prefilling: Any) -> None:
        """See `Observer.begin`: all rows are read."""
        rows = [1] * len(requests) if lengths is None else [int(n) for n in lengths]
        known = [self._requests[name] for name in requests]
        pairs = groupby(zip(rows, known, strict=True), key=lambda pair: pair[1][0])
        start, self._parts = 0, []
        for fold, part in pairs:
            held = [apart for n, (_, apart) in part for _ in range(n)]
            self._parts.append((slice(start, start := start + len(held)), fold, held))

    def follow(self, parts: Sequence[tuple[Tensor, int]]) -> None:
        """Of the coming pass these rows alone are read: numbers of rows, and the part of the text
        that they belong to."""
        self._parts = [(rows, fold, ()) for rows, fold in parts]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """All layers are observed, and each is left as it was: the shadow check may have hold of
        it, too."""
        layers = [runner.routed_experts for runner in self._runners]
        before = [vars(experts).get(_HOOKED) for experts in layers]
        try:
            for runner, experts in zip(self._runners, layers, strict=True):
                run = _unanswered(experts)
                own = Experts(runner, run, self._ranks, self._rows, self._note)
                experts.forward_modular = partial(self._watch, own)
            yield
        finally:
            for experts, hooked in zip(layers, before, strict=True):
                vars(experts).pop(_HOOKED, None)
                if hooked is not None:
                    experts.forward_modular = hooked

    def finished(self, tokens: int) -> dict[int, LayerStatistics] | None:
        """What was found; None on ranks that add nothing up. Raises `ServingError` unless every
        layer has seen each of the text's tokens once."""
        if not self._adds_up:
            return None
        if reason := self.short_of(tokens):
            raise ServingError(reason)
        found = {index: sums.finished() for index, sums in sorted(self.sums.items())}
        for index, layer in found.items():
            if not (torch.isfinite(layer.gram).all() and torch.isfinite(layer.directed).all()):
                raise ServingError(
                    f"layer {index}: an expert's output is NaN or infinite; is the checkpoint "
                    "intact, and its dtype fit for this device?"
                )
        return found

    def short_of(self, tokens: int) -> str | None:
        """Which layer has not seen each of so many tokens once, or None."""
        for runner in self._runners:
            seen = self.sums[runner.layer_id].tokens
            if seen != tokens:
                return (
                    f"sere cannot calibrate in this engine: {runner.layer_name} saw {seen:,} of "
                    f"{tokens:,} tokens; calibrate with `sere calibrate` without --engine"
                )
        return None

    def _note(self, error: Exception) -> None:
        """Raise an error, unless a step must go on: then no more is added up."""
        if not self._serves:
            raise error
        if self.broken is None:
            _LOG.warning("sere: traffic is measured no more", exc_info=error)
        self.broken = self.broken or str(error).splitlines()[0]

    def _watch(
        self, experts: Experts, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, **more: Any
    ) -> Any:
        """Stands in for the layer's `forward_modular`; x: [T, H], padding behind the real rows."""
        try:
            for part, fold, held in self._parts:
                # copies, as kernels may write over their input
                own = (x[part].clone(), topk_weights[part], topk_ids[part])
                self._take_in(experts, *own, fold, held)
        except Exception as error:
            self._note(error)
        return experts.run(x=x, topk_weights=topk_weights, topk_ids=topk_ids, **more)

    def _take_in(
        self,
        experts: Experts,
        x: Tensor,
        weights: Tensor,
        ids: Tensor,
        fold: int,
        held: Sequence[bool],
    ) -> None:
        layer, E = experts.runner.layer_id, experts.E
        sums, sent = self.sums[layer], chosen(ids.long(), weights, E)
        if kept := self.kept.get(layer):
            kept.add(x[:, : experts.H], sent, torch.tensor(held, device="cpu"))
            self.asked[layer] = experts
        adds_up = self._adds_up and not self.closed and self.broken is None
        if adds_up:
            sums.count(sent)
        step = max(1, min(_CHUNK, self._rows, _BYTES // (4 * E * x.shape[-1])))
        for first in range(0, len(x), step):
            part = slice(first, first + step)
            outputs = experts.outputs(x[part], weights, ids)
            try:
                if layer not in self._checked:
                    self._checked.add(layer)
                    experts.check(x[part], weights[part], ids[part], outputs)
                if adds_up:
                    sums.add(outputs, sent[part], fold)
                if adds_up and kept:
                    kept.add_outputs(outputs[:, :, : experts.H], sent[part])
            except Exception as error:
                self._note(error)
            del outputs  # before the next is made


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
        return _E(self.runner)

    @property
    def H(self) -> int:
        """The width of what is mapped: kernels may be given more, which is 0."""
        return int(self.runner.moe_config.hidden_dim_unpadded)

    def outputs(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """[E, n, H] float32: every expert on every row of x [n, H], reduced over ranks. weights,
        ids: as the router gives them, for their dtypes and number of slots."""
        self._routed = (weights[:0], ids[:0], x.shape[1])
        E, n = self.E, len(x)
        found: Tensor | None = None
        at_once = max(1, self.most // n)
        for first in range(0, E, at_once):
            experts = torch.arange(first, min(first + at_once, E), device=x.device)
            out = self._alone(x.repeat(len(experts), 1), experts.repeat_interleave(n))
            if found is None:
                found = torch.empty(E, n, out.shape[-1], dtype=torch.float32, device=x.device)
            found[first : first + len(experts)] = out.view(len(experts), n, -1)
        assert found is not None
        return found

    def output(self, x: Tensor, u: int) -> Tensor:
        """[n, H] float32: expert u on rows [n, H] as `Observation.kept` has them, reduced over
        ranks; once the layer has been observed."""
        assert self._routed is not None
        wide = torch.nn.functional.pad(x, (0, self._routed[2] - x.shape[1]))
        expert = torch.tensor([u], device=x.device)
        split = torch.split(wide, self.most)
        parts = [self._alone(part.clone(), expert.expand(len(part))) for part in split]
        return torch.cat(parts)[:, : self.H]

    def _alone(self, x: Tensor, experts: Tensor) -> Tensor:
        """[n, H] float32: what one expert makes of each row; experts: [n]."""
        assert self._routed is not None
        weights, ids, _ = self._routed
        any_slots = expert_kernels.serving(self.runner).startswith(_ANY_SLOTS)
        K = 1 if any_slots else ids.shape[1]
        # Slots beyond the first have no weight, and other experts, as kernels may count them.
        named = (experts[:, None] + torch.arange(K, device=x.device)) % self.E
        share = torch.zeros(len(x), K, dtype=weights.dtype, device=x.device)
        share[:, 0] = 1
        return self._mixture(x, share, named.to(ids.dtype))

    def check(self, x: Tensor, weights: Tensor, ids: Tensor, outputs: Tensor) -> None:
        """Raise `ServingError` unless the outputs [E, n, H] add up to the layer's own mixture."""
        whole = self._mixture(x.clone(), weights.clone(), ids.clone())
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

    def _mixture(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """[n, H] float32, without shared experts, reduced over ranks."""
        try:
            whole = self._own(x, weights, ids)
        except Exception as error:
            self.note(error)
            whole = torch.full_like(x, math.nan, dtype=torch.float32)  # other ranks wait for it
        if self.ranks > 1 and not self.runner._fused_output_is_reduced:
            whole = symbol("get_tp_group")().all_reduce(whole)
        return whole

    def _own(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """This rank's part of a mixture [n, H] float32."""
        out = self.run(x=x, topk_weights=weights, topk_ids=ids)
        if isinstance(out, Tensor):
            return out.float()
        raise ServingError(
            f"sere cannot calibrate in this engine: {self.name} defers its sums; "
            "choose another --moe-backend, or calibrate without --engine"
        )


def _unanswered(experts: Any) -> Callable[..., Any]:
    """A layer's `forward_modular` without what linear maps add."""
    *_, alone = getattr(experts, "_sere", (experts.forward_modular,))
    return alone  # type: ignore[no-any-return]


def _obstacle(runner: Any) -> str | None:
    """Why a layer's experts cannot be compared by their outputs, or None."""
    if runner.routed_experts.apply_router_weight_on_input:
        return (
            f"{runner.layer_name} weighs its experts' inputs and not their outputs (as Llama 4 "
            "does), so that one output is not to be had; use `sere calibrate` without --engine"
        )
    if runner.routed_output_transform is not None:
        return (
            f"{runner.layer_name} transforms the sum of its experts' outputs (latent experts), "
            "which are no parts of the layer's output then; use `sere calibrate` without --engine"
        )
    return None


def _E(runner: Any) -> int:
    return int(runner.moe_config.num_logical_experts)
