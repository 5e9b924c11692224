"""Legal settings under which nothing is re-routed are said to be such, last of all."""

from __future__ import annotations

import asyncio
import logging
from contextlib import nullcontext
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sere.cautious import cautious
from sere.kernels import RowClass, reroute
from sere.policy import Policy, PolicyError
from sere.serving import expert_kernels, start_up
from sere.serving.inert import inert
from sere.serving.last_word import LastWord, starting
from sere.serving.may_ask import check_request
from sere.serving.settings import Settings
from sere.serving.start_up import NOBODYS
from sere.table import Table
from tests.engines import MONOLITHIC_EXPERTS, run_engine
from tests.serving.test_switch import Core

K = 2  # of the table


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        (Policy(S=1), None),
        (Policy(S=1, rho=0.5), None),
        (None, "routing is stock"),
        (Policy(S=K), "S=2 keeps all of a token's 2 experts; choose 1 <= S < 2"),
        (Policy(S=1, rho=0.9), "rho=0.9 is above every similarity in the table, whose largest is"),
        (Policy(S=1, batches={1: None}), "stock routing at every batch size"),
        (Policy(S=1, batches={8: None}), None),
        (Policy(S=1, min_active=8), "S=1 min_active=8 lets no slot move"),
    ],
    ids=str,
)
def test_why_a_policy_re_routes_nothing(
    policy: Policy | None, reason: str | None, table: Table
) -> None:
    said = inert(policy, table)
    assert (said is None) if reason is None else (reason in str(said))


@pytest.mark.engine
def test_requests_that_are_served_one_by_one_are_said_to_be_left_alone(table_path: Path) -> None:
    """Legal, and nothing can move: said, and true."""
    asked = [["said"], ["generate", ["add 1+1:", "rev ab:"], 4], ["rpc", "sere_stats"]]
    bold = {"table": str(table_path), "S": 1, "min_active": 1}
    said, _, (stats,) = run_engine(asked, sere=bold, options={"max_num_seqs": 1})
    level, _, last = said[-1]
    assert level == "WARNING" and "NOTHING IS RE-ROUTED: max_num_seqs=1" in last
    assert all(layer["rows_fast"] > 0 == layer["slots_rerouted"] for layer in stats.values())


def test_rows_that_are_alone_by_configuration_move_in_prompts_only(table: Table) -> None:
    assert "max_num_seqs=1" in str(inert(Policy(S=1), table, alone=True))
    assert inert(Policy(S=1, rows="all"), table, alone=True) is None
    assert inert(Policy(S=1, pool=0.5), table, alone=True) is None
    assert inert(Policy(S=1, batches={1: {"pool": 0.5}}), table, alone=True) is None
    for_many = Policy(S=1, batches={8: {"pool": 0.5}})
    assert "max_num_seqs=1" in str(inert(for_many, table, alone=True))


@pytest.mark.parametrize(
    ("policy", "moves"),
    [
        (Policy(S=K, pool=2), True),
        (Policy(S=1, pool=2, batches={1: None}), True),
        (Policy(S=K, pool=1), False),  # too small for such rows, which are left alone
        (Policy(S=K), False),
        (Policy(S=K, rho=0.9, pool=2), False),
        (Policy(S=K, pool=1.0), False),
    ],
    ids=str,
)
def test_a_policy_that_moves_independent_rows_alone_is_not_called_inert(
    policy: Policy, moves: bool, table: Table
) -> None:
    """But where no request may ask to be independent. What moves is what the operator moves."""
    assert (inert(policy, table, independent=True) is None) is moves
    assert inert(policy, table) is not None
    moved = 0
    for index in table.layers:
        ids = torch.tensor(list(combinations(range(table.fingerprint.E), K)), dtype=torch.int32)
        rows = torch.full((len(ids),), int(RowClass.INDEPENDENT), dtype=torch.int8)
        plan = table.plan(index, policy)
        new, _ = reroute(ids.clone(), torch.full(ids.shape, 0.5), plan, rows)
        moved += int((new != ids).sum())
    assert (moved > 0) is moves


