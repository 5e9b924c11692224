"""Switching a running server: off, on, to another policy; who may, and what is refused."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sere.cli import main
from sere.demo_model.tasks import examples
from sere.policy import PolicyError
from sere.serving import frontend, switch
from sere.serving.admin_key import VARIABLE, admin_key, check_admin_key
from sere.serving.settings import Settings
from tests.servers import ADMIN_KEY, Server
from tests.serving.test_telemetry import samples, value

PROMPTS = [e.prompt for e in examples(12, seed=11, split="held_out")]
KEY = {"Authorization": f"Bearer {ADMIN_KEY}"}
K, S = 4, 3  # of the model, and of the policy that the shared server begins with

# --- a real server --------------------------------------------------------------------------------


@pytest.fixture
def on(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """The shared server, which routes afterwards as it began; its key is in the environment."""
    monkeypatch.setenv(VARIABLE, ADMIN_KEY)
    yield server
    assert main(["switch", server.url, "on"]) == 0


def figures(server: Server) -> dict[str, float]:
    asyncio.run(asyncio.sleep(frontend.FRESH_S))
    text = server.get("/metrics")
    names = ("sere_enabled", "sere_policy_on", "sere_policy_switches_total")
    counters = ("sere_slots_rerouted_total", "sere_slots_total")
    return {
        **{name: value(text, name, engine=0) for name in names},
        **{name: value(text, name, layer=0) for name in counters},
        "S": json.loads(policy)["S"] if (policy := policy_in(text)) != "stock" else K,
    }


def policy_in(metrics: str) -> str:
    (told,) = [dict(labels) for name, labels in samples(metrics) if name == "sere_policy_info"]
    return told["policy"]


@pytest.mark.engine
@pytest.mark.modes
def test_an_operator_switches_off_and_on(on: Server, capsys: pytest.CaptureFixture[str]) -> None:
    """While it is off every answer is that of an exact request and nothing is counted."""

    def answers(**more: Any) -> list[str]:
        return [one["text"] for one in on.complete(PROMPTS, 10, ignore_eos=True, **more)["choices"]]

    exact = answers(vllm_xargs={"sere": "exact"}, cache_salt="exact")
    before = figures(on)
    assert main(["switch", on.url, "off"]) == 0
    told = "engine 0: stock, NOTHING IS RE-ROUTED: routing is stock\n"
    assert capsys.readouterr().out == told
    assert answers(cache_salt="off") == exact
    off = figures(on)
    assert off["sere_enabled"] == off["sere_policy_on"] == 0
    assert off["sere_slots_total"] == before["sere_slots_total"]

    assert main(["switch", on.url, "on", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["0"]["policy"]["S"] == S
    answers(cache_salt="on")
    again = figures(on)
    assert again["sere_enabled"] == again["sere_policy_on"] == 1
    assert again["S"] == S
    assert again["sere_slots_rerouted_total"] > off["sere_slots_rerouted_total"]
    assert again["sere_policy_switches_total"] == before["sere_policy_switches_total"] + 2


@pytest.mark.engine
@pytest.mark.modes
def test_another_policy_is_told_by_those_who_ask(
    on: Server, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "key").write_text(f"{ADMIN_KEY}\n")
    from_file = ["--key-file", str(tmp_path / "key")]
    assert main(["switch", on.url, '{"S": 1, "rho": 0.25}', *from_file]) == 0
    assert main(["switch", f"{on.url}/v1", "--json"]) == 0
    told, asked = capsys.readouterr().out.splitlines()
    assert told == 'engine 0: {"S": 1, "rho": 0.25, "rows": "decode"}'
    assert json.loads(asked)["0"]["enabled"]
    assert figures(on)["S"] == 1
    # S=K moves nothing, and says so.
    assert main(["switch", on.url, json.dumps({"S": K})]) == 0
    assert "NOTHING IS RE-ROUTED: S=4 keeps all of a token's 4" in capsys.readouterr().out
    assert figures(on)["sere_enabled"] == 0 < figures(on)["sere_policy_on"]


@pytest.mark.engine
@pytest.mark.modes
@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        ('{"S": 9}', "S=9 exceeds the 4 experts per token of this model"),
        ('{"s": 1}', "unknown key 's'; did you mean 'S'?"),
        ('{"layers": {"17": {"S": 1}}}', "layers [17] of the policy are not among [0, 1, 2, 3]"),
    ],
)
def test_what_cannot_be_switched_to_is_refused_and_all_goes_on(
    policy: str, reason: str, on: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    before = figures(on)
    assert main(["switch", on.url, policy]) == 1
    said = capsys.readouterr().err
    assert reason in said
    assert said.count("\n") == 1
    on.complete(PROMPTS, 5)
    after = figures(on)
    for name in ("S", "sere_enabled", "sere_policy_switches_total"):
        assert after[name] == before[name]


@pytest.mark.engine
@pytest.mark.modes
def test_nobody_switches_without_the_key(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": ADMIN_KEY}):
        status, said = server.post(switch.PATH, {"policy": None}, **headers)
        assert (status, "key is missing or wrong" in said) == (401, True)
    assert figures(server)["sere_policy_on"] == 1
    monkeypatch.setenv(VARIABLE, "wrong")
    assert main(["switch", server.url, "off"]) == 1
    assert "the key is missing or wrong" in capsys.readouterr().err
    monkeypatch.delenv(VARIABLE)
    assert main(["switch", server.url, "off"]) == 1
    assert "no key: give the server's" in capsys.readouterr().err


# --- several engines, files of keys ---------------------------------------------------------------


class Core:
    """As much of vLLM's engine-core client as is called, with engines that each have a policy."""

    def __init__(
        self, *policies: Any, refusing: int | None = None, inert: str | None = None
    ) -> None:
        self.policies = list(policies)
        self.inert = inert
        self.refusing = refusing
        self.engine_ranks_managed = list(range(len(policies)))
        self.silent = False

    async def call_utility_all_async(self, call: str, method: str, *rest: Any) -> list[Any]:
        assert call == "collective_rpc"
        _, args, _ = rest
        if self.silent:
            await asyncio.sleep(60)
        if method == "sere_telemetry":
            state = {"inert": self.inert, "fallback": None, "E": 8, "K": 4}
            return [[{"policy": policy, **state}] for policy in self.policies]
        if method == "sere_obstacle":
            ranks = self.engine_ranks_managed
            return [[None, "cannot" if rank == self.refusing else None] for rank in ranks]
        assert method == "sere_policy"
        self.policies = [args[0]] * len(self.policies)
        return [[None, None]] * len(self.policies)


