"""Each row of a step has its class: what the CPU engine cannot produce, on constructed objects.

The wrappers are the plug-in's own; only vLLM's runners are stand-ins.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sere.kernels import COUNTERS, Plan, RowClass, keeping, new_counters, reroute
from sere.policy import Policy
from sere.serving import worker
from sere.serving.layer import ReroutedLayer
from sere.serving.live import Live
from sere.serving.rows import RowClasses
from sere.serving.session import Session
from sere.serving.settings import Settings
from sere.serving.tiers import FAST, RequestTiers
from sere.table import Table
from tests.conftest import E, K

VOID, FAST_ROW, EXACT_ROW, _ = map(int, RowClass)
MOST = 32  # rows of a step at most


def session(table: Table, gate: str = "decode") -> Session:
    live = Live(table, "cpu")
    live.follow(Policy(S=1))
    settings = Settings(Path("unused"), Policy(S=1))
    return Session(settings, table, RowClasses(MOST, "cpu", gate), live, RequestTiers(FAST, K))


def runner(own: Session, **more: Any) -> Any:
    """A stand-in for a model runner whose worker has this session."""
    compilation = SimpleNamespace(_sere_session=own)
    config = SimpleNamespace(
        compilation_config=compilation,
        uniform_decode_query_len=3,
        parallel_config=SimpleNamespace(rank=0),
    )
    return SimpleNamespace(vllm_config=config, **more)


def news(
    requests: dict[str, Any] | None = None,
    finished: Sequence[str] = (),
    rows: int = 0,
    tokens: int = 8,
) -> Any:
    """A scheduler's output: requests that join, with what they ask of sere, and that leave."""
    joining = [
        SimpleNamespace(
            req_id=name, sampling_params=SimpleNamespace(extra_args=asked, max_tokens=tokens)
        )
        for name, asked in (requests or {}).items()
    ]
    return SimpleNamespace(
        scheduled_new_reqs=joining, finished_req_ids=set(finished), total_num_scheduled_tokens=rows
    )


def step_v1(own: Session, computed: list[int], prompts: list[int], lengths: list[int]) -> list[int]:
    """Classes [MOST] of a step of model runner V1."""
    batch = SimpleNamespace(
        num_reqs=len(lengths),
        req_ids=[f"r{i}" for i in range(len(lengths))],
        num_computed_tokens_cpu=np.array([*computed, 7, 7]),  # more than there are requests
        num_prompt_tokens=np.array([*prompts, 9, 9]),
    )
    prepare = worker.classifying_v1(lambda *args: "prepared")
    output = news(rows=sum(lengths))
    assert prepare(runner(own, input_batch=batch), output, np.array(lengths)) == "prepared"
    return seen(own)


def step_v2(own: Session, prefilling: list[bool], lengths: list[int], total: int) -> list[int]:
    """Classes [MOST] of a step of model runner V2."""
    batch = SimpleNamespace(
        is_prefilling_np=np.array(prefilling),
        num_scheduled_tokens=np.array(lengths, dtype=np.int32),
        req_ids=[f"r{i}" for i in range(len(lengths))],
        num_tokens=total,
    )
    assert worker.classifying_v2(lambda *args: batch)(runner(own)) is batch
    return seen(own)


def seen(own: Session) -> list[int]:
    """Classes [MOST] that layers see, which the host counted right."""
    rows = own.rows.buffer.tolist()
    assert own.rows.exact == rows.count(EXACT_ROW)
    assert own.rows.fast == len(rows) - rows.count(EXACT_ROW) - rows.count(VOID)
    return rows


def padded(*rows: int) -> list[int]:
    return [*rows, *[VOID] * (MOST - len(rows))]


@pytest.mark.parametrize(
    ("first", "rows", "told"), [(1, "decode", True), (8, "decode", False), (1, "all", False)]
)
def test_answers_of_one_token_are_said_to_be_stock(
    first: int, rows: str, told: bool, table: Table, caplog: pytest.LogCaptureFixture
) -> None:
    """If the first requests ask for no more; once, and not of prompts that are re-routed."""
    own = session(table)
    own.rows.gate = rows
    take = worker.tracking(lambda *args: None)
    take(runner(own), news(dict.fromkeys("abc"), tokens=1))  # of warm-up
    own.rows.incidents.serving = True
    take(runner(own), news({"first": None}, tokens=first))
    for step in range(8):
        take(runner(own), news({f"{step} {i}": None for i in range(4)}, tokens=1))
    said = [r for r in caplog.records if "ask for one token each" in r.getMessage()]
    assert len(said) == told


