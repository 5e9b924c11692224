"""`sere bench`: speed-up over stock against batch size, measured and as the roofline has it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from sere.page.parts import GREY, Column, Figure, Grid, Section, colour, panels
from sere.page.sources import Source
from sere.step_cost.roofline import beaten

_COLUMNS = (
    Column("batch"),
    Column("policy"),
    Column("TPOT, ms", ".2f"),
    Column("tokens/s", ".1f"),
    Column("active before", ".1f"),
    Column("active after", ".1f"),
    Column("predicted, ms", ".2f"),
    Column("speed-up", ".2f"),
    Column("from", ".2f"),
    Column("to", ".2f"),
    Column("predicted speed-up", ".2f"),
)


def sections(source: Source, _others: Sequence[Source]) -> Iterable[Section]:
    """One section: speed-up and time of a step against batch size, and all figures as a grid."""
    result = source.content
    reason = beaten(result["results"])
    predicted = f"nothing, as {reason}" if reason else result["roofline"]["text"]
    found = sorted(result["results"], key=lambda one: int(one["batch"]))
    rows = [_row(one["batch"], arm) for one in found for arm in one["arms"]]
    for row in rows if reason else ():
        row[6] = row[10] = None
    load = result["load"]
    yield Section(
        f"Decode speed, {result['model']}",
        source.name,
        _finding(result, bound=not reason),
        [_speed(result["results"], bound=not reason)] if len(result["results"]) > 1 else [],
        [
            Grid(
                f"{load['input_len']} tokens in, {load['output_len']} out, medians of "
                f"{load['rounds']} rounds; from, to: 95 % interval of the speed-up. Predicted: "
                f"{predicted}",
                _COLUMNS,
                rows,
            )
        ],
    )


def _row(batch: int, arm: dict[str, Any]) -> list[Any]:
    stock = arm["name"] == "stock"
    return [
        *(batch, arm["name"], arm["tpot_ms"], arm["tokens_per_s"]),
        *(arm["active_before"], arm["active_after"], arm["predicted_ms"]),
        *([None] * 4 if stock else _speedup(arm)),
    ]


def _speedup(arm: dict[str, Any]) -> list[float]:
    return [arm["speedup"], *arm["speedup_interval_95"], arm["predicted_speedup"]]


def _finding(result: dict[str, Any], *, bound: bool) -> str:
    found = [(arm, each["batch"]) for each in result["results"] for arm in each["arms"][1:]]
    best, batch = max(found, key=lambda pair: pair[0]["speedup"])
    worst, where = min(found, key=lambda pair: pair[0]["speedup"])
    layers = f"{result['layers']} of {result['of_layers']} layers"
    says = f"; the roofline says {best['predicted_speedup']:.2f}x" if bound else ""
    least = f" Least: {worst['speedup']:.2f}x at batch {where} ({worst['name']})."
    return (
        f"{result['E']} experts, {result['K']} per token, {layers}, {result['dtype']}: "
        f"{best['speedup']:.2f}x the speed of stock at batch {batch} ({best['name']}{says})."
        f"{least if best is not worst else ''}"
    )


def _speed(results: Sequence[dict[str, Any]], *, bound: bool) -> Figure:
    """Left: speed-up. Right: milliseconds a token. Dotted: predicted, if the bound holds."""
    both = panels(["speed-up over stock", "time per token, ms"], 0.09)
    results = sorted(results, key=lambda found: int(found["batch"]))
    batches = [found["batch"] for found in results]
    for number, first in enumerate(results[0]["arms"]):
        arms = [found["arms"][number] for found in results]
        stock = number == 0
        style = {"color": GREY if stock else colour(number - 1)}
        shared = {"x": batches, "legendgroup": first["name"], "line": style}
        if not stock:
            spread = [[abs(arm["speedup"] - x) for x in arm["speedup_interval_95"]] for arm in arms]
            low, high = (list(ends) for ends in zip(*spread, strict=True))
            both.add_scatter(
                y=[arm["speedup"] for arm in arms],
                error_y={"type": "data", "array": high, "arrayminus": low, "thickness": 1},
                **_measured(first["name"], "%{y:.2f}x", shown=False),
                **{**shared, "row": 1, "col": 1},
            )
            both.add_scatter(
                y=[arm["predicted_speedup"] for arm in arms],
                **_predicted(first["name"], "%{y:.2f}x"),
                **{**shared, "line": {**style, "dash": "dot"}, "row": 1, "col": 1},
            )
        both.add_scatter(
            y=[arm["tpot_ms"] for arm in arms],
            **_measured(first["name"], "%{y:.2f} ms", shown=True),
            **{**shared, "row": 1, "col": 2},
        )
        both.add_scatter(
            y=[arm["predicted_ms"] for arm in arms],
            **_predicted(first["name"], "%{y:.2f} ms"),
            **{**shared, "line": {**style, "dash": "dot"}, "row": 1, "col": 2},
        )
    both.add_scatter(
        x=[None],
        y=[None],
        mode="lines",
        line={"dash": "dot", "color": GREY},
        name="roofline",
        row=1,
        col=1,
    )
    both.add_hline(1, line={"width": 1, "color": GREY}, row=1, col=1)
    ticks = {"tickvals": batches, "ticktext": [str(batch) for batch in batches]}
    both.update_xaxes(title="requests decoded together", type="log", **ticks)
    both.update_yaxes(rangemode="tozero")
    dotted = " Dotted: the roofline, from the bytes that a step reads and what this machine can do."
    if not bound:
        both.data = [trace for trace in both.data if "roofline" not in trace.name]
    return Figure(
        "Speed-up and time per token against batch size",
        "Solid: measured, stock and re-routed taking turns in one engine; bars: 95 % interval."
        f"{dotted if bound else ''}",
        both,
    )


def _measured(name: str, value: str, *, shown: bool) -> dict[str, Any]:
    hover = f"<b>{name}</b>, batch %{{x}}<br>{value}<extra></extra>"
    return {"mode": "lines+markers", "name": name, "showlegend": shown, "hovertemplate": hover}


def _predicted(name: str, value: str) -> dict[str, Any]:
    hover = f"<b>{name}</b>, batch %{{x}}<br>roofline: {value}<extra></extra>"
    named = {"name": f"{name}, roofline", "showlegend": False, "hovertemplate": hover}
    return {"mode": "lines", **named}
