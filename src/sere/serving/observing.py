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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor

from sere.fitting.mapping import Rows
from sere.serving.each_expert import Experts, logical
from sere.serving.refusal import ServingError
from sere.serving.symbols import symbol
from sere.similarity.sums import LayerSums, chosen
from sere.statistics import LayerStatistics

_LOG = logging.getLogger("vllm.sere")
_HOOKED = "forward_modular"
_CHUNK = 128  # rows whose outputs exist at a time, at most
_BYTES = 2**28


class Observer(Protocol):
    """Who is told of each step before it runs."""

    def begin(self, requests: Sequence[str], lengths: Any, prefilling: Any) -> None:
        """The step's requests, rows of each (None for one each), and which read their prompt; in
        batch order."""


class Observation:
    """One worker's part: sums of every layer, by decoder layer index.

    closed: nothing more is added up, as the sums are read. broken: why they are of no use, where
    that must not end a step: others' requests are in it, or other ranks.
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
        self.sums = {r.layer_id: LayerSums(logical(r), method) for r in runners}
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
        if not self._serves and self._ranks == 1:
            raise error
        if self.broken is None:
            _LOG.warning("sere: experts are measured no more", exc_info=error)
        said = str(error) or type(error).__name__
        self.broken = self.broken or said.splitlines()[0]

    def agree(self, device: Any) -> None:
        """Raise `ServingError` on every rank if it failed on any; asked on all of them."""
        if self._ranks == 1:
            return
        group = symbol("get_tp_group")()
        reason = self.broken
        mine = torch.tensor([float(reason is not None)], device=device)
        if bool(group.all_reduce(mine)):
            reason = group.broadcast_object(reason, src=0) or reason
            raise ServingError(
                f"sere cannot calibrate in this engine: {reason or 'a rank failed, see its log'}"
            )

    def _watch(
        self, experts: Experts, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, **more: Any
    ) -> Any:
        """Stands in for the layer's `forward_modular`; x: [T, H], padding behind the real rows."""
        try:
            for part, fold, held in self._parts:
                self._take_in(experts, x[part], topk_weights[part], topk_ids[part], fold, held)
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
        """What fails on this rank keeps it from no kernel that the others wait for."""
        layer, E = experts.runner.layer_id, experts.E
        try:
            sums, sent = self.sums[layer], chosen(ids.long(), weights, E)
            if kept := self.kept.get(layer):
                kept.add(x[:, : experts.H], sent, torch.tensor(held, device="cpu"))
                self.asked[layer] = experts
            if adds_up := self._adds_up and not self.closed and self.broken is None:
                sums.count(sent)
        except Exception as error:
            self._note(error)
            adds_up = False
        step = max(1, min(_CHUNK, self._rows, _BYTES // (4 * E * x.shape[-1])))
        for first in range(0, len(x), step):
            part = slice(first, first + step)
            outputs = experts.outputs(x[part], weights, ids)
            if layer not in self._checked:
                self._checked.add(layer)
                experts.check(x[part], weights[part], ids[part], outputs)
            try:
                if adds_up and outputs is not None:
                    sums.add(outputs, sent[part], fold)
                    if kept:
                        kept.add_outputs(outputs[:, :, : experts.H], sent[part])
            except Exception as error:
                self._note(error)
            del outputs  # before the next is made


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
