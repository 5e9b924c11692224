"""Every private symbol of vLLM that sere relies on is named, and looked up in released versions."""

from __future__ import annotations

import importlib.util
import json
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

import sere
from sere.serving import contract
from sere.serving.contract import NEEDS, REROUTING, SYMBOLS
from sere.serving.symbols import vllm_version
from tests.serving.vllm_uses import uses_of

ROOT = Path(__file__).parents[2]
RESULT = json.loads((ROOT / "benchmarks/results/vllm_contract.json").read_text())
SERVING = Path(sere.__file__).parent / "serving"

# --- every use is named --------------------------------------------------------------------------

# `vllm` itself; its loggers; what is run as a module, of which the contract names a function.
PUBLIC = {"LLM", "SamplingParams"}
LOGGER = "vllm.sere"
# What sere keeps on vLLM's objects, and what is ASGI's, Python's, torch's or transformers'.
OURS = {"sere", "_sere", "sere_stats"}
OURS |= {"_MARK", "_CAP", "_ATTRIBUTE", "_OWNED", "KEY", "name"}  # variables that name an attribute
OURS |= {"_REFUSED", "_OBSTACLE"}
# Of a keyed hasher of ours; the last is a function that is named by where it is.
OURS |= {"plain", "key", "start", "hex", "clear", "generate_block_hash_extra_keys"}
ASGI = {"state", "add_middleware"}
OTHERS = {
    "require_decomposed_backend",  # written, on a copy: vLLM 0.33 has it
    "experts_cls",  # of those methods that let an oracle choose
    "architectures",
    "do_not_compile",  # of modules of a decorated class, where they have it
    "modules",
    "approximate_experts",
    "compression_config",
    "__name__",
    "__globals__",
    "get",
    "values",
    "tolist",
    "clone",
    "rstrip",
    "split",
}
FILES = [file for file in sorted(SERVING.glob("*.py")) if not file.stem.startswith("contract")]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_use_of_vllm_is_in_the_contract(file: Path) -> None:
    used = uses_of(file)
    wheres = [*SYMBOLS.values(), *(where for needs in NEEDS.values() for where in needs.read)]
    named = {
        member
        for needs in NEEDS.values()
        for members in (*needs.called.values(), *needs.read.values())
        for member in members
    }
    assert used.imported <= PUBLIC
    assert used.symbols <= set(SYMBOLS)
    assert used.modules <= {module for module, _ in wheres} | {LOGGER}
    assert used.attributes <= named | set(SYMBOLS) | OURS | ASGI | OTHERS


def test_every_symbol_is_used_and_needed() -> None:
    used = set().union(*(uses_of(file).symbols for file in FILES))
    needed = {name for needs in NEEDS.values() for name in needs.called}
    assert needed == set(SYMBOLS)
    through_instances = {"BaseRouter", "RoutedExperts", "AsyncMPClient", "ModelConfig"}
    assert needed - used == through_instances


def test_the_scan_finds_what_it_should(tmp_path: Path) -> None:
    file = tmp_path / "new.py"
    file.write_text(
        """
from typing import Any
from vllm import LLM
from vllm.v1.core import thing
MODULE = "python -m vllm.somewhere.else"
def f(config: Any, own: int) -> Any:
    parallel = config.parallel_config
    own.not_vllm
    config.sere.not_vllm
    def inner(batch: Any) -> None:
        for request in batch.requests:
            getattr(request, "hidden") + parallel.new_field
    wrap(symbol("New"), "wrapped", inner)
    return [x.read for x in symbol("Other").all]
"""
    )
    found = uses_of(file)
    assert found.imported == {"LLM"}
    assert found.modules == {"vllm.v1.core", "vllm.somewhere.else"}
    assert found.symbols == {"New", "Other"}
    expected = "parallel_config sere requests hidden new_field wrapped all read"
    assert found.attributes == set(expected.split())


# --- every named symbol is looked up -------------------------------------------------------------


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("contract", ROOT / "tools/vllm_contract.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def installed() -> Path:
    return Path(str(import_module("vllm").__file__)).parent.parent


def test_the_installed_version_has_everything(tool: ModuleType, installed: Path) -> None:
    assert tool.missing(installed) == {}
    assert tool.version(installed) == vllm_version()


def test_what_is_gone_is_named_by_who_needs_it(
    tool: ModuleType, installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner")
    rerouting, shadow = NEEDS[REROUTING], NEEDS["shadow"]
    monkeypatch.setitem(SYMBOLS, "gone", ("vllm.nowhere", "Gone"))
    monkeypatch.setitem(rerouting.called, "gone", ())
    monkeypatch.setitem(rerouting.called, "ModelRunnerV1", ("_dummy_run", "_gone"))
    monkeypatch.setitem(rerouting.parameters, (runner[0], f"{runner[1]}._dummy_run"), ("self", "n"))
    monkeypatch.setitem(shadow.read, ("vllm.config", "CacheConfig"), ("gone_too",))
    assert tool.missing(installed) == {
        REROUTING: [
            ".".join(runner) + "._gone",
            "vllm.nowhere.Gone",
            ".".join(runner) + "._dummy_run(self, n)",
        ],
        "shadow": ["vllm.config.CacheConfig.gone_too"],
    }


def test_the_committed_result_is_of_this_contract(tool: ModuleType) -> None:
    """After a change of the contract: run tools/vllm_contract.py on every version's sources."""
    assert RESULT["looked_for"] == tool.contract()


def test_supported_versions_are_those_that_keep_the_contract() -> None:
    """All of it: every feature works with every supported version."""
    low, high = contract.SUPPORTED
    for version, missing in RESULT["missing"].items():
        release = tuple(map(int, version.split(".")[:2]))
        assert (low <= release < high) == (not missing), version
    assert {"0.26.0", "0.32.0", "0.33.0"} <= set(RESULT["missing"])
