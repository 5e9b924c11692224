"""What `sere bench` found: medians and spread beside the roofline, as JSON, text and a plot."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any

from sere.results import pictures, provenance
from sere.results.journal import Journal
from sere.serving.expert_kernels import difference
from sere.speed import server
from sere.speed.setup import Contender, Load, Subject
from sere.speed.shapes import shape_named
from sere.step_cost.reached import in_words, reached, too_little
from sere.step_cost.roofline import Roofline, beaten, unbound

_ROUNDS = 5  # with fewer not even all of their range is such an interval
_RESTLESS = 1.5  # times: the third quartile over the first; idle CPUs have up to 1.4, GPUs 1.01


def summary(
    contenders: Sequence[Contender], load: Load, journal: Journal, served: Subject
) -> dict[str, Any]:
    """Roofline and, for every batch size, every contender's figures."""
    machine = journal.get("machine")
    context = load.input_len + load.output_len // 2
    bound = Roofline(
        served.sizes,
        served.itemsize,
        machine["bandwidth"],
        kv_bytes=machine["kv_bytes"] * context,
    )
    return {
        "kernels": journal.get("kernels"),
        "roofline": {**asdict(bound), "text": str(bound)},
        "results": [
            {
                "batch": batch,
                "gate": "S=K wrote the same tokens as stock",
                "tokens_as_without_plugin": journal.get(f"{batch}/as stock"),
                "arms": _arms(contenders, load, journal, batch, bound),
            }
            for batch in load.batches
        ],
    }


def _arms(
    contenders: Sequence[Contender],
    load: Load,
    journal: Journal,
    batch: int,
    bound: Roofline,
) -> list[dict[str, Any]]:
    rounds = [journal.get(f"{batch}/{turn}") for turn in range(load.rounds)]
    exact = journal.get(f"{batch}/gate")
    stock_times = [found["stock"]["tpot_ms"] for found in rounds]
    arms: list[dict[str, Any]] = []
    for contender in contenders:
        own = [found[contender.name] for found in rounds]
        times = [one["tpot_ms"] for one in own]
        by_layer = _mean([one["active"] for one in own]) if contender.policy else exact
        before, after = (statistics.mean(pair[i] for pair in by_layer.values()) for i in (0, 1))
        ratios = [stock / mine for stock, mine in zip(stock_times, times, strict=True)]
        predicted = 1e3 * bound.seconds(after, batch)
        median = statistics.median(times)
        stock_predicted = arms[0]["predicted_ms"] if arms else predicted
        arms.append(
            {
                "name": contender.name,
                "policy": contender.policy.to_dict() if contender.policy else None,
                "tpot_ms": median,
                "tpot_ms_quartiles": quartiles(times),
                "tpot_ms_by_round": times,
                "tokens_per_s": 1e3 * batch / median,
                "active_before": before,
                "active_after": after,
                "active_by_layer": by_layer,
                "predicted_ms": predicted,
                "speedup": statistics.median(ratios),
                "speedup_interval_95": interval(ratios),
                "predicted_speedup": stock_predicted / predicted,
            }
        )
    return arms


def _mean(rounds: Sequence[dict[str, list[float]]]) -> dict[str, list[float]]:
    """[before, after] of every layer, a mean over rounds."""
    return {
        index: [statistics.mean(one[index][i] for one in rounds) for i in (0, 1)]
        for index in rounds[0]
    }


def quartiles(values: Sequence[float]) -> list[float]:
    """The first and the third."""
    if len(values) < 2:
        return [values[0], values[0]]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return [first, third]


