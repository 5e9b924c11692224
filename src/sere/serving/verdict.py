"""What a report on speed and quality (see `first_report`) comes to, in words."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from sere.text.unread import unread

_WORTH = 1.05  # times stock's speed: less is nothing to speak of
_WHY = (
    "reading experts is not what takes this engine's time (a small model, which fits into caches, "
    "or launches that no graph holds), or this policy reads nearly as many as stock"
)


def mean(values: Sequence[float]) -> tuple[float, float]:
    """And its standard error."""
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


def in_words(report: Mapping[str, Any]) -> list[str]:
    """What is gained, and what is lost, one line each."""
    sizes = report["sizes"]
    nats = mean(sizes[-1]["stock_loss"])[0]
    return [
        f"speed gained: {_by_size(sizes, _speed)}",
        f"perplexity (stock's is {_rounded(math.exp(nats))}): {_by_size(sizes, _perplexity)}",
    ]


def warnings(report: Mapping[str, Any]) -> list[str]:
    """What a user has to know before any of its figures."""
    sizes = report["sizes"]
    said = []
    best = max(sizes, key=lambda size: size["speed"][1])
    if not any(map(_is_faster, sizes)):
        slower = all(size["speed"][2] < 1 for size in sizes)
        what = "RE-ROUTING MAKES DECODING SLOWER HERE" if slower else "NO SPEED IS GAINED HERE"
        said.append(f"{what}, {best['speed'][1]:.2f}x at best: {_WHY}")
    nats = mean(sizes[-1]["stock_loss"])[0]
    return [*said, *filter(None, [unread(nats, sizes[-1]["vocabulary"])])]


def _by_size(sizes: Iterable[Mapping[str, Any]], say: Callable[[Mapping[str, Any]], str]) -> str:
    return "; ".join(f"{say(size)} at {size['requests']} requests" for size in sizes)


def _is_faster(size: Mapping[str, Any]) -> bool:
    low, middle, _ = size["speed"]
    return bool(low > 1 and middle >= _WORTH)


def _speed(size: Mapping[str, Any]) -> str:
    low, middle, high = size["speed"]
    if _is_faster(size):
        return f"{middle:.2f}x"
    return f"slower, {middle:.2f}x," if high < 1 else f"none to speak of ({low:.2f}-{high:.2f})"


def _perplexity(size: Mapping[str, Any]) -> str:
    """Two standard errors around: outside of that a change is not taken for one."""
    lost, error = mean(size["loss"])
    if abs(lost) <= 2 * error:
        return f"no change told from chance (±{_change(2 * error)})"
    low, middle, high = (f"{math.expm1(lost + n * error):+.1%}" for n in (-2, 0, 2))
    return f"{middle} ({low} to {high})"


def _change(nats: float) -> str:
    return f"{math.expm1(nats):.1%}"


def _rounded(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"
