"""The goals that were set for an H100 (issue 19), beside what the committed results say."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

NOT_RUN = "not run"
Row = list[str]

ENGINE = {32: 8.7, 16: 6.8, 8: 5.9, 64: 12.6}  # ms a step of S=1
RATIOS = {32: 2.4, 16: 2.4, 8: 2.0, 64: 1.9}


def rows(operator: Mapping[str, Any], engine: Mapping[str, Any]) -> Iterator[Row]:
    """Goal, what was measured, verdict. operator: reroute_h100; engine: bench_h100_qwen3."""
    yield from _operator(operator["rows"])
    yield from _engine({each["batch"]: each["arms"] for each in engine["results"]})


def _operator(measured: list[Mapping[str, Any]]) -> Iterator[Row]:
    def most(E: int, K: int, fits: Callable[[int], bool]) -> float:
        return max(r["cuda"] for r in measured if (r["E"], r["K"]) == (E, K) and fits(r["T"]))

    for (E, K), words, fits, goal in (
        ((128, 8), "T <= 64", lambda T: T <= 64, 3.0),
        ((128, 8), "T = 512", lambda T: T == 512, 6.0),
        ((512, 10), "T <= 64", lambda T: T <= 64, 6.0),
    ):
        us = most(E, K, fits)
        yield [f"operator, ({E}, {K}), {words}: {goal:g} us", f"{us:.1f}", _verdict(us <= goal)]
    slower = [
        f"({r['E']}, {r['K']}) T={r['T']}: {r['cuda']:.1f} for {r['published']:.1f}"
        for r in measured
        if r["cuda"] > r["published"]
    ]
    told = "; ".join(slower) or "never"
    yield ["operator never slower than the published kernel", told, _verdict(not slower)]
    yield ["operator switched off: 1.3 us", "-", NOT_RUN]
    yield ["operator without FAST rows: 2 us", "-", NOT_RUN]


def _engine(arms: Mapping[int, list[Mapping[str, Any]]]) -> Iterator[Row]:
    def arm(batch: int, name: str) -> Mapping[str, Any]:
        return next(a for a in arms[batch] if a["name"] == name)

    for batch in sorted(ENGINE):
        one, ratio = arm(batch, "S=1"), RATIOS[batch]
        met = one["tpot_ms"] <= ENGINE[batch] and one["speedup"] >= ratio
        goal = f"S=1 at {batch} requests: {ENGINE[batch]:g} ms, {ratio:g}x"
        yield [goal, f"{one['tpot_ms']:.2f} ms, {one['speedup']:.2f}x", _verdict(met)]
    slowest = min((a["speedup"], b, a["name"]) for b in arms for a in arms[b])
    told = f"{slowest[0]:.2f}x at {slowest[1]} ({slowest[2]})"
    yield ["no batch size more than 1 % slower than stock", told, _verdict(slowest[0] >= 0.99)]
    alone = max((arm(1, n)["tpot_ms"] / arm(1, "stock")["tpot_ms"] - 1) for n in ("S=1", "S=2"))
    yield ["a request alone within 1 % of stock", f"{alone:+.1%}", _verdict(alone <= 0.01)]
    costs = [arm(b, "S=8")["tpot_ms"] / arm(b, "stock")["tpot_ms"] - 1 for b in arms if b >= 8]
    told = f"{min(costs):+.1%} to {max(costs):+.1%}, one engine"
    yield ["S=K within 0.5 % from 8 requests on, five pairs", told, _verdict(max(costs) <= 0.005)]


def _verdict(met: bool) -> str:
    return "met" if met else "not met"
