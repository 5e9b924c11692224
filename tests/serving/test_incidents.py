"""Nothing of sere ends an engine that serves: what fails in a step leaves it to stock routing."""

from __future__ import annotations

import ast
import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import sere
from sere.kernels import RowClass
from sere.kernels.reference import NEVER
from sere.policy import Policy
from sere.serving import frontend, telemetry, worker
from sere.serving import layer as layer_module
from sere.serving.layer import ReroutedLayer
from sere.serving.session import Session
from sere.table import Table
from tests.conftest import E, K
from tests.serving.test_rows import MOST, news, runner, seen, session, step_v1, step_v2

EXACT, FAST = int(RowClass.EXACT), int(RowClass.FAST)


def serving(table: Table) -> Session:
    """A session whose engine has started."""
    own = session(table)
    own.rows.incidents.serving = True
    own.set_policy(Policy(S=1, min_active=1))
    return own


def bound(own: Session, index: int = 0) -> ReroutedLayer:
    return own.bind(index, f"model.layers.{index}", E=E, K=K)


def batch(T: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(T)
    ids = torch.stack([torch.randperm(E, generator=g)[:K] for _ in range(T)]).int()
    return ids, torch.rand(T, K, generator=g) + 0.1


# --- a layer that sees other rows than the batch has ----------------------------------------------


@pytest.mark.parametrize("rows", [3, MOST + 1])
def test_a_layer_that_sees_other_rows_than_the_batch_leaves_them(
    rows: int, table: Table, caplog: pytest.LogCaptureFixture
) -> None:
    """Microbatches and shards see fewer, gathered batches more; nothing is classified by guess."""
    own = serving(table)
    layers = [bound(own, index) for index in range(2)]
    ids, weights = batch(rows)
    for step in range(1, 3):
        step_v2(own, [False] * 4, [1] * 4, 4)
        for layer in layers:
            assert torch.equal(layer(ids.clone(), weights.clone()), ids)
        assert telemetry.snapshot(own)["unclassified_steps"] == step  # not once for every layer
    assert f"a layer sees {rows} rows of a batch of 4" in caplog.text
    assert sum(record.name == "vllm.sere" for record in caplog.records) == 1
    assert not own.live.counters.any()
    step_v2(own, [False] * 6, [1] * 6, 6)
    ids, weights = batch(6)
    assert not torch.equal(layers[0](ids.clone(), weights), ids)  # and the next step is as ever
    assert own.rows.incidents.steps == 2


def test_while_an_engine_starts_it_is_an_error(table: Table) -> None:
    own = session(table)
    step_v2(own, [False] * 4, [1] * 4, 4)
    with pytest.raises(RuntimeError, match="a layer sees 3 rows of a batch of 4"):
        bound(own)(*batch(3))


@pytest.mark.parametrize("fault", ["rows", "vote"])
def test_it_still_votes_where_other_ranks_wait(
    fault: str, table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared: list[Tensor] = []
    monkeypatch.setattr(layer_module, "share_votes", lambda votes: shared.append(votes.clone()))
    own = serving(table)
    own.live.together = True
    layer = bound(own)
    if fault == "vote":
        monkeypatch.setattr(layer_module, "load_vote", lambda name: failing)
    step_v2(own, [False] * 4, [1] * 4, 4)
    ids, weights = batch(3 if fault == "rows" else 4)
    assert torch.equal(layer(ids, weights), ids)
    assert len(shared) == 1 and bool((shared[0] == NEVER).all())
    assert own.rows.incidents.steps == 1


# --- whatever else fails in a step ----------------------------------------------------------------


def failing(*args: Any, **kwargs: Any) -> Any:
    raise KeyError("as a kernel, or vLLM's structures, might")


def test_an_operator_that_fails_leaves_the_ids(table: Table) -> None:
    own = serving(table)
    layer = bound(own)
    layer.__dict__["_run"] = failing
    step_v2(own, [False] * 4, [1] * 4, 4)
    ids, weights = batch(4)
    assert torch.equal(layer(ids, weights), ids)
    assert own.rows.incidents.steps == 1


def too_many_rows(own: Session) -> None:
    step_v1(own, [9] * (MOST + 1), [5] * (MOST + 1), [1] * (MOST + 1))


def without_lengths(own: Session) -> None:
    step_v2(own, [False] * 3, [1, 2], 3)


def without_a_batch(own: Session) -> None:
    prepare = worker.classifying_v1(lambda *args: "prepared")
    assert prepare(runner(own, input_batch=None), news(rows=3), np.array([1, 1, 1])) == "prepared"


@pytest.mark.parametrize("step", [too_many_rows, without_lengths, without_a_batch])
def test_a_batch_that_cannot_be_told_apart_is_not_rerouted(
    step: Callable[[Session], None], table: Table
) -> None:
    own = serving(table)
    layer = bound(own)
    step_v2(own, [False] * 9, [1] * 9, 9)
    step(own)
    assert seen(own) == [int(RowClass.VOID)] * MOST
    ids, weights = batch(3)
    assert torch.equal(layer(ids, weights), ids)
    assert own.rows.incidents.steps == 1
    starting = session(table)
    with pytest.raises(Exception, match=""):
        step(starting)


def test_requests_whose_wishes_are_missed_get_no_less_than_stock(table: Table) -> None:
    own = serving(table)
    broken = SimpleNamespace(finished_req_ids=set(), scheduled_new_reqs=[SimpleNamespace()])
    assert worker.tracking(lambda *args: "done")(runner(own), broken) == "done"
    assert own.rows.incidents.steps == 1
    assert step_v1(own, [9] * 2, [5] * 2, [1] * 2)[:2] == [EXACT, EXACT]


class Unequal:
    """Something in a request that does not even let itself be compared."""

    def __eq__(self, other: object) -> bool:
        raise TypeError("no truth value")

    __hash__ = None  # type: ignore[assignment]


def test_a_wish_that_nobody_can_read_gets_the_best(table: Table) -> None:
    own = serving(table)
    worker.tracking(lambda *args: "done")(runner(own), news({"r0": {"sere": Unequal()}}))
    assert step_v1(own, [9] * 2, [5] * 2, [1] * 2)[:2] == [EXACT, FAST]
    assert own.rows.incidents.steps == 0


def test_a_policy_that_cannot_be_had_leaves_the_old_one_on(
    table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks that follow half of a policy would not route alike."""
    own = serving(table)
    layers = [bound(own, index) for index in range(2)]
    before = own.live.settings.clone(), [layer.neighbours.clone() for layer in layers]
    plan = own.table.plan
    fails = {0: plan, 1: failing}
    monkeypatch.setattr(Table, "plan", lambda self, index, *args: fails[index](index, *args))
    with pytest.raises(KeyError):
        own.set_policy(Policy(S=2, rho=0.9))
    assert own.policy == Policy(S=1, min_active=1)
    assert torch.equal(own.live.settings, before[0])
    assert all(map(torch.equal, [layer.neighbours for layer in layers], before[1]))


# --- capture --------------------------------------------------------------------------------------


def test_rows_are_void_while_graphs_are_captured(table: Table) -> None:
    """A warm-up that looks real may come before: more rows than the graph that is captured has."""
    own = session(table)  # it starts: a surprise would be an error
    layer = bound(own)
    step_v2(own, [False] * 9, [1] * 9, 9)

    def capture_model(runner: Any) -> Tensor:
        return layer(*batch(4))

    assert torch.equal(worker.voiding(capture_model)(runner(own)), batch(4)[0])
    assert seen(own) == [int(RowClass.VOID)] * MOST
    assert not own.live.counters[0][:7].any()


@pytest.mark.engine
def test_both_runners_capture_with_void_rows() -> None:
    from sere.serving.symbols import here, symbol
    from sere.serving.vllm_plugin import register

    register()
    for name in filter(here, ("ModelRunnerV1", "ModelRunnerV2")):
        for entry in ("capture_model", "_dummy_run"):
            assert hasattr(getattr(symbol(name), entry), "__wrapped__"), (name, entry)


# --- what it looks like from outside --------------------------------------------------------------


def test_vllms_metrics_do_not_go_with_ours(caplog: pytest.LogCaptureFixture) -> None:
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"vllm:requests 1\n"})

    async def send(message: Any) -> None:
        sent.append(message)

    config = SimpleNamespace(additional_config={"sere": {}})
    state = SimpleNamespace(vllm_config=config, engine_client=None)
    scope = {"type": "http", "path": "/metrics", "headers": [], "app": SimpleNamespace(state=state)}
    middleware = frontend.AppendMetrics(app)
    middleware._source = SimpleNamespace(text=failing)  # type: ignore[assignment]
    with caplog.at_level(logging.ERROR):
        for _ in range(2):
            asyncio.run(middleware(scope, None, send))
    assert [m["body"] for m in sent if "body" in m] == [b"vllm:requests 1\n"] * 2
    assert sum(record.name == "vllm.sere" for record in caplog.records) == 1


# --- every raise there is -------------------------------------------------------------------------

# Where each of them ends.
RAISES = {
    "start-up": {
        *("session.bind", "session.check_bound", "session.learn", "may_start.check_config"),
        *("may_start._check_rows_are_known", "may_start._check_ranks", "may_start._check_shadow"),
        *(
            "auto.parse",
            "auto._settings",
            "auto.__post_init__",
            "auto._file",
            "no_table.check_asked",
        ),
        *("model_fit.untold", "hand_made.taken"),
        # while an engine reads for its own calibration, which is before it serves
        *("observing.__init__", "observing._note", "observing.agree", "observing.finished"),
        *("each_expert._own", "each_expert._compare", "each_expert.output"),
        *("each_expert._sent", "each_expert._mixture"),
        *("fitted_maps.fitted", "own_table.sere_take_maps", "own_table.ask"),
        *("loaded_maps._maps_of", "stand_ins.learn"),
        *("self_calibration.check", "self_calibration.prepare", "self_calibration._anew"),
        *("self_calibration._made", "remote.ask_workers", "own_text._texts"),
        "table_cache.cache_folder",
        "self_calibration._found_or_watched",
        *("table_cache.read", "table_cache.write", "table_cache.held"),
        *("table_cache._made", "table_cache._taken"),
        *(
            "settings.parse",
            "settings._auto",
            "settings._flag",
            "settings._tier",
            "settings._tolerance",
        ),
        *("settings._find_table", "shadow.parse", "invariance.check_default"),
        *("wiring.admit", "wiring._admit", "wiring.install", "wiring.install_in_worker"),
        *("wiring._rerouting", "refusal.step"),
        *("wiring.compile_or_warm_up_model", "rust_front_end.__init__"),
        *("admin_key.admin_key", "admin_key._long_enough"),
        *("worker.self_check", "worker._check_runner", "worker._checked", "worker.check_layers"),
        *("loaded_maps.attach", "loaded_maps.check_finalized"),
        *("model_fit.check_kind", "model_fit.check_model", "prefix_cache.self_check"),
        *("vllm_plugin.__post_init__", "__init__.check_types"),  # the latter in the first pass
        "cuda_variants.__post_init__",  # which forms serve is read when a layer is bound
        *(
            "implementations._chosen",
            "cuda_kernel._check_sizes",
        ),  # the self-check runs the operator
    },
    "the front end, as an error of the request": {
        *("may_ask.check_request", "tiers.parse", "admission.check", "invariance.check_tier"),
        "admission.check_place",
        *("switch._admit", "switch._answer", "switch._ask", "switch._asked", "switch._body"),
    },
    "the caller of collective_rpc": {
        *("session.check_policy", "worker.session_in", "worker.sere_policy", "plan.build"),
        *("remote.answer", "no_table.check_policy", "own_table.sere_table"),
    },
    "a step, which survives it": {"incidents.survive", "rows._fill", "layer.run_together"},
    "the log of a start, which has no report then": {
        *("trial.try_out", "first_report._made", "first_report._texts"),
    },
    "a thread beside the steps, whose answer it becomes": {"traffic._make"},
    "a caller in Python, never an engine": {"__init__._check", "__init__.reroute"},
}
ELSEWHERE = (
    "engine",
    "server",
    "rehearsal",
    "calibrator",
)  # modules that no process of vLLM imports


def raising() -> set[str]:
    """The functions of serving and kernels that hold a `raise` or an `assert`."""
    found, root = set(), Path(sere.__file__).parent
    files = [*root.glob("serving/*.py"), *root.glob("kernels/*.py")]
    for file in (file for file in files if file.stem not in ELSEWHERE):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                inner = [n for child in ast.iter_child_nodes(node) for n in _within(child)]
                if any(isinstance(n, ast.Raise | ast.Assert) for n in inner):
                    found.add(f"{file.stem}.{node.name}")
    return found


def _within(node: ast.AST) -> list[ast.AST]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return []
    return [node, *(n for child in ast.iter_child_nodes(node) for n in _within(child))]


def test_no_raise_is_unaccounted_for() -> None:
    """A new one is mended, or ends where no step is."""
    assert raising() == set().union(*RAISES.values())
