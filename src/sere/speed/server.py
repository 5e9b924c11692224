"""`sere bench --serve`: what clients see. vLLM's own load generator against a stock server and
against one that re-routes, at given rates of requests.

The gate: answered one at a time under S=K, prompts get the tokens that the stock server gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from sere.policy import Policy
from sere.results import provenance
from sere.results.journal import Journal
from sere.serving.server import Server, serving

GATE_PROMPTS = 8


class GateError(RuntimeError):
    """The server that re-routes does not answer as stock does where it should."""


@dataclass(frozen=True)
class Traffic:
    """rates: requests per second, inf for all at once. Lengths in tokens."""

    rates: tuple[float, ...]
    requests: int
    input_len: int
    output_len: int
    seed: int = 0


def measure_server(
    folder: str,
    table: str,
    policies: Sequence[tuple[str, Policy]],
    traffic: Traffic,
    gate_prompts: Sequence[list[int]],
    options: dict[str, Any],
    journal: Journal,
    K: int,
) -> list[dict[str, Any]]:
    """By rate, the figures of stock and of every policy; what the journal holds is not repeated."""
    arms: list[tuple[str, Policy | None]] = [("stock", None), *policies]
    total = len(arms) * len(traffic.rates)
    with tqdm(total=total, desc="serve", unit="run") as progress:
        for here in (arms[:1], arms[1:]):
            names = [_piece(name, rate) for name, _ in here for rate in traffic.rates]
            if not all(journal.get(name) for name in names):
                rerouting = None if here is arms[:1] or here[0][1] is None else {"table": table}
                with serving(folder, options, rerouting) as server:
                    _check(server, gate_prompts, traffic.output_len, journal, K, bool(rerouting))
                    _drive(server, here, traffic, journal)
            progress.update(len(names))
    return [
        {"rate": rate, "arms": [{"name": n, **journal.get(_piece(n, rate))} for n, _ in arms]}
        for rate in traffic.rates
    ]


def _piece(name: str, rate: float) -> str:
    return f"{name} at {rate}/s"


def _check(
    server: Server,
    prompts: Sequence[list[int]],
    max_tokens: int,
    journal: Journal,
    K: int,
    rerouting: bool,
) -> None:
    if rerouting:
        server.set_policy(Policy(S=K))
    answers = [server.complete(prompt, max_tokens) for prompt in prompts]
    if not rerouting:
        journal.add("stock answers", answers)
    elif answers != journal.get("stock answers"):
        raise GateError("the server under S=K does not answer as stock: no speed is reported")


def _drive(
    server: Server,
    arms: Sequence[tuple[str, Policy | None]],
    traffic: Traffic,
    journal: Journal,
) -> None:
    lengths = {"input_len": traffic.input_len, "output_len": traffic.output_len}
    for rate in traffic.rates:
        for name, policy in arms:
            if journal.get(_piece(name, rate)) is None:
                if policy is not None:
                    server.set_policy(policy)
                load = {"requests": traffic.requests, "seed": traffic.seed, "warm": GATE_PROMPTS}
                journal.add(_piece(name, rate), server.drive(rate=rate, **load, **lengths))


def as_text(rates: Sequence[dict[str, Any]]) -> str:
    """A row for every policy and rate."""
    rows: list[list[str]] = []
    for found in rates:
        rows += [[]] if rows else []
        stock = found["arms"][0]
        for arm in found["arms"]:
            rows.append(
                [
                    f"{found['rate']:g}",
                    arm["name"],
                    f"{arm['tpot_ms']:.2f}",
                    f"{arm['ttft_ms']:.1f} / {arm['ttft_p99_ms']:.1f}",
                    f"{arm['tokens_per_s']:.1f}",
                    "-" if arm is stock else f"{stock['tpot_ms'] / arm['tpot_ms']:.2f}x",
                ]
            )
    head = ["requests/s", "policy", "TPOT ms", "TTFT ms (median / p99)", "tokens/s", "TPOT ratio"]
    return provenance.text_table(head, rows)
