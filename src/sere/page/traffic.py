"""`vllm bench serve --save-result` and `sere bench --rate`: what clients of a server see.

vLLM writes a file for every run: all of one model make one section. Which of them is stock, and
what the others are, is told by `--label` or by `--metadata policy=...`; else by the file's name.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sere.page.parts import GREY, Column, Figure, Grid, Section, colour, panels
from sere.page.sources import Source

STOCK = "stock"
_COLUMNS = (
    Column("requests/s"),
    Column("at once, at most"),
    Column("policy"),
    Column("TPOT, ms", ".2f"),
    Column("TPOT, 99 %", ".2f"),
    Column("TTFT, ms", ".1f"),
    Column("TTFT, 99 %", ".1f"),
    Column("output tokens/s", ".1f"),
    Column("requests"),
    Column("failed"),
    Column("TPOT ratio", ".2f"),
    Column("file"),
)
_PANELS = (
    ("time per output token, ms", "tpot_ms", "%{y:.2f} ms"),
    ("time to first token, ms", "ttft_ms", "%{y:.1f} ms"),
    ("output tokens/s", "tokens_per_s", "%{y:.1f} tokens/s"),
)


@dataclass(frozen=True)
class Run:
    """One server under one load. rate: requests per second, None for all at once; at_once: how
    many may be under way, None for any number. Times in milliseconds: medians and 99 %."""

    name: str
    rate: float | None
    at_once: int | None
    tpot_ms: float
    ttft_ms: float
    tokens_per_s: float
    requests: int
    file: str
    tpot_p99_ms: float | None = None
    ttft_p99_ms: float | None = None
    failed: int | None = None

    @property
    def load(self) -> str:
        rate = "all at once" if self.rate is None else f"{self.rate:g}/s"
        return f"{rate}, {self.at_once} at most" if self.at_once else rate

    @property
    def tick(self) -> str:
        """The same, as short as an axis needs it."""
        rate = "inf" if self.rate is None else f"{self.rate:g}/s"
        return f"{rate}, ≤ {self.at_once}" if self.at_once else rate

    @property
    def order(self) -> tuple[float, float]:
        return self.rate or float("inf"), self.at_once or float("inf")


def served(source: Source, others: Sequence[Source]) -> Iterable[Section]:
    """All runs of one model, shown with the first of their files."""
    model = source.content["model_id"]
    files = [s for s in others if s.kind == "served" and s.content["model_id"] == model]
    if source is files[0]:
        runs = [_of_vllm(file) for file in files]
        tokens = [_lengths(file.content) for file in files]
        note = f"{' / '.join(dict.fromkeys(tokens))}, on average"
        yield _section(str(model), runs, note, [file.name for file in files])


def benched(source: Source, _others: Sequence[Source]) -> Iterable[Section]:
    """`sere bench --rate`: stock and every policy at each rate."""
    found = source.content
    runs = [
        Run(rate=each["rate"], at_once=None, requests=found["requests"], file=source.name, **arm)
        for each in found["server"]
        for arm in each["arms"]
    ]
    note = f"{found['load']['input_len']} tokens in, {found['load']['output_len']} out"
    yield _section(found["model"], runs, note, [source.name])


def _of_vllm(source: Source) -> Run:
    found = source.content
    rate = found["request_rate"]
    return Run(
        name=str(found.get("label") or found.get("policy") or Path(source.name).stem),
        rate=None if rate in ("inf", None) else float(rate),
        at_once=found.get("max_concurrency"),
        tpot_ms=found["median_tpot_ms"],
        tpot_p99_ms=found.get("p99_tpot_ms"),
        ttft_ms=found["median_ttft_ms"],
        ttft_p99_ms=found.get("p99_ttft_ms"),
        tokens_per_s=found["output_throughput"],
        requests=found["completed"],
        failed=found.get("failed"),
        file=source.name,
    )


def _lengths(found: dict[str, Any]) -> str:
    requests = max(found["completed"], 1)
    into, out = (found.get(f"total_{name}_tokens", 0) / requests for name in ("input", "output"))
    return f"{into:.0f} tokens in, {out:.0f} out"


def _section(model: str, runs: list[Run], note: str, files: list[str]) -> Section:
    runs = sorted(runs, key=lambda run: (run.order, run.name.lower() != STOCK, run.name))
    stock = {run.order: run.tpot_ms for run in runs if run.name.lower() == STOCK}
    rows = [
        [
            *("all at once" if run.rate is None else f"{run.rate:g}", run.at_once, run.name),
            *(run.tpot_ms, run.tpot_p99_ms, run.ttft_ms, run.ttft_p99_ms, run.tokens_per_s),
            *(run.requests, run.failed, _ratio(run, stock), run.file),
        ]
        for run in runs
    ]
    return Section(
        f"Under load, {model}",
        files[0],
        _finding(runs, stock),
        [_panels(runs)],
        [Grid(f"{note}. Medians; TPOT ratio: stock's at the same load to its own", _COLUMNS, rows)],
        files[1:],
    )


def _ratio(run: Run, stock: dict[tuple[float, float], float]) -> float | None:
    own = run.name.lower() == STOCK or run.order not in stock or not run.tpot_ms
    return None if own else stock[run.order] / run.tpot_ms


def _finding(runs: list[Run], stock: dict[tuple[float, float], float]) -> str:
    ratios = [(ratio, run) for run in runs if (ratio := _ratio(run, stock)) is not None]
    if ratios:
        ratio, best = max(ratios, key=lambda pair: pair[0])
        low, worst = min(ratios, key=lambda pair: pair[0])
        least = f" Least: {low:.2f}x at {worst.load} ({worst.name})." if low < ratio else ""
        return (
            f"{best.name} takes {best.tpot_ms:.1f} ms per token at {best.load} where stock takes "
            f"{stock[best.order]:.1f} ({ratio:.2f}x).{least}"
        )
    times = [run.tpot_ms for run in runs]
    hint = "" if stock else " No run is labelled stock: `vllm bench serve --label stock` does it."
    return f"{len(runs)} runs: {min(times):.1f} to {max(times):.1f} ms per output token.{hint}"


def _panels(runs: list[Run]) -> Figure:
    three = panels([title for title, _, _ in _PANELS], 0.07, height=380)
    names = list(dict.fromkeys(run.name for run in runs))
    names.sort(key=lambda name: name.lower() != STOCK)
    coloured = [name for name in names if name.lower() != STOCK]
    for name in names:
        own = [run for run in runs if run.name == name]
        shade = colour(coloured.index(name)) if name in coloured else GREY
        for column, (title, figure, hover) in enumerate(_PANELS, start=1):
            three.add_scatter(
                x=[run.tick for run in own],
                y=[getattr(run, figure) for run in own],
                mode="lines+markers",
                name=name,
                legendgroup=name,
                showlegend=column == 1,
                line={"color": shade},
                hovertemplate=f"<b>{name}</b>, %{{x}}<br>{title}: {hover}<extra></extra>",
                row=1,
                col=column,
            )
    ticks = list(dict.fromkeys(run.tick for run in runs))
    three.update_xaxes(
        title="requests sent (inf: all at once)",
        type="category",
        categoryorder="array",
        categoryarray=ticks,
    )
    three.update_yaxes(rangemode="tozero")
    return Figure(
        "Latency and throughput by rate of requests",
        "Medians of what clients saw. Lower is better on the left and in the middle, higher on the "
        "right; where requests come faster than they are answered, first tokens wait.",
        three,
    )
