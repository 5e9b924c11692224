"""What goes wrong around a running engine, and what vLLM can be run with: sere holds or says no."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from sere.calibration.calibrate import calibrate
from sere.demo_model.tasks import examples
from sere.policy import Policy
from sere.table import Table
from tests.engines import run_engine

pytestmark = [pytest.mark.engine, pytest.mark.modes]

ROOT = Path(__file__).parents[2]
TASKS = examples(64, seed=7, split="held_out")
SHORT = [task.prompt for task in TASKS[:16]]
# Four solved tasks before each: longer than a block of the prefix cache.
LONG = [
    "".join(f"{e.prompt}{e.answer}\n" for e in TASKS[i + 8 : i + 12])[-70:] + TASKS[i].prompt
    for i in range(16)
]
TOKENS = 12
TIERS = ["exact", None] * 8
S1 = {"S": 1, "min_active": 1}
ON, OFF = ["rpc", "sere_policy", S1], ["rpc", "sere_policy", None]
STATS, RESET = ["rpc", "sere_stats"], ["rpc", "sere_reset"]
BLOCK = 32


def tokens(run: list[Any]) -> list[list[int]]:
    return [ids for ids, _ in run]


@pytest.fixture(scope="module")
def mishaps(table_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One engine with a prefix cache that loses its table, its buffers and its weights."""
    folder = tmp_path_factory.mktemp("own")
    own, other, garbage = folder / "t.table", folder / "other", folder / "garbage"
    shutil.copy(table_path, own)
    calibrate("demo", other, method="random", progress=False)
    garbage.write_bytes(b"no table" * 99)
    mixed = ["generate", LONG, TOKENS, TIERS]
    steps: dict[str, list[Any]] = {
        "off": OFF,
        "stock": ["generate", LONG, TOKENS],
        "on": ON,
        "forgotten": ["forget"],
        "reset": RESET,
        "first": mixed,
        "first stats": STATS,
        "reset again": RESET,
        "cached": mixed,
        "cached stats": STATS,
        "addresses": ["addresses"],
        "replaced": ["replace", str(own), str(other)],
        "switched off": OFF,
        "switched on": ON,
        "other table": mixed,
        "spoilt": ["replace", str(own), str(garbage)],
        "switched off again": OFF,
        "switched on again": ON,
        "garbage": mixed,
        "removed": ["remove", str(own)],
        "admitted": ["refused", "exact"],
        "without the file": mixed,
        "asleep": ["asleep"],
        "awake": mixed,
        "reload": ["rpc", "reload_weights"],
        "reloaded": mixed,
        "back": ["replace", str(own), str(table_path)],
        "reload again": ["rpc", "reload_weights"],
        "reloaded with its table": mixed,
        "put in again": ["replace", str(own), str(other)],
        "switched off, reloaded": OFF,
        "switched on, reloaded": ON,
        "reloaded with another": mixed,
        "addresses after": ["addresses"],
        "off again": OFF,
        "stock, reloaded": ["generate", LONG, TOKENS],
    }
    options = {"enable_prefix_caching": True, "block_size": BLOCK}
    results = run_engine(list(steps.values()), sere={"table": str(own), **S1}, options=options)
    return dict(zip(steps, results, strict=True))


