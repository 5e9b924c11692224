"""`sere tune`: the front, the budget, the choice, and what to do at each batch size."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from sere.page.parts import GREY, LOGARITHMIC, Column, Figure, Grid, Section, colour, plot
from sere.page.sources import Source
from sere.policy import Policy
from sere.results.provenance import front
from sere.step_cost.cost import Cost

_COLUMNS = (
    Column("batch"),
    Column("read, stock", ".2f"),
    Column("read, chosen", ".2f"),
    Column("loss", ".3g"),
    Column("upper end", ".3g"),
    Column("within budget"),
    Column("predicted speed-up", ".2f"),
    Column("advice"),
    Column("policy"),
)
_ALONE = (
    Column("batch"),
    Column("by expected error"),
    Column("experts read", ".2f"),
    Column("by the paper's rule"),
    Column("experts read", ".2f"),
    Column("by maps"),
    Column("experts read", ".2f"),
)

_SYMBOLS = {
    "expected error": "circle",
    "the paper's rule": "triangle-up",
    "maps": "diamond",
    "experts and a pool": "square",
    "maps and a pool": "diamond-open",
}
_LOSSES = {
    "kl": "KL from stock, nats per token",
    "top1": "share of top tokens changed",
    "exact_match": "share of answers lost",
}
_CHECK = (
    Column("batch"),
    Column("active experts", ".2f"),
    Column("right, stock, %", ".2f", 100),
    Column("right, tuned, %", ".2f", 100),
    Column("answers lost, %", ".2f", 100),
    Column("same as stock, %", ".2f", 100),
    Column("within budget"),
)


def tuning(source: Source, _others: Sequence[Source]) -> Iterable[Section]:
    """One section; losses are those of passages that the search did not see."""
    yield _section(source.name, source.content)


def tuned(source: Source, _others: Sequence[Source]) -> Iterable[Section]:
    """benchmarks/tuned.py: the same, and what the engine then wrote."""
    rows = [
        [each["batch"], each["tuned"]["active"], each["stock"]["exact_match"]]
        + [each["tuned"][name] for name in ("exact_match", "answers_lost", "same_as_stock")]
        + [each["kept"]]
        for each in source.content["engine"]
    ]
    prompts = source.content["engine"][0]["prompts"]
    check = Grid(
        f"What vLLM then wrote under the chosen policy, {prompts} other prompts; after ±: "
        "standard error",
        _CHECK,
        rows,
    )
    section = _section(source.name, source.content["tuning"])
    yield replace(section, title=f"{section.title}, and checked", grids=[*section.grids, check])


def _section(source: str, result: dict[str, Any]) -> Section:
    name, limit = result["settings"]["budget"]["name"], result["settings"]["budget"]["limit"]
    cost, pairs = Cost(**result["cost"]), _pairs(result)
    return Section(
        "Tuned for a budget",
        source,
        _finding(result, name, limit),
        [_front(result, name, limit)],
        [
            Grid(
                f"On held-out passages; budget: {name} at most {limit:g}. The speed-up is "
                f"predicted, that of {cost.of}, {cost.source}.{_only(cost)}",
                _COLUMNS,
                [_row(result["policy"], held) for _, held in pairs],
            ),
            Grid(
                "What each rule could do at one batch size by itself, on the search's passages; -: "
                "nothing that keeps the budget and saves time",
                _ALONE,
                [
                    [own["batch"], *(x for found in _found(own) for x in _alone(found))]
                    for own, _ in pairs
                ],
            ),
        ],
    )


def _only(cost: Cost) -> str:
    return f" It and the advice hold on {cost.card} only, which was not there." if cost.card else ""


def _pairs(result: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    pairs = zip(result["by_batch"], result["held_out"], strict=True)
    return sorted(pairs, key=lambda pair: pair[0]["batch"])


def _row(policy: dict[str, Any] | None, held: dict[str, Any]) -> list[Any]:
    stock, chosen = held["stock"], held["chosen"]
    return [
        held["batch"],
        read(stock),
        read(chosen),
        chosen["loss"],
        chosen["upper"],
        held["kept"],
        stock["seconds"] / chosen["seconds"],
        "re-route" if held["enable"] else "leave stock",
        _at(policy, held["batch"]),
    ]


def _found(own: dict[str, Any]) -> list[dict[str, Any] | None]:
    """The best of each rule, and of maps, where there were any."""
    maps = [p for p in own.get("maps", {}).values() if p]
    return [own["error"], own["paper"], min(maps, key=lambda p: p["seconds"], default=None)]


def _alone(found: dict[str, Any] | None) -> tuple[str, float] | tuple[None, None]:
    return (_brief(found["policy"]), read(found)) if found else (None, None)


def _at(policy: dict[str, Any] | None, batch: int) -> str:
    """What the chosen policy does at a batch size."""
    chosen = Policy.from_dict(policy) if policy else None
    here = chosen.at(batch) if chosen else None
    return here.brief() if here else "stock"


def _brief(policy: dict[str, Any] | None) -> str:
    return Policy.from_dict(policy).brief() if policy else "stock"


def _finding(result: dict[str, Any], name: str, limit: float) -> str:
    if not result["policy"]:
        return f"Nothing keeps {name} within {limit:g} and saves time: leave stock routing."
    largest = max(result["held_out"], key=lambda held: held["batch"])
    chosen, stock = read(largest["chosen"]), read(largest["stock"])
    why = result.get("why")
    return (
        f"Chosen for {name} ≤ {limit:g}: {_brief(result['policy'])}. "
        f"Batch {largest['batch']} reads {chosen:.1f} experts per layer instead of {stock:.1f}."
        f"{f' Why: {why}.' if why else ''}"
    )


def _front(result: dict[str, Any], name: str, limit: float) -> Figure:
    figure = plot(hovermode="closest", height=440)
    losses = [p["loss"] for own in result["by_batch"] for p in own["points"]]
    floor = max(min((x for x in losses if x > 0), default=1e-6) / 2, 1e-7)
    kinds = {_kind(p) for own in result["by_batch"] for p in own["points"]}
    for number, (own, held) in enumerate(_pairs(result)):
        group = {"legendgroup": str(own["batch"])}
        figure.add_scatter(
            **_line(front([own["stock"], *own["points"]], _place), floor),
            **group,
            line={"shape": "hv", "dash": "dot", "width": 1.5, "color": colour(number)},
            name=f"batch {own['batch']}",
        )
        for kind, symbol in _SYMBOLS.items():
            if points := [p for p in own["points"] if _kind(p) == kind]:
                figure.add_scatter(
                    **_dots(sorted(points, key=read), floor),
                    **group,
                    marker={"color": colour(number), "symbol": symbol, "size": 8},
                    name=f"batch {own['batch']}, {kind}",
                    showlegend=False,
                )
        if result["policy"]:
            figure.add_scatter(
                **_dots([held["chosen"]], floor),
                **group,
                marker={"color": colour(number), "symbol": "star", "size": 15},
                name=f"batch {own['batch']}, chosen (held out)",
                showlegend=False,
            )
    for kind, symbol in _SYMBOLS.items():
        if kind in kinds:
            grey = {"color": GREY, "symbol": symbol, "size": 8}
            figure.add_scatter(x=[None], y=[None], mode="markers", marker=grey, name=kind)
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
        title=f"read per layer and step, in experts (of {result['E']})", rangemode="tozero"
    )
    figure.update_yaxes(LOGARITHMIC, title=_LOSSES[name])
    return Figure(
        "Loss against what is read, of all that the tuner tried",
        "Every policy that the search measured, and the chosen one (star) on passages that it did "
        "not see. A map counts as its share of an expert's bytes. Dotted: what no other policy "
        "beats in both. Only what lies below the dashed line keeps the budget.",
        figure,
    )


def read(point: dict[str, Any]) -> float:
    """In experts; earlier versions knew no maps, and recorded active experts alone."""
    return float(point.get("read", point["active"]))


def _place(point: dict[str, Any]) -> tuple[float, float]:
    return read(point), float(point["loss"])


def _kind(point: dict[str, Any]) -> str:
    policy = Policy.from_dict(point["policy"])
    who = "maps" if policy.frees else "the paper's rule" if policy.tau is None else "expected error"
    return who if policy.pool is None else f"{'maps' if policy.frees else 'experts'} and a pool"


def _line(points: list[dict[str, Any]], floor: float) -> dict[str, Any]:
    return {
        "x": [read(p) for p in points],
        "y": [max(p["loss"], floor) for p in points],
        "mode": "lines",
        "hoverinfo": "skip",
    }


def _dots(points: list[dict[str, Any]], floor: float) -> dict[str, Any]:
    return {
        "x": [read(p) for p in points],
        "y": [max(p["loss"], floor) for p in points],
        "customdata": [[_brief(p["policy"]), p["loss"], p["upper"]] for p in points],
        "hovertemplate": (
            "<b>%{customdata[0]}</b><br>reads %{x:.2f} experts<br>"
            "loss %{customdata[1]:.3g}, at most %{customdata[2]:.3g}"
        ),
        "mode": "markers",
    }