def ask(core: Core, settings: dict[str, Any], *requests: tuple[Any, ...]) -> list[tuple[int, Any]]:
    """What a server answers: status and JSON of (method, body, headers) each."""
    from fastapi import FastAPI
    from httpx import ASGITransport, AsyncClient

    app = FastAPI()
    app.add_middleware(switch.Switch)
    app.state.vllm_config = SimpleNamespace(additional_config={"sere": settings})
    app.state.engine_client = SimpleNamespace(engine_core=core)

    async def answers() -> list[tuple[int, Any]]:
        async with AsyncClient(transport=ASGITransport(app), base_url="http://test") as client:
            found = []
            for method, content, headers in requests:
                answer = await client.request(method, switch.PATH, content=content, headers=headers)
                found.append((answer.status_code, answer.json()))
            return found

    return asyncio.run(answers())


OFF = ("POST", '{"policy": null}', KEY)


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, ADMIN_KEY)


def test_without_a_key_there_is_no_such_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    core = Core({"S": 1})
    assert ask(core, {}, OFF) == [(404, {"detail": "Not Found"})]
    assert core.policies == [{"S": 1}]


def test_all_engines_switch_or_none(key: None) -> None:
    core = Core({"S": 1}, {"S": 1}, refusing=1)
    assert ask(core, {}, OFF) == [(400, {"error": "cannot"})]
    assert core.policies == [{"S": 1}] * 2
    core.refusing = None
    ((status, answer),) = ask(core, {}, OFF)
    assert (status, list(answer["engines"])) == (200, ["0", "1"])
    assert core.policies == [None, None]