def test_rows_from_the_prefix_cache_are_not_seen(mishaps: dict[str, Any]) -> None:
    (first,), (cached,) = mishaps["first stats"], mishaps["cached stats"]
    hits = sum((len(prompt) - 1) // BLOCK * BLOCK for prompt in LONG)
    assert hits >= len(LONG) * BLOCK
    for index, layer in first.items():
        assert layer["rows_exact"] - cached[index]["rows_exact"] == hits
        assert layer["rows_fast"] == cached[index]["rows_fast"] > 0
        assert layer["slots_rerouted"] > 0 < cached[index]["slots_rerouted"]


@pytest.mark.parametrize(
    "run",
    [
        *("first", "cached", "other table", "garbage", "without the file", "awake"),
        *("reloaded", "reloaded with its table", "reloaded with another"),
    ],
)
def test_exact_requests_are_stock_whatever_happened(run: str, mishaps: dict[str, Any]) -> None:
    """Stock with the same weights: vLLM's CPU engine answers otherwise after `reload_weights`."""
    stock = mishaps["stock, reloaded" if run.startswith("reloaded") else "stock"]
    assert tokens(mishaps[run])[0::2] == tokens(stock)[0::2]
    assert mishaps[run][1::2] != stock[1::2]


def test_a_table_that_is_deleted_under_a_running_engine_is_not_missed(
    mishaps: dict[str, Any],
) -> None:
    """The plan is on the device, and a request's tier is checked without the file."""
    assert mishaps["admitted"] == "accepted"
    assert mishaps["without the file"] == mishaps["cached"]


def test_a_table_that_is_replaced_under_a_running_engine_is_not_read(
    mishaps: dict[str, Any], table_path: Path, tmp_path: Path
) -> None:
    """Another table of the same model, or no table at all: the engine goes on with the one that it
    checked at its start, also where its policy is switched or its weights are read anew. The next
    start reads the file."""
    assert mishaps["other table"] == mishaps["garbage"] == mishaps["cached"]
    assert mishaps["reloaded with another"] == mishaps["reloaded with its table"]
    assert mishaps["reloaded with another"] == mishaps["reloaded"]
    # The other table would have been noticed: it gives other replacements.
    random = calibrate("demo", tmp_path / "t", method="random", progress=False)
    mine = Table.load(table_path)
    assert not torch.equal(*(t.plan(0, Policy(**S1)).neighbours for t in (mine, random)))


def test_sleep_and_new_weights_keep_the_plan(mishaps: dict[str, Any]) -> None:
    assert mishaps["asleep"] > 0
    assert mishaps["awake"] == mishaps["cached"]
    assert mishaps["addresses"] == mishaps["addresses after"]


def test_ngram_drafts_are_decode_rows(table_path: Path) -> None:
    """Rows under verification follow the request's tier; an exact request's answer is stock's."""
    options = {
        "speculative_config": {
            "method": "ngram",
            "num_speculative_tokens": 3,
            "prompt_lookup_max": 3,
            "prompt_lookup_min": 1,
        }
    }
    steps = [OFF, ["generate", SHORT, TOKENS], ON, RESET, ["generate", SHORT, TOKENS, TIERS], STATS]
    _, stock, _, _, mixed, (stats,) = run_engine(
        steps, sere={"table": str(table_path), **S1}, options=options
    )
    assert tokens(mixed)[0::2] == tokens(stock)[0::2]
    assert mixed[1::2] != stock[1::2]
    decoded_fast = sum(len(ids) - 1 for ids in tokens(mixed)[1::2])
    for layer in stats.values():
        assert layer["rows_fast"] > decoded_fast  # and the drafts that were not accepted
        assert layer["active_after"] < layer["active_before"]


def test_a_killed_worker_is_reported_and_nothing_hangs(table_path: Path) -> None:
    """kill -9 in the middle of a run, of the process that holds the model."""
    (said,) = run_engine(
        [["killed", "Worker"]],
        sere={"table": str(table_path), **S1},
        options={"distributed_executor_backend": "mp"},
        env={"VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
        spawns=True,
        timeout=240,
    )
    assert "EngineDeadError" in said


def test_the_soak_in_the_docs_is_the_committed_one() -> None:
    page = (ROOT / "docs/serving.md").read_text()
    result = json.loads((ROOT / "benchmarks/results/soak.json").read_text())
    assert result["wrong"] == [] and result["healthy"] and result["counters"]["consistent"]
    assert set(result["statuses"]) == {"200", "400"}
    figures = [
        f"{result['requests_sent']:,} requests in {result['seconds']:.0f} s",
        f"{result['exact_answers_compared']:,} exact answers",
        f"{result['hung_up']:,} hung up",
        f"{result['memory']['mb_per_1000_requests']:+.1f} MB for every 1,000 requests",
    ]
    stock = json.loads((ROOT / "benchmarks/results/soak_stock.json").read_text())
    figures.append(f"{stock['memory']['mb_per_1000_requests']:+.1f} MB for every 1,000, ")
    assert result["complaints"] == stock["complaints"] == []
    assert result["requests_sent"] == stock["requests_sent"]
    assert result["memory"]["growth_mb"] <= result["memory"]["allowed_mb"]
    for figure in figures:
        assert figure in page, figure