@pytest.mark.parametrize("version", [1, 2])
def test_rows_of_requests_that_had_ended_are_not_counted(version: int, table: Table) -> None:
    """Asynchronous scheduling: r1 (exact) and r2 had ended when this step was prepared; r3 still
    read its prompt. One that ends later was in no step too many."""
    own = session(table)
    own.overlapping = True
    take = worker.tracking(lambda *args: None)
    take(runner(own), news({"r1": {"sere": "exact"}}))
    own.live.counters += 100
    rows = {"rows_fast": 100, "rows_exact": 100}

    def counted() -> dict[str, int]:
        return {name: int(own.live.counters[0, COUNTERS.index(name)]) for name in rows}

    if version == 1:
        step_v1(own, [20, 20, 20, 4], [5, 5, 5, 9], [1, 1, 1, 1])
    else:
        step_v2(own, [False, False, False, True], [1, 1, 1, 1], 4)
    take(runner(own), news(finished=["r1", "r2", "r3"]))
    assert counted() == {"rows_fast": 99, "rows_exact": 99}
    take(runner(own), news(finished=["r0"]))
    assert counted() == {"rows_fast": 99, "rows_exact": 99}
    own.live.follow(None)  # stock routing had counted nothing
    step_v2(own, [False], [1], 1)
    take(runner(own), news(finished=["r0"]))
    own.overlapping = False
    own.live.follow(Policy(S=1))
    step_v2(own, [False], [1], 1)
    take(runner(own), news(finished=["r0"]))  # the row of a step of its own, the only one
    assert counted() == {"rows_fast": 100, "rows_exact": 99}


# --- model runner V1 ------------------------------------------------------------------------------


def test_v1_decode_chunked_prefill_and_the_last_prompt_token(table: Table) -> None:
    """One decodes, one has a chunk of its prompt, one the last token of its prompt."""
    rows = step_v1(session(table), [20, 4, 9], [5, 10, 10], [1, 3, 1])
    assert rows == padded(FAST_ROW, EXACT_ROW, EXACT_ROW, EXACT_ROW, EXACT_ROW)


def test_v1_rows_that_verify_drafts_are_decode_rows(table: Table) -> None:
    rows = step_v1(session(table), [20, 30], [5, 10], [3, 2])
    assert rows == padded(*[FAST_ROW] * 5)


def test_v1_recomputation_after_preemption_is_prefill(table: Table) -> None:
    """More rows than drafts can explain, though the prompt is behind."""
    rows = step_v1(session(table), [20, 30], [5, 10], [4, 1])
    assert rows == padded(*[EXACT_ROW] * 4, FAST_ROW)


# --- model runner V2 ------------------------------------------------------------------------------


def test_v2_mixed_batch(table: Table) -> None:
    rows = step_v2(session(table), [False, True, False], [1, 3, 2], 6)
    assert rows == padded(FAST_ROW, EXACT_ROW, EXACT_ROW, EXACT_ROW, FAST_ROW, FAST_ROW)


@pytest.mark.parametrize(
    ("prefilling", "asked", "expected"),
    [
        ([False, False], None, FAST_ROW),
        ([False, False], "exact", EXACT_ROW),
        ([False, True], None, EXACT_ROW),
        ([False, False], "S=1", EXACT_ROW),
    ],
)
def test_v2_adaptive_verification_takes_the_better_class(
    prefilling: list[bool], asked: str | None, expected: int, table: Table
) -> None:
    """Which rows are whose is known on the device only: lengths are upper bounds."""
    own = session(table)
    own.tiers.add("r1", asked)
    assert step_v2(own, prefilling, [4, 4], 6) == padded(*[expected] * 6)


# --- both -----------------------------------------------------------------------------------------


def test_requests_are_tracked_from_the_schedulers_news(table: Table) -> None:
    own = session(table)
    track = worker.tracking(lambda *args: "done")
    asked = {"r0": {"sere": "exact"}, "r1": {"sere": {"S": 1}}, "r2": None, "r3": {"other": 1}}
    assert track(runner(own), news(asked)) == "done"
    rows = step_v2(own, [False] * 4, [1, 2, 1, 1], 5)
    assert rows == padded(EXACT_ROW, keeping(1), keeping(1), FAST_ROW, FAST_ROW)
    # r0 is aborted and sent again at once, r1 ends in a step without any row.
    track(runner(own), news({"r0": None}, finished=["r0", "r1"]))
    assert step_v1(own, [9] * 4, [5] * 4, [1] * 4) == padded(*[FAST_ROW] * 4)


