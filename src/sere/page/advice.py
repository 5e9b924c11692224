"""`sere tune`: the front, the budget, the choice, and what to do at each batch size."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from sere.cost import Cost
from sere.page.parts import GREY, LOGARITHMIC, Column, Figure, Grid, Section, colour, plot
from sere.page.sources import Source
from sere.policy import Policy
from sere.search import BUDGETS

_COLUMNS = (
    Column("batch"),
    Column("active, stock", ".2f"),
    Column("active, chosen", ".2f"),
    Column("loss", ".3g"),
    Column("upper end", ".3g"),
    Column("within budget"),
    Column("expected speed-up", ".2f"),
    Column("advice"),
    Column("alone: expected error"),
    Column("alone: paper's rule"),
)


def sections(source: Source, _others: Sequence[Source]) -> Iterable[Section]:
    """One section; losses are those of passages that the search did not see."""
    result = source.content
    name, limit = result["settings"]["budget"]["name"], result["settings"]["budget"]["limit"]
    cost = Cost(**result["cost"])
    yield Section(
        "Tuned for a budget",
        source.name,
        _finding(result, name, limit),
        [_front(result, name, limit)],
        [
            Grid(
                f"On held-out passages; budget: {name} at most {limit:g}. The speed-up is that of "
                f"{cost.of}, {cost.source}.",
                _COLUMNS,
                [_row(own, held) for own, held in _pairs(result)],
            )
        ],
    )


def _pairs(result: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    pairs = zip(result["by_batch"], result["held_out"], strict=True)
    return sorted(pairs, key=lambda pair: pair[0]["batch"])


def _row(own: dict[str, Any], held: dict[str, Any]) -> list[Any]:
    stock, chosen = held["stock"], held["chosen"]
    return [
        held["batch"],
        stock["active"],
        chosen["active"],
        chosen["loss"],
        chosen["upper"],
        held["kept"],
        stock["seconds"] / chosen["seconds"],
        "re-route" if held["enable"] else "leave stock",
        *(_brief(own[rule]["policy"]) if own[rule] else None for rule in ("error", "paper")),
    ]


def _brief(policy: dict[str, Any] | None) -> str:
    return Policy.from_dict(policy).brief() if policy else "stock"


def _finding(result: dict[str, Any], name: str, limit: float) -> str:
    if not result["policy"]:
        return f"Nothing keeps {name} within {limit:g} and saves time: leave stock routing."
    largest = max(result["held_out"], key=lambda held: held["batch"])
    chosen, stock = largest["chosen"]["active"], largest["stock"]["active"]
    return (
        f"Chosen for {name} ≤ {limit:g}: {_brief(result['policy'])}. "
        f"Batch {largest['batch']} reads {chosen:.1f} experts per layer instead of {stock:.1f}."
    )


def _front(result: dict[str, Any], name: str, limit: float) -> Figure:
    figure = plot(hovermode="closest", height=400)
    losses = [p["loss"] for own in result["by_batch"] for p in own["points"]]
    floor = max(min((x for x in losses if x > 0), default=1e-6) / 2, 1e-7)
    for number, (own, held) in enumerate(_pairs(result)):
        points = sorted(own["points"], key=lambda p: p["active"])
        shared = {"legendgroup": str(own["batch"]), "marker_color": colour(number)}
        figure.add_scatter(
            **_dots(points, floor), **shared, name=f"batch {own['batch']}", marker_size=7
        )
        if result["policy"]:
            figure.add_scatter(
                **_dots([held["chosen"]], floor),
                **shared,
                name=f"batch {own['batch']}, chosen (held out)",
                marker_symbol="star",
                marker_size=15,
            )
    figure.add_hline(limit, line={"dash": "dash", "width": 1.5, "color": GREY})
    figure.add_annotation(
        text=f"budget: {limit:g}",
        x=1,
        xref="paper",
        xanchor="right",
        y=math.log10(limit),
        yanchor="bottom",
        showarrow=False,
    )
    figure.update_xaxes(
        title=f"active experts per layer and step (of {result['E']})", rangemode="tozero"
    )
    figure.update_yaxes(LOGARITHMIC, title=BUDGETS[name])
    return Figure(
        "Every policy that the search measured, and the chosen one (star) on passages that it did "
        "not see. Only what lies below the dashed line keeps the budget.",
        figure,
    )


def _dots(points: list[dict[str, Any]], floor: float) -> dict[str, Any]:
    return {
        "x": [p["active"] for p in points],
        "y": [max(p["loss"], floor) for p in points],
        "customdata": [[_brief(p["policy"]), p["loss"], p["upper"]] for p in points],
        "hovertemplate": (
            "<b>%{customdata[0]}</b><br>%{x:.2f} active experts<br>"
            "loss %{customdata[1]:.3g}, at most %{customdata[2]:.3g}"
        ),
        "mode": "markers",
    }
