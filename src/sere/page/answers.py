"""`sere demo`, `sere evaluate --engine` and `--tasks`: what a model answers under each policy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from sere.page.parts import GREY, Column, Figure, Grid, Section, colour, plot, shares
from sere.page.sources import Source

_WRITTEN = {
    "name": Column("policy"),
    "active": Column("active experts", ".2f"),
    "exact_match": Column("exact match, %", ".2f", 100),
    "answers_lost": Column("answers lost, %", ".2f", 100),
    "answers_lost_gross": Column("lost, gross, %", ".2f", 100),
    "same_as_stock": Column("same as stock, %", ".2f", 100),
    "kept": Column("same up to, %", ".2f", 100),
    "length": Column("tokens written", ".2f"),
    "length_drift": Column("length drift in tokens, %", "+.2f", 100),
}
_RIGHT = [[0, "#e4572e"], [0.5, "#e9b44c"], [1, "#2f7f86"]]


def demo(source: Source, _others: Sequence[Source]) -> Iterable[Section]:
    """Right answers by kind of task, active experts by layer, speed."""
    result, arms = source.content, source.content["arms"]
    best = min(
        arms[1:], key=lambda arm: (arms[0]["exact_match"] - arm["exact_match"], _active(arm))
    )
    columns = [
        Column("policy"),
        Column("exact match, %", ".1f", 100),
        Column("active experts", ".2f"),
        Column("slots re-routed, %", ".1f", 100),
        Column("kept as critical, %", ".1f", 100),
        Column("decode tokens/s", ".0f"),
        Column("ratio to stock", ".2f"),
    ]
    rows = [
        [
            arm["name"],
            arm["exact_match"],
            _active(arm),
            arm["rerouted_fraction"],
            arm["critical_fraction"],
            arm["decode_tokens_per_s"],
            arm["speed_ratio_to_stock"],
        ]
        for arm in arms
    ]
    yield Section(
        "Right answers, by kind of task",
        source.name,
        f"{best['name']} answers {best['exact_match']:.1%} right (stock: "
        f"{arms[0]['exact_match']:.1%}) and reads {_active(best):.1f} experts per layer instead of "
        f"{_active(arms[0]):.1f}.",
        [_families(arms), _layers(arms, result["E"])],
        [Grid(f"{result['prompts']} prompts, batch {result['batch']}", columns, rows)],
    )


def _active(arm: dict[str, Any]) -> float:
    after = [pair[1] for pair in arm["active_by_layer"].values()]
    return float(sum(after) / len(after))


def _families(arms: list[dict[str, Any]]) -> Figure:
    families = list(arms[0]["exact_match_by_family"])
    right = [[arm["exact_match_by_family"][family] for arm in arms] for family in families]
    names = [arm["name"] for arm in arms]
    figure = shares(right, names, families, row=32, digits=1, colorscale=_RIGHT)
    figure.update_yaxes(automargin=True)
    return Figure(
        "Accuracy by kind of task",
        "Share of right answers: a row for every kind of task, a column for every policy.",
        figure,
    )


def _layers(arms: list[dict[str, Any]], E: int) -> Figure:
    figure = plot(height=360, hovermode="x unified", barmode="group")
    for number, arm in enumerate(arms):
        figure.add_bar(
            x=list(arm["active_by_layer"]),
            y=[pair[1] for pair in arm["active_by_layer"].values()],
            name=arm["name"],
            marker_color=colour(number - 1) if number else GREY,
            hovertemplate="%{y:.2f}",
        )
    figure.update_xaxes(title="MoE layer", type="category")
    figure.update_yaxes(title=f"active experts per step (of {E})")
    return Figure(
        "Active experts by layer",
        "Experts that a decode step reads, on average: what is shorter than stock's bar is saved.",
        figure,
    )


def generation(source: Source, _others: Sequence[Source]) -> Iterable[Section]:
    """What vLLM writes freely: right, the same as stock, longer or shorter."""
    result, arms = source.content, source.content["arms"]
    # Of the figures that an arm has: older results tell less of lost answers.
    columns = {name: column for name, column in _WRITTEN.items() if name in arms[0]}
    figure = plot(height=320, barmode="group")
    for number, (name, title) in enumerate(
        [("exact_match", "exact match"), ("same_as_stock", "same as stock")]
    ):
        figure.add_bar(
            x=[arm["name"] for arm in arms],
            y=[arm[name][0] for arm in arms],
            error_y={"type": "data", "array": [arm[name][1] for arm in arms], "thickness": 1},
            name=title,
            marker_color=colour(number + 1),
            hovertemplate="%{y:.2%}",
        )
    figure.update_yaxes(tickformat=".0%", rangemode="tozero")
    worst = min(arms, key=lambda arm: arm["same_as_stock"][0])
    yield Section(
        "What vLLM writes",
        source.name,
        f"Least like stock is {worst['name']}: {worst['same_as_stock'][0]:.1%} of its answers are "
        f"the same, {worst['exact_match'][0]:.1%} are right (stock: "
        f"{arms[0]['exact_match'][0]:.1%}).",
        [
            Figure(
                "Answers that are right, and the same as stock's",
                "Share of answers; bars: standard error. What differs from stock may be right.",
                figure,
            )
        ],
        [
            Grid(
                f"{result['prompts']} prompts, batch {result['batch']}; after ±: standard error",
                list(columns.values()),
                [[arm[name] for name in columns] for arm in arms],
            )
        ],
    )


def harness(source: Source, _others: Sequence[Source]) -> Iterable[Section]:
    """Tasks of lm-evaluation-harness: a row for each metric, a column for each policy."""
    result, arms = source.content, source.content["arms"]
    rows = [
        [task, metric.removesuffix(",none"), *(_metric(arm, task, metric) for arm in arms)]
        for task, metrics in arms[0]["metrics"].items()
        for metric in metrics
    ]
    prompts_alone = [task for task, decodes in arms[0]["decodes"].items() if not decodes]
    note = f" {', '.join(prompts_alone)} scores prompts, which are not re-routed."
    yield Section(
        "lm-evaluation-harness",
        source.name,
        _scores(arms) + (note if prompts_alone else ""),
        [],
        [
            Grid(
                f"{result['backend']}, batch {result['batch']}; after ±: standard error",
                [
                    Column("task"),
                    Column("metric"),
                    *(Column(str(arm["name"]), ".4f") for arm in arms),
                ],
                rows,
            )
        ],
    )


def _scores(arms: list[dict[str, Any]]) -> str:
    """Of the first metric: stock's, and the one furthest from it."""
    task, metrics = next(iter(arms[0]["metrics"].items()))
    metric, stock = next(iter(metrics.items()))
    name = f"{task}, {metric.removesuffix(',none')}"
    if len(arms) == 1:
        return f"{name}: {stock:.4f}."
    far = max(arms[1:], key=lambda arm: abs(arm["metrics"][task][metric] - stock))
    return (
        f"{name}: {stock:.4f} under stock, {far['metrics'][task][metric]:.4f} under {far['name']}."
    )


def _metric(arm: dict[str, Any], task: str, metric: str) -> tuple[float, float | None]:
    own = arm["errors"].get(task, {})
    error = own.get(metric, own.get(metric.split(",")[0]))  # by metric alone in older results
    return arm["metrics"][task][metric], error
