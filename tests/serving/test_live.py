"""The policy follows the load: alone, and in the real engine."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sere.demo_model.tasks import examples
from sere.kernels import COUNTERS, Plan, RowClass, keeping, new_counters, numba_kernel, reroute
from sere.policy import STOCK, Policy
from sere.serving.layer import ReroutedLayer
from sere.serving.live import Live
from sere.serving.rows import RowClasses
from sere.table import Table
from tests.conftest import E, K
from tests.engines import run_engine

POLICY = Policy(
    S=1, batches={3: {"S": 2, "max_active": 5}, 5: None, 9: {"layers": {1: {"min_active": 6}}}}
)


def expected(table: Table, bucket: int) -> Tensor:
    policy = POLICY.for_bucket(bucket)
    plans = [table.plan(i, policy) if policy else Plan.off(E) for i in table.layers]
    return torch.stack([plan.settings for plan in plans])


def test_each_step_gets_the_settings_of_its_size(table: Table) -> None:
    live = Live(table, "cpu")
    live.follow(POLICY)
    address = live.settings.data_ptr()
    for fast, bucket in [(2, 0), (3, 3), (4, 3), (5, 5), (8, 5), (9, 9), (100, 9), (1, 0)]:
        live.choose(fast, exact=7)
        assert torch.equal(live.settings, expected(table, bucket)), fast
        assert live.idle is (bucket == 5)
    live.choose(9, 0)
    live.choose(0, 12)  # nothing to re-route: the settings stay
    assert torch.equal(live.settings, expected(table, 9))
    assert live.settings.data_ptr() == address


def test_nobody_looks_at_rows_while_routing_is_stock(table: Table) -> None:
    live = Live(table, "cpu")
    assert live.dormant and live.idle
    live.watch(True)
    assert not live.dormant
    live.watch(False)
    live.follow(POLICY)
    assert not live.dormant
    live.choose(5, 0)
    assert live.idle  # this batch size is stock, others are not
    live.follow(None)
    assert live.dormant and live.idle


def test_layers_see_the_change_and_write_through(table: Table) -> None:
    live, rows = Live(table, "cpu"), RowClasses(16, "cpu", "decode")
    live.follow(POLICY)
    layer = ReroutedLayer("one", table.plan(1, POLICY), rows, live, live.place(1))
    assert layer.settings.tolist() == live.settings[1].tolist()
    live.choose(3, 0)
    assert layer.plan.settings[0] == 2
    layer.follow(table.plan(1, Policy(S=1, max_active=3)))
    assert live.settings[1].tolist()[:3] == [1, K, 3]
    assert {name for name, _ in layer.named_buffers()} == {
        "neighbours", "errors", "scales", "settings", "pool", "counters", "row_classes"
    }  # fmt: skip


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_no_request_waits_for_the_operator_to_be_compiled(
    weights: torch.dtype, table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Start-up's passes do not need it on CPUs, and compile it all the same: it takes 10 s."""
    entry = functools.cache(numba_kernel._entry.__wrapped__)
    monkeypatch.setattr(numba_kernel, "_entry", entry)
    live, rows = Live(table, "cpu"), RowClasses(16, "cpu", "decode")
    layer = ReroutedLayer("one", table.plan(1, Policy(S=1)), rows, live, live.place(1))
    ids = torch.stack([torch.randperm(E)[:K] for _ in range(6)]).int()
    live.follow(None)
    assert live.idle and layer(ids, torch.rand(6, K).to(weights)).equal(ids)
    assert entry.cache_info().misses == 1
    live.follow(Policy(S=1))
    rows.buffer[:6] = RowClass.FAST
    live.choose(6, 0)
    assert not layer(ids, torch.rand(6, K).to(weights)).equal(ids)
    assert entry.cache_info().misses == 1


def test_a_router_of_unsigned_ids_is_refused_in_the_first_pass(table: Table) -> None:
    """Which is start-up's, and whatever the policy: later a request would have to end for it."""
    live, rows = Live(table, "cpu"), RowClasses(16, "cpu", "decode")
    layer = ReroutedLayer("one", table.plan(1, POLICY), rows, live, live.place(1))
    live.follow(None)
    with pytest.raises(ValueError, match=r"topk_ids torch.uint16, .*expected ids of int16"):
        layer(torch.zeros(2, K, dtype=torch.uint16), torch.rand(2, K))


