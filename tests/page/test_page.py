"""`sere report`: what is on the page, told by a real browser, is what the results say."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from hashlib import sha256
from html import escape
from itertools import product
from pathlib import Path
from typing import Any

import pytest

import sere.page
from sere.calibration.calibrate import calibrate
from sere.cli import main
from sere.evaluation import evaluate
from sere.page.advice import tuning
from sere.page.sources import Source
from sere.page.speed import sections
from sere.policy import Policy
from sere.results.provenance import front
from sere.step_cost.cost import Cost
from sere.table import Table
from sere.tuning import tune
from tests.page.page_results import (
    FIGURES,
    HARNESS,
    bench,
    generation,
    pareto,
    served,
    served_by_sere,
)
from tools.browser import browser

ROOT = Path(__file__).parents[2]
RUNS = {
    "h1.json": served("stock", 10.0),
    "h2.json": served("S=1", 10.0, median_tpot_ms=1.9),
    "h3.json": served(None, "inf", policy="S=1", max_concurrency=8, failed=2),
    "h4.json": served(None, "inf"),
}
COMMITTED = ("calibration_trust.json", "composition.json", "tuned.json", "first_report.json")
RULES = ['{"S": 1, "min_active": 1}', '{"S": 1, "tau": 0.05, "min_active": 1}']


@pytest.fixture(scope="module")
def results(model_dir: Path, corpus_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one result of every kind, made by the code that makes them, and strangers."""
    folder = tmp_path_factory.mktemp("results")
    model, table = str(model_dir), str(folder / "experts.table")
    texts = tmp_path_factory.mktemp("texts") / "texts.txt"  # no two begin alike
    texts.write_text("\n\n".join(f"{i:02} {'quick brown fox jumps'[i % 9 :]}" for i in range(20)))
    text: dict[str, Any] = {"data": str(texts), "samples": 20, "prompt": 2, "length": 10}
    calibrate(model, table, data=corpus_file, samples=20, length=64, progress=False)
    evaluate.run(model, table, str(folder / "a.json"), policies=RULES, batches=[1, 4], **text)
    cost = Cost(b=1.0, a=0.0, source="reading alone")
    output = str(folder / "b.json")
    tune.run(model, table, budget="kl=0.01", output=output, cost=cost, batches=[1, 4], **text)
    found = json.loads((folder / "a.json").read_text())
    (folder / "c.json").write_text(json.dumps({"arms": pareto(found), "seeds": [{}, {}]}))
    (folder / "d.json").write_bytes((ROOT / "benchmarks/results/demo.json").read_bytes())
    (folder / "e.json").write_text(json.dumps(generation()))
    (folder / "f.json").write_text(json.dumps(HARNESS))
    (folder / "g.json").write_text(json.dumps(bench(model, RULES)))
    for name, run in RUNS.items():
        (folder / name).write_text(json.dumps(run))
    (folder / "l.json").write_text(json.dumps(served_by_sere()))
    for name in COMMITTED:
        (folder / name).write_bytes((ROOT / "benchmarks/results" / name).read_bytes())
    (report,) = load(folder, "first_report.json")["reports"][:1]
    (folder / "m.report.json").write_text(json.dumps(report))
    (folder / "t.json.unfinished").write_text('{"a": 1}')
    (folder / "earlier.html").write_text("<html></html>")
    (folder / "half.json").write_text('{"arms": [')
    (folder / "list.json").write_text("[1, 2]")
    (folder / "old.json").write_text('{"by_batch": [], "held_out": [], "policy": null}')
    (folder / "weights.safetensors").write_bytes((model_dir / "model.safetensors").read_bytes())
    os.mkfifo(folder / "pipe.json")
    (folder / "loop.json").symlink_to("loop.json")
    assert list(folder.glob("*.png"))  # beside what they show: known, not named
    return folder


