"""What the demo found, as one table of two halves and one picture."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sere.policy import Policy
from sere.results import pictures, provenance
from sere.speed.result import restless
from sere.speed.shapes import shape_named

_WORDS = """\
experts read: distinct ones that a step loads, a mean over layers and steps. slot: one of the K
choices of a token. critical: nothing that is loaded comes close enough to take its place."""


def as_text(result: dict[str, Any]) -> str:
    """Quality and speed, a row for every policy or batch size."""
    return "\n".join(["QUALITY", *_quality(result), "", "SPEED", *_speed(result)])


def _quality(result: dict[str, Any]) -> list[str]:
    stock, *others = result["arms"]
    about = (
        f"the bundled model in vLLM: {result['prompts']} held-out tasks, {result['batch']} decoded "
        f"together, E={result['E']}, K={result['K']}"
    )

    def row(name: str, cell: Callable[[dict[str, Any]], str]) -> list[str]:
        return [name, *map(cell, result["arms"])]

    table = provenance.text_table(
        ["", *(arm["name"] for arm in result["arms"])],
        [
            row("experts read", lambda arm: f"{active(arm):.1f}"),
            row("right answers", lambda arm: f"{arm['exact_match']:.1%}"),
            row("of stock's, lost", lambda arm: "-" if arm is stock else _lost(arm)),
            row("slots re-routed", lambda arm: f"{arm['rerouted_fraction']:.1%}"),
            row("slots critical", lambda arm: f"{arm['critical_fraction']:.1%}"),
        ],
    )
    lines = [about, "", table, _WORDS]
    if rho := [arm["name"] for arm in others if "rho" in arm["name"]]:
        lines.append(
            f"{rho[0]}: the paper's threshold; half of this table's experts have no other that is "
            "so similar to them"
        )
    tuned = [arm for arm in others if arm["name"] == "tuned"]
    if tuned:
        words = Policy.from_dict(tuned[0]["policy"]).at(result["batch"])
        lines.append(
            f"tuned: what `sere tune --budget {result['budget']}` chose, at {result['batch']} rows "
            f"{words.brief() if words else 'stock'}"
        )
    else:
        lines.append(f"`sere tune --budget {result['budget']}` found nothing to recommend here")
    return lines


def _lost(arm: dict[str, Any]) -> str:
    lost = arm["answers_lost"]
    low, high = lost["interval_95"]
    share = lost["count"] / max(lost["of"], 1)
    return f"{share:.1%} ({low:.1%}-{high:.1%})"


def _speed(result: dict[str, Any]) -> list[str]:
    found = result["speed"]
    own = result["arms"][-1]
    low, high = own["speed_ratio_interval_95"]
    small = (
        f"(The bundled model fits into caches, where fewer experts save nothing: {own['name']} "
        f"decodes at {own['speed_ratio_to_stock']:.2f}x of stock, {low:.2f}-{high:.2f}.)"
    )
    if reason := found.get("not_measured"):
        return [f"not measured where memory is the limit: {reason}", small]
    rows = []
    for each in found["results"]:
        stock, *arms = each["arms"]
        experts = " / ".join(f"{arm['active_after']:.0f}" for arm in each["arms"])
        cells = [f"{arm['speedup']:.2f}x ({_spread(arm)})" for arm in arms]
        rows.append([str(each["batch"]), f"{stock['tpot_ms']:.1f}", *cells, experts])
    names = [arm["name"] for arm in found["results"][0]["arms"]]
    head = ["batch", "stock, ms a step", *(f"{name} to stock" for name in names[1:])]
    table = provenance.text_table([*head, f"experts read: {' / '.join(names)}"], rows)
    reads = share_read(result)
    busy = restless(found["results"])
    return [
        *([busy, ""] if busy else []),
        f"{_subject(found)}, {found['machine']}",
        "",
        table,
        f"In brackets 95 % intervals over {found['load']['rounds']} rounds. Experts alone make the "
        f"speed: above, {own['name']} read {reads:.0%} of stock's.",
        small,
    ]


def _spread(arm: dict[str, Any]) -> str:
    low, high = arm["speedup_interval_95"]
    return f"{low:.2f}-{high:.2f}"


def _subject(found: dict[str, Any]) -> str:
    if shape_named(found["model"]) is None:
        return f"{found['model']} in vLLM, {found['dtype']}"
    return (
        f"{found['layers']} of {found['of_layers']} layers of {found['model']}'s shape in vLLM, "
        f"random weights, {found['dtype']}, E={found['E']}, K={found['K']}"
    )


def active(arm: dict[str, Any]) -> float:
    """Experts read, a mean over layers."""
    return float(statistics.mean(after for _, after in arm["active_by_layer"].values()))


def share_read(result: dict[str, Any]) -> float:
    """The last policy's experts, as a share of stock's."""
    return active(result["arms"][-1]) / active(result["arms"][0])


def plot(result: dict[str, Any], path: Path) -> None:
    """Left: answers lost against experts read. Right: speed-up against batch size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    quality, speed = figure.subplots(1, 2)
    _plot_quality(quality, result)
    _plot_speed(speed, result["speed"])
    pictures.save(figure, path, dpi=120)


def _plot_quality(axes: Any, result: dict[str, Any]) -> None:
    for arm in result["arms"]:
        lost, own = arm["answers_lost"], arm["name"] == "tuned"
        share = 100 * lost["count"] / max(lost["of"], 1)
        low, high = (100 * end for end in lost["interval_95"])
        spread = [[share - low], [high - share]] if arm["policy"] else None
        style = {"fmt": "*", "markersize": 18, "color": "#2f7f86"} if own else {"fmt": "o"}
        colour = {} if own else {"color": "#e4572e" if arm["policy"] else "black"}
        axes.errorbar(active(arm), share, spread, capsize=3, **style, **colour)
        axes.annotate(
            arm["name"],
            (active(arm), high if spread else share),
            xytext=(0, 7),
            textcoords="offset points",
            ha="center",
            weight="bold" if own else None,
        )
    axes.set_title("quality: answers lost for experts not read")
    axes.set_xlabel(f"experts read per layer and step (of {result['E']})")
    axes.set_ylabel("of stock's right answers lost, %")
    axes.margins(0.15)
    axes.grid(alpha=0.3)


def _plot_speed(axes: Any, found: dict[str, Any]) -> None:
    axes.set_title("speed where memory is the limit")
    if reason := found.get("not_measured"):
        axes.text(0.5, 0.5, f"not measured:\n{reason[:60]}", ha="center", va="center", wrap=True)
        axes.set_axis_off()
        return
    if restless(found["results"]):
        axes.set_title("THE MACHINE WAS BUSY: measure again", color="#e4572e")
    batches = [each["batch"] for each in found["results"]]
    for number, first in enumerate(found["results"][0]["arms"][1:], start=1):
        arms = [each["arms"][number] for each in found["results"]]
        spread = [
            [abs(arm["speedup"] - arm["speedup_interval_95"][end]) for arm in arms]
            for end in (0, 1)
        ]
        heights = [arm["speedup"] for arm in arms]
        axes.errorbar(batches, heights, spread, fmt="o-", capsize=3, label=first["name"])
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [str(batch) for batch in batches])
    layers = f"{found['layers']} of {found['of_layers']} layers"
    axes.set_xlabel(f"requests decoded together ({found['model']}, {layers})")
    axes.set_ylabel("times as fast as stock")
    axes.set_ylim(bottom=0)
    axes.legend()
    axes.grid(alpha=0.3)