def test_an_engine_that_is_silent_is_not_waited_for_for_ever(
    key: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(switch, "ANSWER_S", 0.01)
    core = Core({"S": 1})
    core.silent = True
    ((status, answer),) = ask(core, {}, OFF)
    assert status == 504
    assert "no answer in" in answer["error"]


@pytest.mark.parametrize(
    ("method", "body", "status", "reason"),
    [
        ("POST", "{", 400, "not JSON"),
        ("POST", "[" * 100_000, 400, "not JSON"),
        ("POST", "[]", 400, 'expected {"policy": null}'),
        ("POST", '{"policy": null, "also": 1}', 400, 'expected {"policy": null}'),
        ("POST", " " * (switch._LARGEST + 1), 413, "more than"),
        ("PUT", "{}", 405, "expected GET or POST"),
    ],
)
def test_what_is_no_switch_is_answered_in_a_sentence(
    method: str, body: str, status: int, reason: str, key: None
) -> None:
    core = Core({"S": 1})
    ((found, answer),) = ask(core, {}, (method, body, KEY))
    assert found == status
    assert reason in answer["error"]
    assert core.policies == [{"S": 1}]


def test_a_keys_file_is_read_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another key holds at once; without a file nobody gets in."""
    monkeypatch.delenv(VARIABLE, raising=False)
    file = tmp_path / "key"
    settings, core = {"admin_key_file": str(file)}, Core({"S": 1})
    file.write_text(f"{ADMIN_KEY}\n")
    assert ask(core, settings, ("GET", None, KEY))[0][0] == 200
    file.write_text("another key, as long as one must be")
    assert ask(core, settings, ("GET", None, KEY))[0][0] == 401
    file.unlink()
    assert ask(core, settings, ("GET", None, KEY))[0][0] == 404


def test_who_switched_what_is_logged_and_the_key_is_not(
    key: None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    ask(
        Core({"S": 1, "rho": 0.5}), {}, OFF, ("POST", "{}", {"Authorization": "Bearer guess-guess"})
    )
    assert (
        "127.0.0.1 switched the policy (before, after): {'0': ('S=1 rho=0.5', 'stock')}"
        in caplog.text
    )
    assert "/sere/policy was called with a wrong key by 127.0.0.1" in caplog.text
    assert ADMIN_KEY not in caplog.text and "guess-guess" not in caplog.text


def test_what_is_no_key_is_refused_at_start_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert admin_key({}) is None
    with pytest.raises(PolicyError, match="absent: cannot be read"):
        check_admin_key({"admin_key_file": str(tmp_path / "absent")})
    with pytest.raises(PolicyError, match="admin_key_file=3: expected the path"):
        check_admin_key({"admin_key_file": 3})
    (tmp_path / "short").write_text("short\n")
    with pytest.raises(PolicyError, match="holds 5 bytes, expected a key of 16 or more"):
        check_admin_key({"admin_key_file": str(tmp_path / "short")})
    (tmp_path / "key").write_text(ADMIN_KEY)
    (tmp_path / "key").chmod(0o644)
    check_admin_key({"admin_key_file": str(tmp_path / "key")})
    assert "can be read by other users" in caplog.text
    monkeypatch.setenv(VARIABLE, ADMIN_KEY)
    with pytest.raises(PolicyError, match="keep one of the two"):
        check_admin_key({"admin_key_file": str(tmp_path / "key")})


def test_a_model_cannot_open_the_route(table_path: Path) -> None:
    with pytest.raises(PolicyError, match="a model may not open a route"):
        Settings.parse(
            {"table": str(table_path)},
            model_folder=None,
            model_default={"admin_key_file": "/etc/hostname"},
        )
