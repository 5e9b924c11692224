"""The GPU benchmark's plan: valid commands, the most telling first, nothing run twice."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from benchmarks import bench_decode
from benchmarks.bench_decode import STEPS, layers_that_fit, main
from sere.cli import parser
from sere.speed.setup import contenders_of
from sere.speed.shapes import shape_named


def planned(capsys: pytest.CaptureFixture[str], *flags: str) -> list[str]:
    assert main(["--dry-run", *flags]) == 0
    return capsys.readouterr().out.splitlines()


def test_the_plan_is_made_of_valid_commands(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    lines = planned(capsys, "--memory", "80")
    assert len(lines) == len(STEPS)
    for line in lines:
        program, *words = shlex.split(line)
        given = parser().parse_args(words)
        shape = shape_named(given.model)
        assert program == "sere" and shape is not None
        shape.cut(given.layers).table(0).save(tmp_path / "table")
        contenders_of(given.policies, tmp_path / "table")
    first = parser().parse_args(shlex.split(lines[0])[1:])
    assert (first.model, first.layers) == ("qwen3-30b-a3b", None)
    assert first.batches == [1, 4, 8, 16, 32, 64, 128, 256]


def test_layers_fit_the_card() -> None:
    assert layers_that_fit("qwen3-30b-a3b", 80) is None
    # 128 experts of 3 x 2880 x 2880 parameters are 6.4 GB a layer in bfloat16.
    assert layers_that_fit("gpt-oss-120b", 80) == 10
    assert layers_that_fit("deepseek-v3", 20) == 0


def test_what_is_done_is_not_repeated(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run: list[list[str]] = []

    class Done:
        returncode = 0

    monkeypatch.setattr(bench_decode.subprocess, "run", lambda words: run.append(words) or Done())
    (tmp_path / f"{STEPS[0].name}.json").write_text("{}")
    assert main(["-o", str(tmp_path)]) == 0
    assert len(run) == len(STEPS) - 1
    Done.returncode = 1
    assert main(["-o", str(tmp_path)]) == 1
    assert f"failed: {STEPS[1].name}" in capsys.readouterr().err
