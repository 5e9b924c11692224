"""Tables: how alike the experts of each layer are, and how often the router chooses them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from plotly.subplots import make_subplots

from sere.calibration.inspect import report
from sere.page.parts import LAYOUT, SCALE, Column, Figure, Frame, Grid, Section
from sere.page.sources import Source
from sere.policy import Policy
from sere.table import LayerStatistics, Table

_DIGITS = 3  # of a similarity: 128 experts in 48 layers are 5 MB of page
_COLUMNS = (
    Column("layer"),
    Column("tokens"),
    Column("similarity, 5 %", ".3f"),
    Column("median", ".3f"),
    Column("95 %", ".3f"),
    Column("nearest, mean", ".3f"),
    Column("critical, %", ".0f", 100),
    Column("stable, %", ".0f", 100),
    Column("warnings"),
)


def sections(source: Source, _others: Sequence[Source]) -> Iterable[Section]:
    """One section: a heatmap with a slider over layers, and `sere inspect`'s figures."""
    table: Table = source.content
    rho = (table.policy or Policy()).rho or 0.3
    layers = report(table, rho)
    nearest = [layer.nearest for layer in layers]
    stored = f" It carries the tuned policy {table.policy.brief()}." if table.policy else ""
    yield Section(
        "How alike the experts are",
        source.name,
        f"{table.provenance.get('model', '?')}: {len(layers)} MoE layers of {table.fingerprint.E} "
        f"experts, {table.fingerprint.K} per token; {table.method} similarity of an expert to its "
        f"nearest is {min(nearest):.2f} to {max(nearest):.2f} on average of a layer.{stored}",
        [_heatmap(table)],
        [
            Grid(
                f"By layer; critical: no other expert is similar to at least {rho:g}; stable: "
                "replacements that other text of the kind would choose again",
                _COLUMNS,
                [
                    [
                        *(layer.index, layer.tokens, *layer.quantiles, layer.nearest),
                        *(layer.critical_fraction, layer.stability, "; ".join(layer.warnings)),
                    ]
                    for layer in layers
                ],
            )
        ],
    )


def _heatmap(table: Table) -> Figure:
    frames = [
        Frame(f"layer {index}", [{"z": _rounded(layer)}, {"y": _loads(layer)}])
        for index, layer in table.layers.items()
    ]
    E = table.fingerprint.E
    figure = make_subplots(2, 1, shared_xaxes=True, row_heights=[0.84, 0.16], vertical_spacing=0.03)
    figure.update_layout(LAYOUT, showlegend=False, height=680)
    figure.add_heatmap(
        **frames[0].traces[0],
        zmin=0,
        zmax=1,
        colorscale=SCALE,
        hovertemplate="expert %{x} for expert %{y}: %{z:.3f}<extra></extra>",
        colorbar={"title": {"text": table.method, "side": "right"}, "thickness": 12},
        row=1,
        col=1,
    )
    figure.add_bar(
        **frames[0].traces[1],
        marker_color="#3b82c4",
        hovertemplate="expert %{x}: %{y:.2%} of the choices<extra></extra>",
        row=2,
        col=1,
    )
    axis: dict[str, Any] = {"range": [-0.5, E - 0.5], "constrain": "domain", "showgrid": False}
    figure.update_xaxes(**axis)
    figure.update_yaxes(title="expert to be replaced", row=1, col=1, autorange="reversed")
    figure.update_yaxes(showgrid=False, row=1, col=1)
    figure.update_yaxes(title="load", tickformat=".1%", rangemode="tozero", row=2, col=1)
    figure.update_xaxes(title="expert that stands in", row=2, col=1)
    return Figure(
        "Similarity of experts, layer by layer",
        "Similarity of every pair of experts, and below it the share of the router's choices that "
        "went to each. Bright off the diagonal: one can stand in for the other. The slider changes "
        "the layer.",
        figure,
        frames,
    )


def _rounded(layer: LayerStatistics) -> list[list[float]]:
    return [[round(x, _DIGITS) for x in row] for row in layer.similarity.tolist()]


def _loads(layer: LayerStatistics) -> list[float]:
    return [round(x, 5) for x in layer.load.tolist()]