@pytest.fixture(scope="module")
def page(results: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    assert main(["report", str(results), "-o", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def data(page: Path) -> dict[str, Any]:
    (text,) = re.findall(
        r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), flags=re.S
    )
    found: dict[str, Any] = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    return found


def load(results: Path, name: str) -> Any:
    return json.loads((results / name).read_text(), parse_constant=lambda _: None)


def section(data: dict[str, Any], source: str) -> dict[str, Any]:
    (found,) = [section for section in data["sections"] if section["source"] == source]
    return found


# --- what the page says, against the files ----------------------------------------------------


def test_every_result_is_shown_and_every_other_file_named_with_the_reason(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], data: dict[str, Any]
) -> None:
    assert main(["report", str(results), "-o", str(tmp_path / "r.html")]) == 0
    out, error = capsys.readouterr()
    kinds = {source["name"]: source["kind"] for source in data["sources"]}
    assert kinds == {
        "a.json": "evaluation",
        "b.json": "tuning",
        "c.json": "evaluation",
        "d.json": "demo",
        "e.json": "generation",
        "f.json": "harness",
        "g.json": "bench",
        "l.json": "server",
        "experts.table": "table",
        **dict.fromkeys(RUNS, "served"),
        "calibration_trust.json": "trust",
        "composition.json": "composition",
        "tuned.json": "tuned",
        "first_report.json": "started",
        "m.report.json": "started",
    }
    lines = error.splitlines()
    for name, reason in (
        ("half.json", "cannot be read as JSON"),
        ("pipe.json", "no regular file"),
        ("loop.json", "Too many levels of symbolic links"),
        ("list.json", "not a result that this page has a figure for"),
        ("old.json", "looks like a result of kind 'tuning', but is incomplete"),
        ("weights.safetensors", "not a sere table"),
        ("t.json.unfinished", "the command that made it goes on"),
    ):
        assert reason in data["unknown"][name]
        assert (
            sum(line.startswith(f"not shown: {name}: ") and reason in line for line in lines) == 1
        )
    assert len(lines) == len(data["unknown"]) == 7
    assert all(name in out for name in kinds)


def test_each_result_has_its_provenance(results: Path, data: dict[str, Any]) -> None:
    for source in data["sources"]:
        assert source["sha256"] == sha256((results / source["name"]).read_bytes()).hexdigest()
        if source["kind"] == "served":
            assert source["provenance"]["date"] == "2026-11-24T04:19:50"
        elif source["name"] == "m.report.json":
            assert source["provenance"]["date"] == load(results, source["name"])["when"]
        elif source["name"].endswith(".json"):
            assert source["provenance"] == load(results, source["name"]).get("provenance", {})
    shown = [name for section in data["sections"] for name in section["sources"]]
    assert sorted(shown) == sorted(source["name"] for source in data["sources"])
    titles = [section["title"] for section in data["sections"]]
    assert len(set(titles)) == len(titles)
    for part in data["sections"]:
        assert all(figure["title"] and figure["caption"] for figure in part["figures"])


@pytest.mark.parametrize("name", ["a.json", "c.json"])
def test_quality_is_the_evaluations(name: str, results: Path, data: dict[str, Any]) -> None:
    arms, shown = load(results, name)["arms"], section(data, name)
    rows = [
        [int(size), arm["name"], *(arm["batches"][size][figure] for figure in FIGURES)]
        for size in arms[0]["batches"]
        for arm in arms
    ]
    (grid,) = shown["grids"]
    family = [column["title"] for column in grid["columns"]].index("policy") - 1
    assert [row[:1] + row[1 + family :] for row in grid["rows"]] == [
        [row[0], row[1].strip("{}").replace("'", ""), *row[2:]] for row in rows
    ]
    drawn = [
        (x, custom[1])
        for trace in shown["figures"][0]["data"]
        for x, custom in zip(trace["x"], trace.get("customdata", []), strict=False)
    ]
    assert sorted(drawn) == sorted((row[2][0], row[3][0]) for row in rows if row[1] != "stock")


def test_speed_is_the_benchmarks_beside_its_roofline(results: Path, data: dict[str, Any]) -> None:
    found, shown = load(results, "g.json")["results"], section(data, "g.json")
    rows = iter(shown["grids"][0]["rows"])
    for each in found:
        for arm in each["arms"]:
            row = next(rows)
            assert row[:4] == [each["batch"], arm["name"], arm["tpot_ms"], arm["tokens_per_s"]]
            if arm["policy"]:
                ends = arm["speedup_interval_95"]
                assert row[7:] == [arm["speedup"], *ends, arm["predicted_speedup"]]
    drawn = {(trace["name"], tuple(trace["y"])) for trace in shown["figures"][0]["data"]}
    for i, arm in list(enumerate(found[0]["arms"]))[1:]:
        for name, figure in (
            (arm["name"], "speedup"),
            (arm["name"] + ", roofline", "predicted_ms"),
        ):
            assert (name, tuple(each["arms"][i][figure] for each in found)) in drawn


def test_a_bound_that_was_beaten_is_not_shown(results: Path) -> None:
    result = load(results, "g.json")
    result["results"][0]["arms"][0]["tpot_ms_by_round"][1] = 0.01
    (shown,) = sections(Source("g.json", "", "bench", result), [])
    (grid,), (figure,) = shown.grids, shown.figures
    assert "Predicted: nothing, as at batch" in grid.caption and "roofline" not in shown.finding
    assert all(row[6] is None and row[10] is None for row in grid.rows)
    assert not [trace.name for trace in figure.plot.data if "roofline" in trace.name]


def test_quality_against_time_where_the_same_model_was_timed(
    results: Path, data: dict[str, Any]
) -> None:
    timed = {each["batch"]: each["arms"] for each in load(results, "g.json")["results"]}
    _, against_time = section(data, "a.json")["figures"]
    arms = load(results, "a.json")["arms"]
    drawn = [trace for trace in against_time["data"] if "customdata" in trace]
    assert len(drawn) == 2
    for trace in drawn:
        size = int(trace["name"].removeprefix("batch "))
        drawn = {(x, kl) for x, (_, kl) in zip(trace["x"], trace["customdata"], strict=True)}
        losses = [arm["batches"][str(size)]["kl"][0] for arm in arms]
        assert drawn == set(zip([arm["tpot_ms"] for arm in timed[size]], losses, strict=True))
    assert len(section(data, "c.json")["figures"]) == 1  # of which model is not known


def test_advice_is_the_tuners(results: Path, data: dict[str, Any]) -> None:
    result, shown = load(results, "b.json"), section(data, "b.json")
    for held, row in zip(result["held_out"], shown["grids"][0]["rows"], strict=True):
        assert row[:6] == [
            *(held["batch"], held["stock"]["active"], held["chosen"]["active"]),
            *(held["chosen"]["loss"], held["chosen"]["upper"], held["kept"]),
        ]
        assert row[7] == ("re-route" if held["enable"] else "leave stock")
    points = [p["active"] for own in result["by_batch"] for p in own["points"]]
    points += [held["chosen"]["active"] for held in result["held_out"] if result["policy"]]
    traces = shown["figures"][0]["data"]
    drawn = [x for trace in traces if trace["mode"] == "markers" for x in trace["x"]]
    assert sorted(x for x in drawn if x is not None) == sorted(points)
    for own, trace in zip(result["by_batch"], lines(traces), strict=True):
        kept = front([own["stock"], *own["points"]], lambda p: (p["read"], p["loss"]))
        assert trace["x"] == [p["read"] for p in kept]
    assert result["why"] in shown["finding"]


def lines(traces: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [trace for trace in traces if trace["mode"] == "lines"]


def test_pools_and_maps_are_points_of_their_own_on_one_front(results: Path) -> None:
    found = load(results, "tuned.json")["tuning"]  # of before there were any
    own = found["by_batch"][2]

    def point(read: float, **settings: Any) -> dict[str, Any]:
        policy = Policy(**{"S": 1, "tau": 0.1, **settings}).to_dict()
        mine = {"policy": policy, "active": read - 0.5, "read": read, "loss": 1e-4}
        return {**own["points"][0], **mine}

    pool, maps = point(1.5, S=0, pool=0.5), point(2.5, fill="linear", rank=8)
    both = point(3.5, pool=0.5, fill="constant")
    own["points"] += [pool, maps, both]
    own["maps"] = {"linear 8": maps}
    (section,) = tuning(Source("t.json", "", "tuning", found), [])
    traces = section.figures[0].spec()["data"]
    places = {
        (trace["marker"]["symbol"], x)
        for trace in traces
        if trace["mode"] == "markers"
        for x in trace["x"]
        if x in (1.5, 2.5, 3.5)
    }
    assert places == {("square", 1.5), ("diamond", 2.5), ("diamond-open", 3.5)}
    assert lines(traces)[2]["x"][0] == 1.5  # the pool beats the two others
    legend = {trace["name"] for trace in traces if trace.get("showlegend") is not False}
    assert {"experts and a pool", "maps", "maps and a pool", "expected error"} <= legend
    assert section.grids[1].rows[2][5:] == [Policy.from_dict(maps["policy"]).brief(), 2.5]


def test_runs_of_vllm_bench_serve_are_shown_together(data: dict[str, Any]) -> None:
    shown = section(data, "h1.json")
    assert shown["sources"] == list(RUNS)
    named = {"h1.json": "stock", "h2.json": "S=1", "h3.json": "S=1", "h4.json": "h4"}
    rates = {"h1.json": "10", "h2.json": "10", "h3.json": "all at once", "h4.json": "all at once"}
    ratios = {"h2.json": 2.66 / 1.9}
    (grid,) = shown["grids"]
    assert [row[-1] for row in grid["rows"]] == list(RUNS)  # by load, stock first
    for row in grid["rows"]:
        run, file = RUNS[row[-1]], row[-1]
        assert row == [
            *(rates[file], run["max_concurrency"], named[file]),
            *(run["median_tpot_ms"], run["p99_tpot_ms"]),
            *(run["median_ttft_ms"], run["p99_ttft_ms"], run["output_throughput"]),
            *(run["completed"], run["failed"], ratios.get(file), file),
        ]
    assert "S=1 takes 1.9 ms per token at 10/s where stock takes 2.7 (1.40x)" in shown["finding"]
    drawn = {
        (trace["name"], x, y)
        for trace in shown["figures"][0]["data"]
        for x, y in zip(trace["x"], trace["y"], strict=True)
    }
    assert {("stock", "10/s", 2.66), ("stock", "10/s", 9.51), ("stock", "10/s", 315.21)} <= drawn
    assert ("S=1", "inf, ≤ 8", 2.66) in drawn


def test_a_server_under_sere_bench_is_shown_by_rate(data: dict[str, Any]) -> None:
    shown = section(data, "l.json")
    rows = [(row[0], row[2], row[3], row[10]) for row in shown["grids"][0]["rows"]]
    assert rows == [
        *(("4", "stock", 4.0, None), ("4", "S=1", 2.5, 1.6)),
        *(("all at once", "stock", 12.0, None), ("all at once", "S=1", 7.5, 1.6)),
    ]


def test_company_trust_and_the_checked_choice_are_the_files(
    results: Path, data: dict[str, Any]
) -> None:
    arms = load(results, "composition.json")["arms"]
    (grid,) = section(data, "composition.json")["grids"]
    wanted = [
        [int(size), arm["name"]]
        + [arm["sizes"][size][n] for n in ("differs_by_company", "differs_from_alone", "right")]
        for size in arms[0]["sizes"]
        for arm in arms
    ]
    assert grid["rows"] == wanted
    shown, trust = section(data, "calibration_trust.json"), load(results, "calibration_trust.json")
    heat = shown["figures"][0]["data"][0]
    for (i, pair), (j, method) in product(enumerate(heat["y"]), enumerate(heat["x"])):
        assert heat["z"][i][j] == trust["agreement"][method][pair]["same_replacement"]
    for row in shown["grids"][0]["rows"]:
        figures = [trust["stability"][method][row[0]] for method in heat["x"]]
        assert row[1:] == [f[name] for f in figures for name in ("foretold", "seen")]
    found = load(results, "tuned.json")
    *tuning, check = section(data, "tuned.json")["grids"]
    assert [row[0] for row in tuning[0]["rows"]] == [1, 8, 32]
    for row, each in zip(check["rows"], found["engine"], strict=True):
        right, lost = each["tuned"]["exact_match"], each["tuned"]["answers_lost"]
        assert row[0] == each["batch"] and row[3:5] == [right, lost]


def test_answers_are_those_of_demo_and_generation(results: Path, data: dict[str, Any]) -> None:
    arms, shown = load(results, "d.json")["arms"], section(data, "d.json")
    heat = shown["figures"][0]["data"][0]
    for (i, family), (j, arm) in product(enumerate(heat["y"]), enumerate(arms)):
        assert heat["z"][i][j] == arm["exact_match_by_family"][family]
    assert [row[1] for row in shown["grids"][0]["rows"]] == [arm["exact_match"] for arm in arms]
    for row, arm in zip(
        section(data, "e.json")["grids"][0]["rows"], load(results, "e.json")["arms"], strict=True
    ):
        names = ["active", "exact_match", "answers_lost", "answers_lost_gross"]
        names += ["same_as_stock", "kept", "length", "length_drift"]
        assert row == [arm["name"], *(arm[name] for name in names)]
    (row,) = section(data, "f.json")["grids"][0]["rows"]
    assert row == ["sums", "exact_match", [0.97, 0.01], [0.9612345, 0.01]]


def test_heatmaps_are_the_tables(results: Path, data: dict[str, Any]) -> None:
    table = Table.load(results / "experts.table")
    (figure,) = section(data, "experts.table")["figures"]
    for frame, layer in zip(figure["frames"], table.layers.values(), strict=True):
        similarity, load = frame["traces"]
        assert similarity["z"] == [[round(x, 3) for x in row] for row in layer.similarity.tolist()]
        assert load["y"] == pytest.approx(layer.load.tolist(), abs=1e-5)


def test_the_front_against_all_pairs() -> None:
    points = [(x % 7, (x * x) % 11) for x in range(20)]
    undominated = {
        p for p in points if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)
    }
    assert front(points, tuple) == sorted(undominated)


def test_a_folder_without_results_is_an_error_that_names_what_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    assert main(["report", str(tmp_path), "-o", str(tmp_path / "r.html")]) == 1
    assert main(["report", str(tmp_path / "absent"), "-o", str(tmp_path / "r.html")]) == 1
    empty, absent = capsys.readouterr().err.splitlines()
    assert "no results of `sere calibrate`" in empty and "notes.txt: neither JSON" in empty
    assert "absent is no folder" in absent
    assert not (tmp_path / "r.html").exists()


def test_without_plotly_it_says_what_to_install(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sere, "page", sere.page)  # an import of another one would stay there
    for name in [name for name in sys.modules if name.startswith(("sere.page", "plotly"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "plotly", None)
    assert main(["report", str(results)]) == 1
    assert "pip install '.[report]' in a clone of sere" in capsys.readouterr().err


def test_what_a_verb_warned_of_stands_with_its_figures(data: dict[str, Any], page: Path) -> None:
    """Random weights cannot read, and five batches have hardly an error."""
    told = section(data, "a.json")["caveats"]
    assert any("CANNOT READ THIS TEXT" in line for line in told)
    assert any("+- is hardly known" in line for line in told)
    assert any("few batches in each half" in line for line in section(data, "b.json")["caveats"])
    for line in told:
        assert page.read_text().count(f'<p class="finding caveat">{escape(line)}</p>') == 1


def test_a_start_tells_what_its_policy_does(results: Path, data: dict[str, Any]) -> None:
    """All figures of the log are in the grid, and its words are the finding."""
    shown = section(data, "first_report.json")
    reports = load(results, "first_report.json")["reports"]
    assert shown["finding"] == f"{reports[0]['policy']}: {'. '.join(reports[0]['verdict'])}"
    (grid,) = shown["grids"]
    assert len(grid["rows"]) == 6
    policy, requests, before, after, *_, speed, kl, loss, same = grid["rows"][4]
    (size,) = (s for s in reports[1]["sizes"] if s["requests"] == requests)
    assert (policy, before, after, same) == ("S=1", size["before"], size["after"], size["same"])
    assert speed == size["speed"][1]
    for (value, _), name in ((kl, "kl"), (loss, "loss")):
        assert value == pytest.approx(sum(size[name]) / len(size[name]))
    assert section(data, "m.report.json")["grids"][0]["rows"] == grid["rows"][:3]


# --- what a browser makes of it ---------------------------------------------------------------


class Reader:
    """A browser with the page open; `complaints` are errors and whatever asked for the network."""

    def __init__(self, chromium: Any, page: Path, **options: Any) -> None:
        self.complaints: list[str] = []
        options = {"viewport": {"width": 1200, "height": 900}, **options}
        self.tab = chromium.new_page(**options)
        self.tab.on("console", lambda message: self.complaints.append(message.text))
        self.tab.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.tab.on("request", self._note)
        self.tab.goto(page.as_uri())
        self.tab.wait_for_function("document.querySelectorAll('.plot .main-svg').length > 0")

    def _note(self, request: Any) -> None:
        if not request.url.startswith(("file:", "data:", "blob:")):
            self.complaints.append(request.url)

    def style(self, selector: str, name: str) -> str:
        found: str = self.tab.eval_on_selector(
            selector, f"element => getComputedStyle(element).{name}"
        )
        return found

    def drawn(self, plot: str) -> list[dict[str, Any]]:
        """The traces that plotly.js has drawn."""
        found: list[dict[str, Any]] = self.tab.eval_on_selector(
            plot, "element => element.data.map(({x, y, z, name}) => ({x, y, z, name}))"
        )
        return found


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    path = browser()
    if path is None:
        pytest.skip("no Chromium on the PATH: install it, e.g. `apt-get install chromium`")
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=path)
        yield running
        running.close()


@pytest.fixture
def read(chromium: Any, page: Path) -> Iterator[Callable[..., Reader]]:
    opened: list[Reader] = []

    def open_page(**options: Any) -> Reader:
        opened.append(Reader(chromium, page, **options))
        return opened[-1]

    yield open_page
    for reader in opened:
        assert reader.complaints == []
        reader.tab.close()


def formatted(value: Any, column: dict[str, Any]) -> str:
    """A cell, by the rules that the page's own JSON states."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return ("no", "yes")[value]
    if isinstance(value, list):
        unsigned = {**column, "format": column["format"].removeprefix("+")}
        texts = [formatted(value[0], column), formatted(value[1], unsigned)]
        return texts[0] if value[1] is None else " ± ".join(texts)
    if isinstance(value, str) or not column["format"]:
        return str(value)
    return format(value * column["factor"], column["format"])


def test_it_renders_without_errors_and_shows_the_numbers(
    read: Callable[..., Reader], page: Path, data: dict[str, Any]
) -> None:
    tab = (reader := read()).tab
    assert page.stat().st_size < 3e6  # 4.8e6 of plotly.js are packed in it
    for s, part in enumerate(data["sections"], start=1):
        for f, figure in enumerate(part["figures"], start=1):
            plot = f"#s{s}f{f}"
            for trace, live in zip(figure["data"], reader.drawn(plot), strict=True):
                assert {k: v for k, v in live.items() if v is not None} == {
                    k: trace[k] for k in ("x", "y", "z", "name") if k in trace
                }
            assert tab.locator(f"{plot} .plotly .trace, {plot} .plotly .hm").count() > 0
            box = tab.locator(f"{plot} .main-svg").first.bounding_box()
            assert box["width"] > 600 and box["height"] > 200
        for g, grid in enumerate(part["grids"]):
            cells = tab.locator(f"#s{s} details").nth(g).locator("tbody td").all_text_contents()
            wanted = [
                formatted(value, column)
                for row in grid["rows"]
                for value, column in zip(row, grid["columns"], strict=True)
            ]
            assert cells == wanted
        assert part["finding"] in tab.locator(f"#s{s} .finding").first.inner_text()
    for source in data["sources"]:
        assert source["sha256"] in tab.locator("#provenance").inner_text()
    for name, reason in data["unknown"].items():
        assert f"{name}: {reason}" in tab.locator(".unknown").inner_text()


def test_the_slider_moves_the_heatmap(
    read: Callable[..., Reader], results: Path, data: dict[str, Any]
) -> None:
    reader = read()
    number = 1 + [part["source"] for part in data["sections"]].index("experts.table")
    plot = f"#s{number}f1"
    picture = f"{plot} .hm image"
    slider = reader.tab.locator(f"#s{number} input[type=range]")
    before = reader.tab.locator(picture).get_attribute("href")
    slider.focus()
    reader.tab.keyboard.press("ArrowRight")
    layers = list(Table.load(results / "experts.table").layers.values())
    assert reader.tab.locator(f"#s{number} output").inner_text() == "layer 1"
    assert reader.drawn(plot)[0]["z"] == [
        [round(x, 3) for x in row] for row in layers[1].similarity.tolist()
    ]
    after = reader.tab.locator(picture).get_attribute("href")
    assert before and after and before != after
    reader.tab.keyboard.press("ArrowLeft")
    assert reader.tab.locator(picture).get_attribute("href") == before


def lightness(colour: str) -> float:
    return sum(map(float, re.findall(r"[\d.]+", colour)[:3])) / (3 * 255)


def test_dark_mode_changes_page_and_figures_at_once(read: Callable[..., Reader]) -> None:
    reader = read(color_scheme="light")
    text = "#s1f1 .xtick text"
    assert lightness(reader.style("body", "backgroundColor")) > 0.95
    assert lightness(reader.style(text, "fill")) < 0.3
    reader.tab.emulate_media(color_scheme="dark")
    reader.tab.wait_for_timeout(200)
    assert lightness(reader.style("body", "backgroundColor")) < 0.2
    assert lightness(reader.style(text, "fill")) > 0.7


def test_print_is_dark_on_white_fits_the_paper_and_hides_nothing(
    read: Callable[..., Reader], tmp_path: Path
) -> None:
    reader = read(color_scheme="dark")
    reader.tab.evaluate(
        """addEventListener('beforeprint', () => {
            const plots = [...document.querySelectorAll('.plot')];
            window.widths = plots.map((div) => div._fullLayout.width);
            window.open_ = [...document.querySelectorAll('details')].every((d) => d.open);
        })"""
    )
    reader.tab.pdf(path=tmp_path / "page.pdf", format="A4")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
    assert reader.tab.evaluate("window.open_") is True
    assert max(reader.tab.evaluate("window.widths")) <= 700
    reader.tab.emulate_media(media="print", color_scheme="dark")
    reader.tab.wait_for_timeout(200)
    assert lightness(reader.style("body", "color")) < 0.3
    assert lightness(reader.style("#s1f1 .xtick text", "fill")) < 0.3
    assert not reader.tab.locator("input[type=range]").first.is_visible()


def test_on_a_telephone_the_page_fits_and_wide_plots_are_scrolled_within_it(
    read: Callable[..., Reader], data: dict[str, Any]
) -> None:
    tab = read(viewport={"width": 420, "height": 900}).tab
    assert tab.evaluate("document.documentElement.scrollWidth") <= 420
    number = 1 + [part["source"] for part in data["sections"]].index("g.json")
    width = tab.locator(f"#s{number}f1 .main-svg").first.bounding_box()["width"]
    assert width > 600  # two plots side by side


def test_names_in_results_are_text_not_markup(read: Callable[..., Reader]) -> None:
    reader = read()
    assert reader.tab.locator("main b").count() == 0
    assert reader.tab.get_by_text("</script><b>S=1</b>").count() > 0
