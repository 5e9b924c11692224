"""What an engine that calibrated itself measured of its policy before it served: the `.report.json`
beside its table, or several of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sere.page.parts import Column, Figure, Grid, Section, colour, panels
from sere.page.sources import Source

_COLUMNS = (
    Column("policy"),
    Column("requests"),
    Column("experts read: stock", ".1f"),
    Column("experts read", ".1f"),
    Column("ms a step: stock", ".2f"),
    Column("ms a step", ".2f"),
    Column("speed", ".2f"),
    Column("KL, nats a token", ".4f"),
    Column("loss, nats a token", "+.4f"),
    Column("same next token, %", ".1f", 100),
)


def started(source: Source, _others: Sequence[Source]) -> Iterable[Section]:
    """Speed with its range, and what is lost with its standard error, by requests."""
    reports = source.content.get("reports") or [source.content]
    first = reports[0]
    found = ". ".join(first["verdict"])
    rows = [_row(report["policy"], size) for report in reports for size in report["sizes"]]
    yield Section(
        f"{first['policy']}, in the engine that was to serve it",
        source.name,
        f"{first['policy']}: {found}",
        [_figure(reports)],
        [Grid(f"Beside stock routing, {first['text']}.", _COLUMNS, rows)],
    )


def _row(policy: str, size: Mapping[str, Any]) -> list[Any]:
    stock_ms, ms = (statistics.median(size[name]) for name in ("stock_ms", "ms"))
    read = [size["before"], size["after"]]
    lost = [_mean(size[name]) for name in ("kl", "loss")]
    return [policy, size["requests"], *read, stock_ms, ms, size["speed"][1], *lost, size["same"]]


def _mean(values: Sequence[float]) -> tuple[float, float]:
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


def _figure(reports: Sequence[Mapping[str, Any]]) -> Figure:
    both = panels(("times as fast as stock", "loss, nats a token"), 0.12)
    for number, report in enumerate(reports):
        sizes = report["sizes"]
        x = [str(size["requests"]) for size in sizes]
        speeds = [size["speed"] for size in sizes]
        spread = {
            "array": [high - middle for _, middle, high in speeds],
            "arrayminus": [middle - low for low, middle, _ in speeds],
        }
        lost = [_mean(size["loss"]) for size in sizes]
        drawn = (
            ([middle for _, middle, _ in speeds], spread, "%{y:.2f}x"),
            ([value for value, _ in lost], {"array": [2 * e for _, e in lost]}, "%{y:+.4f} nats"),
        )
        for column, (y, bars, said) in enumerate(drawn, start=1):
            both.add_scatter(
                x=x,
                y=y,
                error_y={"type": "data", "thickness": 1, **bars},
                mode="lines+markers",
                name=report["policy"],
                showlegend=column == 1,
                line={"color": colour(number)},
                hovertemplate=f"%{{x}} requests: {said}<extra>{report['policy']}</extra>",
                row=1,
                col=column,
            )
    both.add_hline(1, line={"dash": "dash", "width": 1}, row=1, col=1)
    both.add_hline(0, line={"dash": "dash", "width": 1}, row=1, col=2)
    both.update_xaxes(title="requests decoded together", type="category")
    return Figure(
        "Speed and loss by load",
        "Left: of a whole step, lowest to highest of the turns. Right: two standard errors over "
        "texts. Dashed: stock.",
        both,
    )
