"""The checks for GPUs, as far as they run without one: on the CPU's own implementation, and how one
that fails, hangs or dies is told."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sere.kernels import implementations

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import gpu_checks
import one_by_one

CHECKS = f"""
import os, sys, time
sys.path.insert(0, {str(Path(one_by_one.__file__).parent)!r})
import one_by_one

def passes(): return "fine"
def fails(): assert False, "wrong"
def is_not_there(): import no_such_library
def hangs(): time.sleep(600)
def dies(): os._exit(3)
def also_passes(): print("in between"); return "fine"

one_by_one.serve(globals(), sys.argv[1:])
"""


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def usable() -> Iterator[tuple[str, implementations.Implementation]]:
        yield "numba", implementations.load("numba")

    monkeypatch.setattr(gpu_checks, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_checks, "_usable", usable)


@pytest.mark.usefixtures("on_cpu")
def test_checks_of_the_operator_run() -> None:
    small = [*gpu_checks._batches((0, 3, 32), ((8, 2), (128, 8)))]
    assert "equal" in gpu_checks.operator_equals_specification(small)
    assert "equal" in gpu_checks.ranks_that_vote_together_agree(small)
    assert "equal" in gpu_checks.no_row_names_an_expert_twice()


@pytest.mark.usefixtures("on_cpu")
def test_checks_of_the_operator_find_a_wrong_one(monkeypatch: pytest.MonkeyPatch) -> None:
    run = implementations.load("numba")

    def forgets_weights(batch, *others):  # type: ignore[no-untyped-def]
        return run(batch._replace(weights=batch.weights.clone()), *others)

    monkeypatch.setattr(gpu_checks, "_usable", lambda: iter([("wrong", forgets_weights)]))
    with pytest.raises(AssertionError):
        gpu_checks.no_row_names_an_expert_twice()


def test_a_check_that_hangs_or_dies_does_not_hide_the_others(tmp_path: Path) -> None:
    script, known = tmp_path / "checks.py", tmp_path / "known.json"
    script.write_text(CHECKS)
    limits = {"passes": 60, "fails": 60, "is_not_there": 60, "hangs": 1, "dies": 60}
    limits["also_passes"] = 60
    told = list[int]()

    def tell(results: one_by_one.Results) -> None:
        known.write_text(json.dumps(results))
        told.append(sum(r["result"] != "not run yet" for r in results.values()))

    results = one_by_one.run([sys.executable, str(script)], limits, tell)
    assert {name: r["result"].split(":")[0] for name, r in results.items()} == {
        "passes": "ok",
        "fails": "FAILED",
        "is_not_there": "not run",
        "hangs": "ENDED after 1 s",
        "dies": "FAILED",
        "also_passes": "ok",
    }
    assert "ended with 3" in results["dies"]["result"]
    assert results["hangs"]["seconds"] >= 1
    assert told == [0, 1, 2, 3, 4, 5, 6]
    assert json.loads(known.read_text()) == results
    assert one_by_one.failed(results)