@pytest.fixture(scope="module")
def started(table_path: Path) -> tuple[list[Any], dict[str, Any], dict[str, Any]]:
    """What an engine logs and tells with rho above every similarity, and where stock vLLM would
    take experts that route inside themselves."""
    settings = {"table": str(table_path), "S": 1, "rho": 1.5}
    asked = [["said"], ["rpc", "sere_telemetry"], ["rpc", "sere_description"]]
    said, (told,), (described,) = run_engine(asked, sere=settings, paths=(MONOLITHIC_EXPERTS,))
    return said, told, described


@pytest.mark.engine
def test_an_engine_that_re_routes_nothing_says_so_last(started: Any) -> None:
    """It starts, and that is the last thing that is said."""
    said, told, _ = started
    level, _, last = said[-1]
    assert level == "WARNING"
    reason = "rho=1.5 is above every similarity in the table"
    assert last.startswith(f"sere: NOTHING IS RE-ROUTED: {reason}")
    (line,) = [text for _, name, text in said if name == "vllm.sere" and text.startswith("sere ")]
    assert f"stock, NOTHING IS RE-ROUTED: {reason}" in line
    assert reason in told["inert"]


@pytest.mark.engine
def test_the_kernel_that_stock_would_take_is_named(started: Any) -> None:
    """Once; not one that stock refuses as well."""
    said, _, described = started
    assert described["stock_kernels"] == ["RoutesInside"]
    (serving,) = described["kernels"]
    assert serving.endswith("CPUUnquantizedExperts")
    (line,) = [text for _, _, text in said if "stock vLLM would take" in text]
    assert line.startswith("sere: stock vLLM would take RoutesInside, which routes inside itself")
    assert f"equal {serving} without re-routing" in line


def test_a_candidate_that_asks_its_config_is_asked_as_stock_would() -> None:
    """vLLM 0.33: a router that re-routes asks for kernels that do not, and the config says so."""

    class Candidate:
        is_monolithic = staticmethod(lambda: True)

    def original(cls: Any, moe_config: Any) -> tuple[bool, str | None]:
        return not moe_config.require_decomposed_backend, "routes adjusted after routing"

    asked = expert_kernels.vetoing(original, lambda: True)
    Candidate.is_supported_config = staticmethod(asked)  # type: ignore[attr-defined]
    config = SimpleNamespace(require_decomposed_backend=True)
    assert not Candidate.is_supported_config(Candidate, config)[0]  # type: ignore[attr-defined]
    assert config.require_decomposed_backend
    method = SimpleNamespace(moe_kernel=None, experts_cls=dict)

    def layer(own: bool) -> Any:
        stock = type("Router", (), {"supports_monolithic_kernels": own})
        router = type("Rerouting", (stock,), {"supports_monolithic_kernels": False})()
        experts = SimpleNamespace(quant_method=method)
        return SimpleNamespace(router=router, moe_config=config, routed_experts=experts)

    assert expert_kernels.of_stock(layer(True)) == "Candidate"
    assert expert_kernels.of_stock(layer(False)) == "dict"  # a router that stock asks this of, too
    assert expert_kernels.difference(["dict"], ["dict"]) is None


def test_a_server_says_it_before_it_says_that_it_has_started(
    caplog: pytest.LogCaptureFixture,
) -> None:
    said: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "lifespan.startup.complete"})

    async def send(message: dict[str, Any]) -> None:
        said.append(caplog.text)

    def start(core: Core, additional: Any) -> str:
        caplog.clear()
        config = engine_config(additional)
        client = SimpleNamespace(engine_core=core)
        state = SimpleNamespace(vllm_config=config, engine_client=client)
        scope = {"type": "lifespan", "app": SimpleNamespace(state=state)}
        asyncio.run(LastWord(app)(scope, None, send))
        return said[-1]

    caplog.set_level(logging.WARNING)
    assert "NOTHING IS RE-ROUTED: because" in start(Core(None, inert="because"), {"sere": {}})
    assert start(Core({"S": 1}), {"sere": {}}) == ""
    assert start(Core(None, inert="because"), {}) == ""  # without sere nobody is asked


