"""lm-evaluation-harness and free generation, on local tasks: stock and re-routed side by side."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sere import demo_model
from sere.calibrate import calibrate
from sere.cli import main
from sere.generation import _agreeing, _is_right
from sere.tasks import examples

TASK = """
task: arithmetic_by_hand
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 48, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    pairs = [
        {"prompt": e.prompt, "answer": e.answer} for e in examples(24, seed=3, split="held_out")
    ]
    data = folder / "pairs.jsonl"
    data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (folder / "arithmetic.yaml").write_text(TASK.format(data=data))
    calibrate(demo_model.NAME, folder / "t.table", samples=64, progress=False)
    return folder


def test_a_task_of_ones_own_under_two_policies(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = folder / "tasks.json"
    flags = ["--tasks", "arithmetic_by_hand", "--task-folder", str(folder), "--backend", "hf"]
    flags += ["--policy", '{"S": 4}', "--policy", '{"S": 1, "min_active": 1}', "--batch", "8"]
    table = str(folder / "t.table")
    assert main(["evaluate", "demo", table, *flags, "-o", str(output)]) == 0
    stock, off, one = json.loads(output.read_text())["arms"]
    task = "arithmetic_by_hand"
    assert stock["metrics"][task]["exact_match,none"] == 1
    assert off["answers"] == stock["answers"] and off["slots_rerouted"] == 0
    assert one["slots_rerouted"] > 100
    printed = capsys.readouterr().out
    assert "length drift" in printed and "same answer as stock" in printed


def test_unknown_tasks_and_folders_are_named(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = ["evaluate", "demo", str(folder / "t.table"), "-o", str(folder / "x.json")]
    assert main([*start, "--tasks", "no_such_task"]) == 1
    assert "unknown tasks no_such_task" in capsys.readouterr().err
    assert main([*start, "--tasks", "x", "--task-folder", "/nowhere"]) == 1
    assert "/nowhere: no such folder" in capsys.readouterr().err


def test_the_engine_writes_and_is_compared(folder: Path) -> None:
    """In a process of its own, as a user starts it."""
    output = folder / "engine.json"
    flags = ["--engine", "--dtype", "float32", "--batch", "8", "--length", "32", "-o", str(output)]
    flags += ["--data", str(folder / "pairs.jsonl"), "--policy", '{"S": 4}']
    flags += ["--policy", '{"S": 1, "tau": 0.02}', "--policy", '{"S": 1, "min_active": 1}']
    command = [sys.executable, "-m", "sere", "evaluate", "demo", str(folder / "t.table"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "tokens written" in done.stdout
    arms: list[dict[str, Any]] = json.loads(output.read_text())["arms"]
    stock, off, tolerant, one = arms
    assert stock["exact_match"][0] == 1 and stock["same_as_stock"][0] == 1
    assert off["same_as_stock"][0] == 1 and off["length_drift"] == 0
    assert one["active"][0] < tolerant["active"][0] < off["active"][0]


def test_generation_without_answers_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("no pairs here")
    start = ["evaluate", "demo", str(folder / "t.table"), "--engine", "--data", str(text)]
    assert main([*start, "-o", str(tmp_path / "x.json")]) == 1
    assert '"prompt", "answer"' in capsys.readouterr().err


def test_what_counts_as_right_and_as_kept() -> None:
    assert _is_right("42\nadd 1+1:", "42") and not _is_right("421", "42")
    assert _agreeing([1, 2, 9, 4], [1, 2, 3, 4]) == 0.5
    assert (_agreeing([], [1]), _agreeing([1, 2], [1, 2])) == (0, 1)