@pytest.mark.parametrize("policy", [None, Policy(S=1), Policy(S=2), Policy(S=1, min_active=1)])
@pytest.mark.parametrize("kinds", [[1], [1, 1], [2], [2, 2, 2], [1, 2], [3], [0]])
def test_what_the_host_spares_is_what_the_operator_would_do(
    policy: Policy | None, kinds: list[int], table: Table
) -> None:
    """Ids and counters with and without the shortcut."""
    random = torch.Generator().manual_seed(len(kinds))
    ids = torch.stack([torch.randperm(E, generator=random)[:K] for _ in kinds]).int()
    weights = torch.rand(len(kinds), K, generator=random) + 0.1
    rows, live = RowClasses(16, "cpu", "decode"), Live(table, "cpu")
    live.follow(policy)
    plan = table.plan(0, policy) if policy else Plan.off(E)
    layer = ReroutedLayer("one", plan, rows, live, live.place(0))
    given = torch.tensor(kinds, dtype=torch.int8)
    rows.buffer[: len(kinds)] = given
    exact = kinds.count(RowClass.EXACT)
    fast = len(kinds) - exact - kinds.count(RowClass.VOID)
    live.choose(fast, exact)
    got = layer(ids.clone(), weights.clone())
    counters = new_counters()
    wanted, _ = reroute(ids, weights, plan, given, counters)
    assert torch.equal(got, wanted)
    assert layer.stats() == dict(zip(COUNTERS, counters.tolist(), strict=True))
    lone = fast == 1 and not exact and policy is not None and policy.min_active != 1
    assert live.idle is (policy is None or lone or (exact > 0 and not fast))


@pytest.mark.parametrize("kind", [RowClass.FAST, RowClass.EXACT, keeping(1)])
@pytest.mark.parametrize("policy", [None, Policy(S=1), Policy(S=1, min_active=1, max_active=2)])
def test_a_row_alone_is_left_without_asking_the_operator(
    policy: Policy | None, kind: int, table: Table
) -> None:
    """As on a GPU, where the graph of one row then holds no launch: the operator would have changed
    nothing, and counted the same but for critical slots. Two rows do ask it."""
    rows, live = RowClasses(16, "cpu", "decode"), Live(table, "cpu", lone=True)
    live.follow(policy)
    live._on_host = False  # nothing else may be spared
    live.idle = False
    plan = table.plan(0, policy) if policy else Plan.off(E)
    layer = ReroutedLayer("one", plan, rows, live, live.place(0))
    random = torch.Generator().manual_seed(1)
    ids = torch.stack([torch.randperm(E, generator=random)[:K] for _ in range(2)]).int()
    weights = torch.rand(2, K, generator=random) + 0.1
    rows.buffer[:2] = kind
    exact = kind == RowClass.EXACT
    live.choose(int(not exact), int(exact))
    assert layer(one := ids[:1].clone(), weights[:1].clone()) is one
    counters = new_counters()
    wanted, kept = reroute(ids[:1], weights[:1], plan, rows.of(1), counters)
    assert torch.equal(one, wanted) and torch.equal(kept, weights[:1])
    counters[COUNTERS.index("slots_critical")] = 0
    assert layer.stats() == dict(zip(COUNTERS, counters.tolist(), strict=True))
    assert layer(ids, weights.clone()) is not ids


# --- in the engine --------------------------------------------------------------------------------

PROMPTS = [e.prompt for e in examples(16, seed=5, split="held_out")]
ADAPTIVE = {"S": 1, "batches": {"6": None, "12": {"S": 2, "min_active": 6}}}


@pytest.fixture(scope="module")
def engine(table_path: Path) -> dict[str, Any]:
    def batch(rows: int) -> list[Any]:
        return ["generate", PROMPTS[:rows], 6]

    steps: dict[str, list[Any]] = {
        "3": batch(3),
        "8": batch(8),
        "told": ["rpc", "sere_telemetry"],
        "reset": ["rpc", "sere_reset"],
        "16": batch(16),
        "stats": ["rpc", "sere_stats"],
        "record": ["rpc", "sere_record", True],
        "16 recorded": batch(16),
        "recording": ["rpc", "sere_recording"],
        "stop": ["rpc", "sere_record", False],
        "S=1 policy": ["rpc", "sere_policy", {"S": 1}],
        "3 at S=1": batch(3),
        "8 at S=1": batch(8),
        "off": ["rpc", "sere_policy", None],
        "8 at stock": batch(8),
        "tuned to stock": ["rpc", "sere_policy", STOCK.to_dict()],
        "reset again": ["rpc", "sere_reset"],
        "8 tuned to stock": batch(8),
        "stock stats": ["rpc", "sere_stats"],
        "1 at stock": batch(1),
        "the paper's": ["rpc", "sere_policy", {"S": 1, "min_active": 1}],
        "reset once more": ["rpc", "sere_reset"],
        "1 at S=1": batch(1),
        "lone stats": ["rpc", "sere_stats"],
    }
    sere = {"table": str(table_path), **ADAPTIVE}
    return dict(zip(steps, run_engine(list(steps.values()), sere=sere), strict=True))