def engine_config(additional: Any) -> Any:
    """As much of vLLM's config as is read once an engine has started."""
    return SimpleNamespace(
        additional_config=additional,
        model_config=SimpleNamespace(hf_config=None),
        compilation_config=SimpleNamespace(),
        speculative_config=None,
    )


@pytest.mark.parametrize("started_by", ["LLM", "a server"])
def test_who_may_be_independent_is_asked_of_an_engine_that_finds_its_policy(
    started_by: str,
) -> None:
    """It takes one that `sere tune` has stored in its table, of which its config says nothing."""
    pooled = {"S": 1, "pool": 0.5}
    for policy, refused in ((pooled, None), ({"S": 1}, "it has no pool"), (None, "no pool")):
        config = engine_config({"sere": "auto"})
        check_request(config, "independent")  # not known yet: the engine's core asks again
        core = Core(policy)
        if started_by == "LLM":
            (told,) = asyncio.run(core.call_utility_all_async("collective_rpc", *TELEMETRY))
            engine = SimpleNamespace(vllm_config=config, collective_rpc=lambda _, told=told: told)
            starting(lambda llm: None)(SimpleNamespace(llm_engine=engine))
        else:
            client = SimpleNamespace(engine_core=core)
            state = SimpleNamespace(vllm_config=config, engine_client=client)
            scope = {"type": "lifespan", "app": SimpleNamespace(state=state)}
            asyncio.run(LastWord(complete)(scope, None, silent))
        with nullcontext() if refused is None else pytest.raises(PolicyError, match=refused):
            check_request(config, "independent")


TELEMETRY = ("sere_telemetry", None, (), None)


async def complete(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "lifespan.startup.complete"})


async def silent(message: dict[str, Any]) -> None:
    pass


def test_the_default_beside_a_table_is_cautious_and_said_to_be_nobodys(
    table: Table, table_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Unless somebody names a policy, or a table made without text knows no errors."""

    def asked(path: Path, **named: Any) -> Settings:
        return Settings.parse({"table": str(path), **named}, model_folder=None, model_default={})

    full = Table.load(table_path)
    assert asked(table_path).policy == cautious(full.fingerprint.K) == Policy(tau=0.02)
    assert asked(table_path, S=2).policy == Policy()
    tuned = replace(full, policy=Policy(S=1, tau=0.2, batches={8: {"tau": 0.1}}))
    tuned.save(tmp_path / "tuned")
    assert asked(tmp_path / "tuned").policy == tuned.policy
    unread = {i: replace(layer, tokens=0) for i, layer in full.layers.items()}
    replace(full, layers=unread).save(tmp_path / "unread")
    assert asked(tmp_path / "unread").policy == Policy()

    def said(path: Path, **named: Any) -> list[str]:
        settings = asked(path, **named)
        rows = SimpleNamespace(buffer=torch.zeros(1))
        known = {"settings": settings, "policy": settings.policy, "table": Table.load(path)}
        known |= {"inert": None, "answers": None, "alone": False, "layers": {0: None}, "rows": rows}
        session: Any = SimpleNamespace(**known)
        caplog.clear()
        with caplog.at_level(logging.INFO, "vllm.sere"):
            start_up.say([start_up.description(session, [("CPU", "CPU")])])
        return [record.getMessage() for record in caplog.records]

    assert NOBODYS in said(table_path) and NOBODYS not in said(table_path, S=1)
    few = {i: replace(layer, tokens=9) for i, layer in full.layers.items()}
    replace(full, layers=few).save(tmp_path / "few")
    assert "not to be trusted: layer 0" in said(tmp_path / "few")[-1]
    none = {i: replace(layer, tokens=0) for i, layer in full.layers.items()}
    replace(full, layers=none, method="random").save(tmp_path / "none")
    assert "not to be trusted: made without any text" in said(tmp_path / "none", S=1)[-1]
    assert "not to be trusted" not in str(said(table_path))
    told = said(tmp_path / "tuned")
    assert NOBODYS not in told
    bands = "1 to 7 rows: S=1 tau=0.2; 8 rows or more: S=1 tau=0.1"
    assert told[1] == f"sere: by the rows that a step decodes: {bands}"
