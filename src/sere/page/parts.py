"""What a page is made of: sections with figures and grids of numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

# Readable on white and on near-black alike; ours first.
COLOURS = (
    *("#e4572e", "#3b82c4", "#2a9d8f", "#b07aa1", "#c29b1f", "#7f8fa6", "#d1739b", "#6a9f3a"),
    *("#8c6bb1", "#1fa2c2", "#a8764a", "#9aa800", "#cc5a71", "#5b7fd6", "#4f9c76", "#b5651d"),
)
GREY = "#8a94a0"
SCALE = "Viridis"
LOGARITHMIC: dict[str, Any] = {"type": "log", "exponentformat": "power", "dtick": 1}
LAYOUT: dict[str, Any] = {
    "margin": {"l": 64, "r": 16, "t": 40, "b": 56},
    "height": 420,
    "legend": {"orientation": "h", "y": -0.26, "x": 0},
}


@dataclass(frozen=True)
class Column:
    """A column of a grid; format: of its numbers, as for `format()`; factor: shown times this."""

    title: str
    format: str = ""
    factor: float = 1


@dataclass(frozen=True)
class Grid:
    """A table of raw values: text, numbers, None, or a (value, error) pair."""

    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Any]]

    def is_text(self, column: int) -> bool:
        """Whether a column holds words, which are set flush left."""
        return any(isinstance(row[column], str) for row in self.rows)

    def shown(self, value: Any, column: Column) -> str:
        """A cell as the page has it."""
        if value is None:
            return "-"
        if isinstance(value, bool):
            return "yes" if value else "no"
        if isinstance(value, tuple | list):
            unsigned = replace(column, format=column.format.removeprefix("+"))
            number, error = self.shown(value[0], column), self.shown(value[1], unsigned)
            return number if value[1] is None else f"{number} ± {error}"
        if isinstance(value, int | float) and column.format:
            return format(value * column.factor, column.format)
        return str(value)


@dataclass(frozen=True)
class Frame:
    """One position of a figure's slider: the attributes of each trace that change."""

    label: str
    traces: Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Figure:
    """A plot; caption: how to read it; frames: of its slider, if it has one."""

    title: str
    caption: str
    plot: go.Figure
    frames: Sequence[Frame] = ()

    @property
    def columns(self) -> int:
        """How many plots stand side by side: on a narrow screen they are scrolled, not squeezed."""
        axes = (axis for name, axis in self.plot.layout.to_plotly_json().items() if "xaxis" in name)
        return len({tuple(axis.get("domain", ())) for axis in axes})

    def spec(self) -> dict[str, Any]:
        """What plotly.js draws, as plain JSON without a template: the page brings the colours."""
        found: dict[str, Any] = self.plot.to_plotly_json()
        found["layout"].pop("template", None)
        return found


@dataclass(frozen=True)
class Section:
    """What is shown of one result.

    source: the name of its file; more: of others that are shown with it. finding: the one sentence
    to take away. caveats: what has to be known with it.
    """

    title: str
    source: str
    finding: str
    figures: Sequence[Figure] = ()
    grids: Sequence[Grid] = ()
    more: Sequence[str] = ()
    caveats: Sequence[str] = ()

    @property
    def sources(self) -> list[str]:
        return [self.source, *self.more]


def plot(**layout: Any) -> go.Figure:
    """An empty plot in the page's style."""
    return go.Figure(layout={**LAYOUT, "margin": {**LAYOUT["margin"], "t": 20}, **layout})


def panels(
    titles: Sequence[str], spacing: float, *, shared_y: bool = False, **layout: Any
) -> go.Figure:
    """Empty plots side by side, each under its title; spacing: between them, of the whole width."""
    found = make_subplots(
        1,
        len(titles),
        shared_yaxes=shared_y,
        horizontal_spacing=spacing,
        subplot_titles=list(titles),
    )
    return found.update_layout(LAYOUT, hovermode="closest", **layout)


def shares(
    z: Sequence[Sequence[float]],
    x: Sequence[str],
    y: Sequence[str],
    *,
    row: int,
    digits: int,
    **heatmap: Any,
) -> go.Figure:
    """A heatmap of shares up to 1: a row, `row` pixels high, for each of y from the top down, and a
    column for each of x; their percentages, with so many digits, stand in it."""
    figure = plot(height=max(300, row * len(y) + 90))
    figure.add_heatmap(
        z=z,
        x=x,
        y=y,
        zmax=1,
        texttemplate=f"%{{z:.{digits}%}}",
        hovertemplate=f"%{{y}}, %{{x}}: %{{z:.{digits + 1}%}}<extra></extra>",
        xgap=2,
        ygap=2,
        colorbar={"tickformat": ".0%", "thickness": 12},
        **heatmap,
    )
    figure.update_xaxes(side="top", showgrid=False)
    figure.update_yaxes(autorange="reversed", showgrid=False)
    return figure


def colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]