def interval(values: Sequence[float], draws: int = 2000) -> list[float]:
    """95 % bootstrap interval of the median; of fewer values than make one, their range."""
    if len(values) < _ROUNDS:
        return [min(values), max(values)]
    random = Random(0)
    medians = sorted(statistics.median(random.choices(values, k=len(values))) for _ in range(draws))
    return [medians[draws // 40], medians[-draws // 40]]


def as_text(result: dict[str, Any]) -> str:
    """What was served, then a row for every policy and batch size (or rate of requests)."""
    load, graphs = result["load"], "CUDA graphs" if result["graphs"] else "eager"
    what = f"{result['model']}, {result['dtype']}, {graphs}"
    random = shape_named(result["model"]) is not None
    if random:
        what += f"; random weights, {result['layers']} of {result['of_layers']} layers"
    if result["layers"] != result["of_layers"]:
        what += f", vocabulary cut to {result['vocabulary']}"
    lines = [what, f"{load['input_len']} tokens in, {load['output_len']} out"]
    if random:
        skew = result["skew"]
        lines[1] += (
            f"; E={result['E']}, K={result['K']}; the busiest expert takes "
            f"{skew['reached']:.1%} of the choices ({skew['wanted']:.1%} wanted)"
        )
    if "server" in result:
        gate = "gate: one at a time, S=K answered as the stock server did"
        return "\n".join([*lines, gate, "", server.as_text(result["server"])])
    lines += [
        *_stock(result),
        f"{load['rounds']} rounds; {_bound(result)}",
        "gate: S=K wrote the same tokens as stock at every batch size",
        "",
        table(result["results"]),
    ]
    for reason in _unsure(result["results"]):
        lines += ["", reason]
    if beaten(result["results"]) is None:
        found = reached(result)
        lines += ["", in_words(found), *filter(None, [too_little(found)])]
    return "\n".join(lines)


def caveats(result: dict[str, Any]) -> list[str]:
    """What a reader of its ratios has to know."""
    if "results" not in result:
        return []
    little = None if beaten(result["results"]) else too_little(reached(result))
    return [*_unsure(result["results"]), *filter(None, [little])]


def _unsure(results: Sequence[dict[str, Any]]) -> list[str]:
    """Why its ratios, or their intervals, are not to be trusted."""
    return [*filter(None, (restless(results), _few_rounds(results)))]


def _few_rounds(results: Sequence[dict[str, Any]]) -> str | None:
    rounds = min(len(arm["tpot_ms_by_round"]) for found in results for arm in found["arms"])
    if rounds >= _ROUNDS:
        return None
    if rounds == 1:
        return "ONE ROUND tells nothing of how far another would be off: --rounds 5 or more"
    return (
        f"{rounds} rounds are too few for a 95 % interval: in brackets is their range, which holds "
        f"the median in {1 - 2 ** (1 - rounds):.0%} of such runs; --rounds {_ROUNDS} or more"
    )


def restless(results: Sequence[dict[str, Any]]) -> str | None:
    """Why no ratio is to be trusted: rounds of one thing that took unequally long; or None."""
    arms = [(found["batch"], arm) for found in results for arm in found["arms"]]
    batch, worst = max(arms, key=lambda pair: _unrest(pair[1]))
    if _unrest(worst) < _RESTLESS:
        return None
    low, high = worst["tpot_ms_quartiles"]
    return (
        f"THE MACHINE WAS BUSY: rounds of the same ({worst['name']}, batch {batch}) took {low:.1f} "
        f"to {high:.1f} ms in the middle half of them, so that other programs ran beside: no ratio "
        "here is to be trusted; measure again when nothing else runs"
    )


def _unrest(arm: dict[str, Any]) -> float:
    low, high = arm["tpot_ms_quartiles"]
    return float(high / low)


def _stock(result: dict[str, Any]) -> list[str]:
    """What stock is; results of older versions do not say it."""
    kernels = result.get("kernels")
    lines = [f"expert kernel {', '.join(kernels['serving'])}"] if kernels else []
    if kernels and (other := difference(kernels["serving"], kernels["stock"])):
        lines.append(other)
    if result.get("against") == "stock":
        lines.append("stock: an engine without the plug-in; a round is a pair of processes")
        differ = [
            str(found["batch"])
            for found in result["results"]
            if found["tokens_as_without_plugin"] is False
        ]
        as_stock = f"not at batch {', '.join(differ)}" if differ else "at every batch size"
        lines.append(f'"off" wrote the same tokens as stock: {as_stock}')
    return lines


def _bound(result: dict[str, Any]) -> str:
    """What is predicted, and what that leaves out; or why nothing is."""
    if reason := beaten(result["results"]):
        return f"nothing is predicted: {reason}"
    text = f"predicted: {result['roofline']['text']}, and nothing else"
    far = unbound(result["results"])
    return f"{text};\n{far}" if far else text


def table(results: Sequence[dict[str, Any]]) -> str:
    """A row for every policy and batch size; without the prediction where it was beaten."""
    bound = beaten(results) is None
    head = ["batch", "policy", "TPOT ms (quartiles)", "tokens/s", "active experts"]
    speed = f"speed-up ({'range' if _few_rounds(results) else '95 %'})"
    head += ["predicted ms", speed, "predicted"] if bound else [speed]
    rows: list[list[str]] = []
    for found in _ascending(results):
        rows += [[]] if rows else []
        for arm in found["arms"]:
            low, high = arm["tpot_ms_quartiles"]
            least, most = arm["speedup_interval_95"]
            stock = arm is found["arms"][0]
            predicted = "-" if stock else f"{arm['predicted_speedup']:.2f}x"
            rows.append(
                [
                    str(found["batch"]),
                    arm["name"],
                    f"{arm['tpot_ms']:.2f} ({low:.2f}-{high:.2f})",
                    f"{arm['tokens_per_s']:.1f}",
                    f"{arm['active_before']:.1f} -> {arm['active_after']:.1f}",
                    *([f"{arm['predicted_ms']:.2f}"] if bound else []),
                    "-" if stock else f"{arm['speedup']:.2f}x ({least:.2f}-{most:.2f})",
                    *([predicted] if bound else []),
                ]
            )
    return provenance.text_table(head, rows)


def _ascending(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(results, key=lambda found: int(found["batch"]))


def plot(result: dict[str, Any], path: Path) -> None:
    """Left: speed-up against batch size. Right: time of a step. Dotted: predicted, if it holds."""
    from matplotlib.figure import Figure

    bound = beaten(result["results"]) is None
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    speed, time = figure.subplots(1, 2)
    results = _ascending(result["results"])
    batches = [found["batch"] for found in results]
    for i, first in enumerate(results[0]["arms"]):
        arms = [found["arms"][i] for found in results]
        color = f"C{i}"
        times = [arm["tpot_ms"] for arm in arms]
        time.plot(batches, times, "o-", color=color, label=first["name"])
        if bound:
            time.plot(batches, [arm["predicted_ms"] for arm in arms], ":", color=color)
        if i == 0:
            continue
        median = [arm["speedup"] for arm in arms]
        spread = [
            [abs(arm["speedup"] - arm["speedup_interval_95"][end]) for arm in arms]
            for end in (0, 1)
        ]
        speed.errorbar(batches, median, spread, fmt="o-", color=color, label=first["name"])
        if bound:
            speed.plot(batches, [arm["predicted_speedup"] for arm in arms], ":", color=color)
    speed.axhline(1, color="black", linewidth=0.8)
    dotted = " (dotted: predicted)" if bound else ""
    speed.set_ylabel(f"speed-up over stock{dotted}")
    time.set_ylabel(f"time per output token, ms{dotted}")
    for axes in (speed, time):
        axes.set_xscale("log", base=2)
        axes.set_xticks(batches, [str(batch) for batch in batches])
        axes.set_xlabel("requests decoded together")
        axes.grid(alpha=0.3)
        axes.legend()
    pictures.save(figure, path)
