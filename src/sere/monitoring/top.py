"""`sere top`: what re-routing does in a running server, live in the terminal."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import fields
from typing import Any, NoReturn

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from sere.monitoring.scrape import LayerView, ScrapeError, View, policy_in_words, read, view

_ACTIVE = len("  12.3 ->   12.3")
_BAR = 24  # characters
_WIDE = 110  # characters of a terminal that has room for bars


def show(url: str, console: Console | None = None) -> None:
    """One picture of all that happened since the server started."""
    console = console or Console()
    console.print(picture(url, view(read(url)), wide=console.width >= _WIDE))


def follow(url: str, interval: float, console: Console | None = None) -> None:
    """A picture every `interval` seconds until Ctrl-C; at first of all since the server started.

    A server that does not answer any more, as when it is restarted, is waited for. Raises
    `ScrapeError` if it never did.
    """
    console = console or Console()
    if not console.is_terminal:
        with suppress(KeyboardInterrupt):
            _log(url, interval, console)
        return
    seen, before = view(now := read(url)), now
    trouble: str | None = None
    with suppress(KeyboardInterrupt), _screen(console) as screen:
        while True:
            wide = screen.console.width >= _WIDE
            screen.update(picture(url, seen, wide=wide, trouble=trouble), refresh=True)
            time.sleep(interval)
            try:
                now, trouble = read(url), None
            except ScrapeError as error:
                trouble = str(error)
                continue
            seen, before = view(now, before), now


def _log(url: str, interval: float, console: Console) -> NoReturn:
    """The same into a pipe or a file: one picture below the other."""
    before = None
    while True:
        seen, before = view(now := read(url), before), now
        console.print(picture(url, seen, wide=console.width >= _WIDE), Text())
        time.sleep(interval)


def _screen(console: Console) -> Live:
    return Live(console=console, screen=True, auto_refresh=False)


def picture(
    url: str, seen: View, *, wide: bool = True, trouble: str | None = None
) -> RenderableType:
    """What one reading shows; all layers together come first, as a terminal may be short.

    trouble: why there is no later reading.
    """
    several = len(seen.policies) > 1
    table = Table(box=None, padding=(0, 2 if wide else 1, 0, 0), header_style="dim")
    table.add_column("layer", no_wrap=True, min_width=5)
    table.add_column("active experts", no_wrap=True, min_width=_ACTIVE)
    if wide:
        table.add_column("", no_wrap=True)
    for name in (
        "re-routed",
        "critical",
        "rows\nfast",
        "rows\nexact",
        "weight\nmoved",
        "output\nerror",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    for row in (_all(seen.layers), *seen.layers):
        style = "bold" if row.layer < 0 else ""
        layer, active, *figures = _cells(row, several)
        bar = [_bar(row)] if wide else []
        table.add_row(layer, active, *bar, *figures, style=style)
    notice = [] if trouble is None else [Text(f"figures are old: {trouble}", style="bold yellow")]
    return Group(*_head(url, seen), *notice, Text(), table, *_foot(seen))


def _head(url: str, seen: View) -> list[Text]:
    span = f"last {seen.seconds:.1f} s" if seen.seconds else "since start"
    lines = [
        Text.assemble(("sere top", "bold"), f"  {url}  ({span})"),
        Text(_load(seen)),
    ]
    if seen.restarted:
        lines.append(
            Text("the server was restarted: figures are of what came after", "bold yellow")
        )
    for engine, policy in seen.policies.items():
        idle = ", NOTHING IS RE-ROUTED" if engine in seen.idle else ""
        lines.append(
            Text.assemble(f"engine {engine}: {policy_in_words(policy)}", (idle, "bold yellow"))
        )
    for engine, steps in seen.left.items():
        text = f"engine {engine}: {steps:,} steps more are of sizes that its policy leaves to stock"
        lines.append(Text(f"{text}; figures are of the others", style="yellow"))
    for engine, count in seen.switches.items():
        times = "once" if count == 1 else f"{count} times"
        text = f"engine {engine} was switched {times} in that time: figures are of all its policies"
        lines.append(Text(text, style="bold yellow"))
    for engine, reason in seen.fallbacks.items():
        text = f"engine {engine} FELL BACK TO STOCK ROUTING: {reason}"
        lines.append(Text(text, style="bold red"))
    for engine, steps in seen.unclassified.items():
        text = f"engine {engine}: {steps:,} steps left to stock routing as sere failed: see its log"
        lines.append(Text(text, style="bold red"))
    if seen.stale:
        lines.append(Text("the engine does not answer: figures are old", style="bold yellow"))
    return lines


def _foot(seen: View) -> list[Text]:
    """What columns mean that would be taken for something else, or for nothing."""
    lines = ["rows exact: prompts' and those of requests that ask for it"]
    if not seen.checked:
        lines.append('weight moved, output error: of the shadow check, which "shadow" starts')
    return [Text(line, style="dim") for line in lines]


def _load(seen: View) -> str:
    speed, running = "tokens/s unknown", "requests running unknown"
    if seen.tokens_per_s is not None:
        speed = f"{seen.tokens_per_s:,.0f} tokens/s"
    if seen.running is not None:
        running = f"{seen.running:.0f} requests running"
    return f"{speed}   {running}" if seen.seconds else running


def _all(layers: list[LayerView]) -> LayerView:
    """Means over layers, of what each of them has; layer -1. Every layer sees the same rows."""

    def mean(name: str) -> Any:
        values = [v for layer in layers if (v := getattr(layer, name)) is not None]
        return sum(values) / len(values) if values else None

    means = {field.name: mean(field.name) for field in fields(LayerView)}
    return LayerView(**{**means, "engine": -1, "layer": -1})


def _cells(row: LayerView, several: bool) -> list[str]:
    name = "all" if row.layer < 0 else str(row.layer)
    if several and row.layer >= 0:
        name = f"{row.engine}/{name}"
    active = "-"
    if row.active_before is not None and row.active_after is not None:
        active = f"{row.active_before:6.1f} -> {row.active_after:6.1f}"
    shares = [_percent(row.rerouted), _percent(row.critical)]
    rows = ["-" if count is None else f"{count:,.0f}" for count in (row.fast, row.exact)]
    checked = [_percent(row.surrendered), _percent(row.error)]
    return [name, active, *shares, *rows, *checked]


def _bar(row: LayerView) -> Text:
    """The experts that are read, and after them those that need not be."""
    if not row.active_before or row.active_after is None:
        return Text("")
    full = min(_BAR, round(_BAR * row.active_after / row.active_before))
    return Text.assemble(("\u2588" * full, "green"), ("\u2591" * (_BAR - full), "dim"))


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"
