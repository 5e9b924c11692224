"""What share of the bandwidth decoding reaches, and the advice that follows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sere.doctor import examine
from sere.speed.result import as_text
from sere.step_cost.reached import from_file, reached, too_little

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


@pytest.fixture
def result() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / "bench_h100_qwen3.json").read_text())
    return found


def slowed(result: dict[str, Any], times: float) -> dict[str, Any]:
    """As on a card where other things take so many times longer."""
    for each in result["results"]:
        for arm in each["arms"]:
            arm["tpot_ms"] *= times
    return result


def test_the_share_is_of_what_was_read_over_what_could_have_been(result: dict[str, Any]) -> None:
    """Issue 19: at 32 requests stock takes 20.91 ms where reading every byte once takes 18.13."""
    found = {one.batch: one for one in reached(result)}
    assert list(found) == sorted(found)
    assert found[32].share == pytest.approx(18.13 / 20.91, abs=0.002)
    assert found[32].bandwidth == pytest.approx(2.945e12 * 18.13 / 20.91, rel=0.002)


@pytest.mark.parametrize("name", ["bench_h100_qwen3", "bench_cpu_qwen3", "bench_cpu_qwen15"])
def test_where_reading_takes_the_time_nothing_is_advised_against(name: str) -> None:
    assert too_little(from_file(RESULTS / f"{name}.json")) is None


def test_far_below_the_bandwidth_bench_and_doctor_say_not_to_enable(
    result: dict[str, Any], tmp_path: Path
) -> None:
    """A report of another card: 7 % of its bandwidth, and no gain."""
    file = tmp_path / "bench.json"
    assert "Do not enable" not in as_text(result)
    file.write_text(json.dumps(slowed(result, 0.87 / 0.07)))
    assert "7% of this device's bandwidth at best, at batch 32" in as_text(result)
    assert "Do not enable re-routing here" in as_text(result)
    checks = examine(bench=str(file))
    answer = next(check for check in checks if check.name == "bandwidth")
    assert not answer.passed and "Do not enable re-routing here" in answer.answer
    checks.close()  # type: ignore[attr-defined]


def test_batch_sizes_at_which_nothing_could_be_spared_do_not_decide(result: dict[str, Any]) -> None:
    """A lone request reads few experts, and far less than the bandwidth on any card."""
    for each in result["results"]:
        if each["batch"] != 1:
            for arm in each["arms"]:
                arm["predicted_speedup"] = 1.0
    assert too_little(reached(slowed(result, 5))) is None


def test_another_file_is_refused_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text('{"results": []}')
    with pytest.raises(ValueError, match=r"other\.json: not a result of `sere bench`"):
        from_file(tmp_path / "other.json")
    with pytest.raises(ValueError, match="no such file"):
        from_file(tmp_path / "none.json")
