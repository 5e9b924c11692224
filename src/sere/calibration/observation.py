"""What calibration writes down while a model reads: one set of small statistics per MoE layer.

Every expert runs on every real token of its layer, a chunk at a time; only [E, E] sums are kept.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sere.fitting.mapping import Rows, is_held_out
from sere.maps import LayerMaps
from sere.models.moe import MoELayer
from sere.similarity.sums import FOLDS, LayerSums, chosen
from sere.table import LayerStatistics

# Tokens whose outputs [E, n, H] exist at a time: what bounds the memory, whatever the text.
CHUNK = 128
# ... and on a GPU, where larger products are faster.
_GPU_BYTES = 2**30


class UnfitError(ValueError):
    """A layer whose outputs cannot be measured, and why."""


class _Layer(LayerSums):
    """What accumulates for one layer, and its rows where maps are to be fitted."""

    def __init__(self, E: int, method: str, rows: Rows | None) -> None:
        super().__init__(E, method)
        self.rows = rows

    def add(self, outputs: Tensor, chosen: Tensor, fold: int) -> None:
        if self.rows is not None:
            self.rows.add_outputs(outputs, chosen)
        super().add(outputs, chosen, fold)


@dataclass
class Observer:
    """Takes in one forward pass after the other; call `begin` before each.

    method: one of `sere.similarity.measures.METHODS`.
    K: experts per token, as seen.
    maps: largest rank of the maps to fit; None for none.
    batch: sequences of a pass, but for the last one.
    """

    method: str
    K: int = 0
    maps: int | None = None
    batch: int = 1
    _layers: dict[int, _Layer] = field(default_factory=dict)
    _real: Tensor | None = None
    _held: Tensor | None = None
    _fold: int = 0
    _fitting: bool = False

    def begin(self, number: int, real: Tensor) -> None:
        """Announce forward pass `number`; real: [B, length] bool, False where there is padding."""
        self._real, self._fold = real.flatten(), number % FOLDS
        held = [is_held_out(number * self.batch + i) for i in range(len(real))]
        self._held = torch.tensor(held, device=real.device)[:, None].expand_as(real)[real]

    def __call__(self, layer: MoELayer, hidden: Tensor, ids: Tensor, weights: Tensor) -> None:
        if self._fitting:  # the experts are being asked for their outputs once more
            return
        assert self._real is not None and self._held is not None, "call `begin` before the pass"
        hidden, ids = hidden[self._real], ids[self._real].long()
        self.K = self.K or ids.shape[1]
        if ids.shape[1] != self.K:
            raise UnfitError(
                f"{layer.name} routes a token to {ids.shape[1]} experts, layers before it to "
                f"{self.K}: layers that differ in this are not supported"
            )
        if layer.index not in self._layers:
            rows = None if self.maps is None else Rows()
            self._layers[layer.index] = _Layer(layer.E, self.method, rows)
        own = self._layers[layer.index]
        sent = chosen(ids, weights[self._real], layer.E)
        own.count(sent)
        if own.rows is not None:
            own.rows.add(hidden, sent, self._held)
        step = _chunk(layer.E, hidden)
        for part, picks in zip(torch.split(hidden, step), torch.split(sent, step), strict=True):
            # not given a name here, so that it is gone before the next is made
            own.add(_finite(layer.outputs(part), layer), picks, self._fold)

    def stability(self) -> float:
        """The least stable layer's stability so far, 0 while unknown."""
        return min((own.stability() or 0 for own in self._layers.values()), default=0)

    def so_far(self) -> dict[int, dict[str, Any]]:
        """By layer what was added up, for `take_up`; not where maps are to be fitted."""
        return {index: own.so_far() for index, own in self._layers.items()}

    def take_up(self, so_far: dict[int, dict[str, Any]]) -> None:
        """Go on from what a run before has added up."""
        for index, sums in so_far.items():
            self._layers[index] = own = _Layer(len(sums["choices"]), self.method, None)
            own.take_up(sums)

    def finish(self, layer: MoELayer) -> tuple[LayerStatistics, LayerMaps | None]:
        """The layer's statistics, and its maps if they were asked for; what they were made of is
        forgotten."""
        own = self._layers.pop(layer.index, None)
        if own is None:
            raise UnfitError(
                f"{layer.name}: its experts were never called; does the model run them some other "
                "way (use_kernels=True, a decoder that this text does not reach)?"
            )
        found = own.finished()
        if own.rows is None or self.maps is None:
            return found, None
        self._fitting = True
        try:
            return found, own.rows.maps(
                layer.adapter.output,
                self.maps,
                found.directed,
                found.directed_energy,
                device=next(layer.experts.parameters()).device,
            )
        finally:
            self._fitting = False


def _finite(outputs: Tensor, layer: MoELayer) -> Tensor:
    if not torch.isfinite(outputs).all():
        raise UnfitError(
            f"{layer.name}: an expert's output is NaN or infinite; is the checkpoint intact, and "
            "its dtype fit for this device?"
        )
    return outputs


def _chunk(E: int, hidden: Tensor) -> int:
    if hidden.device.type == "cpu":
        return CHUNK
    return max(CHUNK, _GPU_BYTES // (4 * E * hidden.shape[-1]) // CHUNK * CHUNK)
