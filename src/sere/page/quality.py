"""`sere evaluate` and benchmarks/pareto.py: what is lost against how many experts are read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from sere import demo_model
from sere.page.parts import GREY, LOGARITHMIC, Column, Figure, Grid, Section, colour, panels
from sere.page.sources import Source
from sere.results.provenance import front

_COLUMNS = (
    Column("active experts", ".2f"),
    Column("KL, 0.001 nats", ".3f", 1000),
    Column("same top-1, %", ".2f", 100),
    Column("perplexity", ".4f"),
    Column("exact match, %", ".2f", 100),
)
_FIGURES = ("active", "kl", "top1", "perplexity", "exact_match")
_OURS = "expected error"
_FRONT: dict[str, Any] = {
    "mode": "lines",
    "line": {"shape": "hv", "dash": "dot", "width": 1, "color": GREY},
    "name": "Pareto front",
    "legendgroup": "front",
    "hoverinfo": "skip",
}


def sections(source: Source, others: Sequence[Source]) -> Iterable[Section]:
    """One section: a panel for each batch size, and all figures as a grid; against time as well
    where one of the `others` is a benchmark of the same model."""
    arms = source.content["arms"]
    sizes = list(arms[0]["batches"])
    names = [name for name in ("family", "name") if name in arms[0]]
    heads = [Column("batch"), *(Column({"name": "policy"}.get(name, name)) for name in names)]
    rows = [
        [int(size), *(_plain(arm[name]) for name in names)]
        + [arm["batches"][size][name] for name in _FIGURES]
        for size in sizes
        for arm in arms
    ]
    error = (
        "half of the 95 % interval over seeds" if "seeds" in source.content else "standard error"
    )
    yield Section(
        "Quality beside rival rules" if "family" in names else "Quality against active experts",
        source.name,
        _finding(arms, sizes[-1]),
        [_fronts(arms, sizes), *_against_time(source, others)],
        [Grid(f"Every policy beside stock; after ±: {error}", [*heads, *_COLUMNS], rows)],
    )


def _plain(name: str) -> str:
    """Without the braces and quotes of settings that serve as a name."""
    return name.strip("{}").replace("'", "")


def _named(arm: dict[str, Any]) -> str:
    """With its family, which says whose rule it is."""
    settings = [part for part in _plain(arm["name"]).split(", ") if not part.startswith("rival")]
    name = ", ".join(settings)
    return f"{arm['family']} ({name})" if "family" in arm else name


def _finding(arms: Sequence[dict[str, Any]], size: str) -> str:
    stock, *others = (arm["batches"][size] for arm in arms)
    near = [(found["active"][0], found) for found in others if found["top1"][0] >= 0.999]
    if not near:
        return f"Batch {size}: no policy keeps 99.9 % of the most likely next tokens."
    _, best = min(near, key=lambda pair: pair[0])
    name = next(_named(arm) for arm in arms if arm["batches"][size] is best)
    return (
        f"Batch {size}: {name} reads {best['active'][0]:.1f} experts per layer instead of "
        f"{stock['active'][0]:.1f} and keeps {best['top1'][0]:.2%} of the most likely next tokens."
    )


def _fronts(arms: Sequence[dict[str, Any]], sizes: Sequence[str]) -> Figure:
    families = list(dict.fromkeys(arm.get("family", arm["name"]) for arm in arms[1:]))
    if _OURS in families:  # drawn last, on top; first colour
        families.sort(key=lambda family: family != _OURS)
    by_size = panels([f"batch {size}" for size in sizes], 0.04, shared_y=True)
    floor = _floor(arms, sizes)
    for column, size in enumerate(sizes, start=1):
        found = [(arm, arm["batches"][size]) for arm in arms]
        points = [(f["active"][0], max(f["kl"][0], floor)) for _, f in found[1:]]
        x, y = zip(*front(points, tuple), strict=True)
        by_size.add_scatter(x=x, y=y, **_FRONT, showlegend=column == 1, row=1, col=column)
        for number, family in enumerate(families):
            own = [(a, f) for a, f in found[1:] if a.get("family", a["name"]) == family]
            own.sort(key=lambda pair: pair[1]["active"][0])
            by_size.add_scatter(
                x=[f["active"][0] for _, f in own],
                y=[max(f["kl"][0], floor) for _, f in own],
                customdata=[
                    [_plain(a["name"]), f["kl"][0], f["top1"][0], f["exact_match"][0]]
                    for a, f in own
                ],
                hovertemplate=(
                    "<b>%{customdata[0]}</b><br>%{x:.2f} active experts<br>"
                    "KL %{customdata[1]:.3g} nats<br>same top-1 %{customdata[2]:.2%}<br>"
                    "exact match %{customdata[3]:.2%}"
                ),
                mode="lines+markers",
                name=family,
                legendgroup=family,
                showlegend=column == 1,
                line={"color": colour(number), "width": 3 if family == _OURS else 1.2},
                marker={"size": 10 if family == _OURS else 7},
                row=1,
                col=column,
            )
        by_size.add_vline(
            found[0][1]["active"][0],
            line={"dash": "dash", "width": 1, "color": GREY},
            annotation={"text": "stock", "font": {"size": 11}},
            annotation_position="top left",
            row=1,
            col=column,
        )
    by_size.update_xaxes(title="active experts per layer and step", rangemode="tozero")
    by_size.update_yaxes(LOGARITHMIC)
    by_size.update_yaxes(title="KL from stock, nats per token", col=1)
    return Figure(
        "Pareto front: quality against active experts",
        "Further left: fewer experts are read. Further down: closer to stock. "
        "Dotted: what no other policy beats in both. Hover for the figures, click the legend to "
        "hide a kind.",
        by_size,
    )


def _against_time(source: Source, others: Sequence[Source]) -> Iterable[Figure]:
    """KL against measured time per token, of every policy that was both evaluated and timed."""
    arms = source.content["arms"]
    floor = _floor(arms, list(arms[0]["batches"]))
    model = source.content.get("settings", {}).get("model")
    for bench in (other for other in others if other.kind == "bench"):
        if model is None or _short(bench.content["model"]) != _short(model):
            continue
        found = {
            each["batch"]: list(_evaluated_and_timed(arms, each, str(each["batch"])))
            for each in bench.content["results"]
        }
        found = {batch: pairs for batch, pairs in found.items() if pairs}
        if found:
            yield Figure(
                "Pareto front: quality against time per token",
                f"The same loss against measured time, of the policies that {bench.name} has too. "
                "Further left: faster; dotted: what no other policy beats in both. Stock, which "
                "loses nothing, is at the bottom.",
                _timed_panels(found, floor),
            )


def _timed_panels(found: dict[int, list[tuple[float, dict[str, Any]]]], floor: float) -> go.Figure:
    titles = [f"batch {batch}" for batch in found]
    by_size = panels(titles, 0.04, shared_y=True, showlegend=False, margin_b=72)
    for column, (batch, pairs) in enumerate(found.items(), start=1):
        here: dict[str, Any] = {"row": 1, "col": column}
        points = [(timed["tpot_ms"], max(kl, floor)) for kl, timed in pairs]
        x, y = zip(*front(points, tuple), strict=True)
        by_size.add_scatter(x=x, y=y, **_FRONT, **here)
        by_size.add_scatter(
            x=[x for x, _ in points],
            y=[y for _, y in points],
            customdata=[[timed["name"], kl] for kl, timed in pairs],
            hovertemplate=(
                "<b>%{customdata[0]}</b><br>%{x:.2f} ms per token<br>KL %{customdata[1]:.3g} nats"
            ),
            text=[timed["name"] for _, timed in pairs],
            textposition=[("top center", "bottom center")[i % 2] for i in range(len(pairs))],
            mode="markers+text",
            name=f"batch {batch}",
            marker={"size": 9, "color": [_shade(timed, i) for i, (_, timed) in enumerate(pairs)]},
            cliponaxis=False,
            **here,
        )
        by_size.update_xaxes(range=_wide([x for x, _ in points]), **here)
    by_size.update_xaxes(title="time per output token, ms")
    by_size.update_yaxes(LOGARITHMIC)
    by_size.update_yaxes(title="KL from stock, nats per token", col=1)
    return by_size


def _shade(timed: dict[str, Any], number: int) -> str:
    return colour(number - 1) if timed["policy"] else GREY


def _wide(values: Sequence[float]) -> list[float]:
    """A range with room for labels beside the outermost points."""
    room = 0.35 * (max(values) - min(values)) or 0.1 * max(values)
    return [min(values) - room, max(values) + room]


def _evaluated_and_timed(
    arms: Sequence[dict[str, Any]], timed: dict[str, Any], size: str
) -> Iterable[tuple[float, dict[str, Any]]]:
    for own, other in product(arms, timed["arms"]):
        if size in own["batches"] and own.get("rule") == other["policy"]:
            yield own["batches"][size]["kl"][0], other


def _short(model: str) -> str:
    """A folder's or a hub model's own name."""
    return demo_model.PATH.name if model == demo_model.NAME else Path(model).name


def _floor(arms: Sequence[dict[str, Any]], sizes: Sequence[str]) -> float:
    """Where a loss of 0 is drawn on a logarithmic axis."""
    losses = [arm["batches"][size]["kl"][0] for arm in arms for size in sizes]
    return max(min((x for x in losses if x > 0), default=1e-6) / 2, 1e-7)
