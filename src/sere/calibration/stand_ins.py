"""Which stand-ins are worth having for this model: what share of an expert's output each leaves.

An expert that is not loaded leaves all of its output unexplained (1) if it is dropped: a stand-in
is worth having where it leaves less. Shares are of energy, over the tokens that the router sends to
the expert, and means over a layer's experts by what they contribute (load times energy). They are
at best: any other expert may stand in here, in a batch only those that are loaded.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sere.results.provenance import text_table
from sere.table import LayerStatistics, Table


@dataclass(frozen=True)
class Left:
    """Of one layer: shares of the experts' output energy that are left.

    similar: by the most similar expert as it is (the paper's rule). scaled: by the expert of least
    error, times its best factor (`"weights": "scale"`). linear: by each expert's map at its own
    rank, on tokens that the fit had not seen; None without a file of maps.
    """

    index: int
    similar: float
    scaled: float
    linear: float | None


def left(table: Table) -> list[Left]:
    """All layers that were made from text."""
    return [
        _of_layer(index, layer, None if table.maps is None else table.maps.left[index])
        for index, layer in table.layers.items()
        if layer.tokens and layer.directed.any()
    ]


def _of_layer(index: int, layer: LayerStatistics, maps: Tensor | None) -> Left:
    own = layer.directed_energy.diagonal()
    share = layer.load * own
    counted = own > 0
    weights = torch.where(counted, share, 0) / share[counted].sum()
    own = own.where(counted, 1)
    others = ~torch.eye(len(own), dtype=torch.bool)
    directed, energy = layer.directed / own[:, None], layer.directed_energy / own[:, None]
    plain = 1 - 2 * directed + energy
    scaled = 1 - (directed.square() / energy.clamp(min=1e-30)).clamp(max=1)
    nearest = layer.similarity.where(others, -1).argmax(1, keepdim=True)
    return Left(
        index,
        similar=float(weights @ plain.gather(1, nearest)[:, 0]),
        scaled=float(weights @ scaled.where(others, torch.inf).amin(1)),
        linear=None if maps is None else float(weights @ maps.amin(1)),
    )


def as_text(table: Table) -> Iterator[str]:
    """A table of the layers, and what follows; nothing for a table made without text."""
    layers = left(table)
    if not layers:
        return
    head = ["layer", "dropped", "most similar", "least error, scaled"]
    rows = [
        [str(each.index), "100%", f"{each.similar:.0%}", f"{each.scaled:.0%}"] for each in layers
    ]
    if layers[0].linear is not None:
        head.append("linear map")
        rows = [[*r, f"{each.linear:.0%}"] for r, each in zip(rows, layers, strict=True)]
    yield "what stand-ins leave unexplained of an expert's output, at best:"
    yield text_table(head, rows)
    worse = sum(each.similar > 1 for each in layers)
    if worse:
        yield (
            f"in {worse} of {len(layers)} layers the most similar expert is worse than none: "
            "serve with tau, or with weights=scale, which never are"
        )


def in_a_line(table: Table) -> str | None:
    """The middle layer's shares; None for a table made without text."""
    layers = left(table)
    if not layers:
        return None
    similar, scaled = (
        statistics.median(getattr(each, name) for each in layers) for name in ("similar", "scaled")
    )
    mapped = [each.linear for each in layers if each.linear is not None]
    maps = f", {statistics.median(mapped):.0%} by a linear map" if mapped else ""
    return (
        f"stand-ins leave at best {similar:.0%} of an expert's output by the most similar expert, "
        f"{scaled:.0%} by a scaled one{maps} (middle layer; none at all leaves 100%)"
    )


def draw(table: Table, axis: Any) -> None:
    """Lines over layers, on a matplotlib axis."""
    layers = left(table)
    places = [each.index for each in layers]
    axis.plot(places, [each.similar for each in layers], "s-", color="black", label="most similar")
    axis.plot(places, [each.scaled for each in layers], "o-", label="least error, scaled")
    if layers and layers[0].linear is not None:
        axis.plot(places, [each.linear for each in layers], "^-", label="linear map")
    axis.axhline(1, color="gray", linestyle=":", label="dropped")
    axis.set(xlabel="layer", title="left of an expert's output", ylim=(0, None))
    axis.legend(fontsize=7)