@pytest.mark.engine
def test_the_engine_does_what_its_batch_size_asks_for(engine: dict[str, Any]) -> None:
    assert engine["3"] == engine["3 at S=1"]
    # Some end before the others: then fewer than 6 rows are left, and S = 1 holds.
    assert [logprobs[1] for _, logprobs in engine["8"]] == [
        logprobs[1] for _, logprobs in engine["8 at stock"]
    ]
    assert engine["8"] != engine["8 at S=1"]


@pytest.mark.engine
def test_rows_at_sizes_that_are_left_to_stock_are_counted_apart(engine: dict[str, Any]) -> None:
    """Every decoded row is in one of the two, and no other figure has these."""
    (told,) = engine["told"]
    steps, rows = told["left"]
    decoded = sum(len(tokens) - 1 for name in ("3", "8") for tokens, _ in engine[name])
    assert steps >= 5 and rows >= 6 * steps
    assert all(layer["rows_fast"] + rows == decoded for layer in told["layers"].values())


@pytest.mark.engine
def test_a_choice_of_stock_routing_is_stock_routing(engine: dict[str, Any]) -> None:
    assert engine["8 tuned to stock"] == engine["8 at stock"]
    assert all(layer["steps"] == 0 for layer in engine["stock stats"][0].values())


@pytest.mark.engine
def test_every_step_in_the_engine_follows_its_own_size(
    engine: dict[str, Any], table_path: Path
) -> None:
    table, policy = Table.load(table_path), Policy.from_dict(ADAPTIVE)
    seen = set()
    for index, batches in engine["recording"][0].items():
        for ids, weights, rows, new_ids, _ in batches:
            bucket = policy.bucket(rows.count(RowClass.FAST))
            seen.add(bucket)
            own = policy.for_bucket(bucket)
            plan = table.plan(int(index), own) if own else Plan.off(table.fingerprint.E)
            before = torch.tensor(ids, dtype=torch.int32)
            kinds = torch.tensor(rows, dtype=torch.int8)
            after, _ = reroute(before, torch.tensor(weights), plan, kinds)
            assert after.tolist() == new_ids
    assert seen >= {0, 12}
    assert engine["16"] == engine["16 recorded"]


@pytest.mark.engine
def test_steps_of_stock_routing_are_not_counted(engine: dict[str, Any]) -> None:
    lengths = [len(tokens) for tokens, _ in engine["16"]]
    policy = Policy.from_dict(ADAPTIVE)
    fast = [sum(length > step for length in lengths) for step in range(1, max(lengths))]
    counted = [rows for rows in fast if policy.for_bucket(policy.bucket(rows))]
    for layer in engine["stats"][0].values():
        assert layer["steps"] == len(counted)
        assert layer["rows_fast"] == sum(counted)


def test_a_policy_switched_live_brings_its_own_sizes(make_table: Callable[..., Table]) -> None:
    live = Live(make_table(), "cpu")
    live.follow(POLICY)
    live.choose(9, 0)
    live.follow(Policy(S=2))
    live.choose(9, 0)
    assert live.settings[:, 0].tolist() == [2, 2]
    live.follow(None)
    live.choose(9, 0)
    assert live.idle


@pytest.mark.engine
def test_a_request_alone_writes_what_stock_writes_and_asks_no_operator(
    engine: dict[str, Any], table_path: Path
) -> None:
    """Whatever the policy. The operator would have counted critical slots."""
    K = Table.load(table_path).fingerprint.K
    assert engine["1 at S=1"] == engine["1 at stock"]
    for layer in engine["lone stats"][0].values():
        assert layer["steps"] > 0 and layer["rows_fast"] == layer["steps"]
        assert layer["active_before"] == layer["active_after"] == K * layer["steps"]
        assert layer["slots_rerouted"] == layer["slots_critical"] == 0
