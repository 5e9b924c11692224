"""What vLLM writes under each policy: fixed batches, every step counted, resumable."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from sere.engine_runs import generation
from sere.engine_runs.generation import Part, Written
from sere.evaluation import evaluate
from sere.serving.engine import Batch
from tests.engines import run_program

POLICIES = [
    '{"S": 1, "tau": 0.02, "name": "tolerant"}',
    '{"S": 1, "min_active": 1, "layers": {"1": {"S": 2}}, "batches": {"5": null}}',
]
NAMES = ["stock", "tolerant", "S=1 min_active=1 per layer by batch"]
SAMPLES, BATCH = 40, 8
# Stopped in its third batch, then started again; one engine for both.
SCRIPT = """
import functools, json, sys
from sere.engine_runs import generation

generation._engine = functools.cache(generation._engine)
decoded, calls = generation._decoded, []

def stopping(*arguments):
    calls.append(1)
    if len(calls) == 3:
        raise KeyboardInterrupt
    return decoded(*arguments)

generation._decoded = stopping
def run():
    generation.run(sys.argv[1], *sys.argv[2:4], **json.loads(sys.argv[4]))

try:
    run()
except KeyboardInterrupt:
    run()
print(f"calls: {len(calls)}")
"""


@pytest.fixture(scope="module")
def both(table_path: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, str]:
    """Arms of the engine and of the teacher-forced pass, on the same tasks; what was printed."""
    folder = tmp_path_factory.mktemp("generation")
    names = [str(table_path), str(folder / "engine.json")]
    flags = {"policies": POLICIES, "batch": BATCH, "samples": SAMPLES, "dtype": "float32"}
    # in one process is for the verb to see to
    variables = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    done = run_program(SCRIPT, "demo", *names, json.dumps(flags), env=variables)
    assert done.returncode == 0, done.stderr[-3000:]
    one_pass = evaluate.run(
        "demo",
        str(table_path),
        str(folder / "pass.json"),
        policies=POLICIES,
        batches=[BATCH],
        samples=SAMPLES,
    )
    engine = json.loads((folder / "engine.json").read_text())["arms"]
    return engine, [arm["batches"][str(BATCH)] for arm in one_pass["arms"]], done.stdout


def test_the_engine_reads_the_experts_that_one_pass_predicts(both: tuple[Any, Any, str]) -> None:
    engine, one_pass, _ = both
    assert [arm["name"] for arm in engine] == NAMES
    stock, tolerant, by_rows = engine
    assert stock["exact_match"][0] == tolerant["exact_match"][0] == 1  # the texts are the same
    for mine, predicted in zip((stock, tolerant), one_pass[:2], strict=True):
        assert mine["active"] == pytest.approx(predicted["active"], rel=2e-3)
    # it writes its own answers, where one pass reads the right ones
    value, error = one_pass[2]["active"]
    assert value == pytest.approx(by_rows["active"][0], abs=2 * error)
    assert tolerant["active"][0] < stock["active"][0] - 1


def test_steps_left_to_stock_are_counted(both: tuple[Any, Any, str]) -> None:
    """At most four rows are re-routed: most steps read what stock reads."""
    stock, _, by_rows = both[0]
    assert 0.7 < by_rows["active"][0] / stock["active"][0] < 1


def test_what_was_interrupted_resumes_after_its_last_whole_batch(
    both: tuple[Any, Any, str],
) -> None:
    assert f"calls: {SAMPLES // BATCH + 1}" in both[2]
    assert f"{SAMPLES} prompts" in both[2]


def test_lost_answers_net_and_gross() -> None:
    """One is lost, another found."""
    stock = Batch(["12", "9", "5"], [[1], [2], [3]], 3, 1.0)
    other = Batch(["0", "34", "5"], [[4], [5], [3]], 3, 1.0)
    arms = [Written(name, None) for name in ("stock", "S=1")]
    for arm, batch in zip(arms, (stock, other), strict=True):
        arm.parts.append(Part.of(["12", "34", "5"], batch, stock, (4, 2)))
    figures = arms[1].figures(arms[0])
    assert figures["answers_lost"][0] == 0
    assert figures["answers_lost_gross"][0] == pytest.approx(1 / 3)
    assert figures["same_as_stock"][0] == pytest.approx(1 / 3)


def test_answers_are_shown_where_stock_has_some_right() -> None:
    shown = {
        name: generation.as_text({"batch": 1, "prompts": 2, "arms": [arm]})
        for name, right in (("some", 0.5), ("none", 0.0))
        for arm in [{**_FIGURES, "exact_match": (right, 0.1)}]
    }
    assert "exact match" in shown["some"] and "answers lost" in shown["some"]
    assert "exact match" not in shown["none"] and "lost" not in shown["none"]
    assert "same as stock" in shown["none"]


_NAMES = ("active", "answers_lost", "answers_lost_gross", "same_as_stock", "length")
_FIGURES = {"name": "stock", "length_drift": 0.0, **dict.fromkeys(_NAMES, (0.0, 0.0))}