def test_tiers_hold_for_prefill_rows_too_if_those_are_rerouted(table: Table) -> None:
    own = session(table, gate="all")
    own.tiers.add("r1", "exact")
    assert step_v2(own, [True, True], [2, 2], 4) == padded(FAST_ROW, FAST_ROW, EXACT_ROW, EXACT_ROW)


def test_dummy_and_capture_runs_have_no_real_row(table: Table) -> None:
    own = session(table)
    step_v2(own, [False] * 3, [1] * 3, 3)
    assert worker.voiding(lambda *args: "ran")(runner(own), 8) == "ran"
    assert own.rows.buffer.tolist() == padded()
    ids = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)
    layer = ReroutedLayer("one", table.plan(0, Policy(S=1, min_active=1)), own.rows, own.live, 0)
    assert torch.equal(layer(ids.clone(), torch.ones(2, K)), ids)
    assert layer.stats()["steps"] == 0


def test_padding_follows_the_batch_and_old_rows_do_not_linger(table: Table) -> None:
    own = session(table)
    step_v2(own, [False] * 9, [1] * 9, 9)
    assert step_v2(own, [False] * 2, [1] * 2, 2) == padded(FAST_ROW, FAST_ROW)
    # A graph for 8 rows is replayed: padding neither votes nor adds an expert, marked -1 or not.
    rows = own.rows.of(8)
    ids = torch.tensor([[0, 1], [2, 3], *[[6, 7], [-1, -1]] * 3], dtype=torch.int32)
    plan: Plan = table.plan(0, Policy(S=1, min_active=1))
    after, _ = reroute(ids, torch.full((8, K), 0.5), plan, rows, new_counters())
    real = set(after[:2].flatten().tolist())
    assert set(after[2:].flatten().tolist()) <= real | {-1}


@pytest.mark.engine
def test_eplb_maps_what_was_rerouted(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids are logical until EPLB replaces them by physical ones; its load statistics and returned
    routes see the re-routed ids."""
    from vllm.model_executor.layers.fused_moe.router import base_router
    from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter

    from sere.serving.wiring import _rerouting

    T = 6
    logits = torch.rand(T, E, generator=torch.Generator().manual_seed(0))
    logits[: T // 2, 0] += 1  # first choices
    logits[T // 2 :, 1] += 1

    class Router(BaseRouter):  # type: ignore[misc]
        routing_method_type = None

        def _compute_routing(self, hidden_states: Any, router_logits: Any, *args: Any, **kw: Any):  # type: ignore[no-untyped-def]
            weights, ids = router_logits.topk(K)
            return weights, ids.int()

    mapped: list[Any] = []

    def to_physical(*, topk_ids: Any, **kwargs: Any) -> Any:
        mapped.append(topk_ids.clone())
        return topk_ids + 100

    monkeypatch.setattr(base_router, "eplb_map_to_physical_and_record", to_physical)
    state = SimpleNamespace(
        expert_load_view=0,
        logical_to_physical_map=0,
        logical_replica_count=0,
        should_record_tensor=0,
        num_unpadded_tokens_tensors=[0],
    )
    own, plan = session(table), table.plan(0, Policy(S=1))
    own.begin(np.zeros(T, bool), None, [f"r{i}" for i in range(T)])
    router = Router(K, E, state)
    router.__class__ = _rerouting(Router)
    assert not router.supports_monolithic_kernels  # what vLLM 0.33 asks
    router._sere = ReroutedLayer("one", plan, own.rows, own.live, 0)
    captured: list[Any] = []
    router.set_capture_fn(lambda ids: captured.append(ids.clone()))
    weights, ids = logits.topk(K)
    expected, _ = reroute(ids.int(), weights, plan)
    assert not torch.equal(expected, ids.int())
    _, got = router._select_experts(torch.zeros(T, 4), logits, None)
    assert torch.equal(mapped[0], expected) and torch.equal(captured[0], expected)
    assert torch.equal(got, expected + 100)
