"""What being installed does to a fresh process of vLLM, and what a config that asks for re-routing
does: `python -m tests.serving.installed_script PLATFORM` prints it as JSON behind `RESULT`.

PLATFORM: "own" is the one that vLLM finds here, "cuda" lets it take the machine for one with a GPU.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
import warnings
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

from tests.serving.cuda_platform import take_for_cuda

RESULT = "INSTALLED "
Snapshot = dict[str, Any]


def contents(package: str) -> Snapshot:
    """What the loaded modules of a package hold, and the methods of its classes."""
    found: Snapshot = {}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] != package or not isinstance(module, ModuleType):
            continue
        for key, value in list(vars(module).items()):
            found[f"{name}.{key}"] = value
            if isinstance(value, type) and value.__module__.split(".")[0] == package:
                methods = {k: v for k, v in list(vars(value).items()) if callable(v)}
                where = f"{value.__module__}.{value.__qualname__}"
                found |= {f"{where}.{k}": v for k, v in methods.items()}
    return found


def changed(before: Snapshot) -> list[str]:
    """What is another object now, or gone."""
    now = contents(next(iter(before)).split(".")[0])
    return sorted(name for name, value in before.items() if now.get(name) is not value)


def main(platform: str) -> None:
    warnings.simplefilter("ignore")
    began = time.perf_counter()
    import torch
    import vllm.config
    import vllm.plugins  # both are there wherever vLLM loads plug-ins

    imported = time.perf_counter() - began
    found: dict[str, Any] = {"platform": take_for_cuda() if platform == "cuda" else "own"}
    torch_before, vllm_before, modules = contents("torch"), contents("vllm"), set(sys.modules)
    began = time.perf_counter()
    vllm.plugins.load_general_plugins()
    found["milliseconds"] = {
        "vllm.config, before": round(1e3 * imported),
        "load_general_plugins": round(1e3 * (time.perf_counter() - began)),
    }
    found["modules"] = sorted(set(sys.modules) - modules)
    found["torch"] = changed(torch_before)
    found["vllm"] = changed(vllm_before)

    # An engine that does not ask: vLLM loads its parts, and plug-ins again, and makes a config.
    found["not importable"] = {}
    for where, _ in importlib.import_module("sere.serving.contract").SYMBOLS.values():
        try:
            importlib.import_module(where)
        except (ImportError, AttributeError) as error:
            found["not importable"][where] = str(error)
    vllm_before = contents("vllm")
    vllm.plugins.load_general_plugins()
    if platform == "own":
        vllm.config.VllmConfig()
    found["vllm, not asked"] = changed(vllm_before)

    # A config that asks and was made in another process: no more than an executor is given it.
    class Executor(vllm.v1.executor.abstract.Executor):  # type: ignore[misc]
        _init_executor = check_health = collective_rpc = lambda self: None

    found["refused"] = None
    try:
        Executor(MagicMock(additional_config={"sere": {}}))
    except RuntimeError as error:
        found["refused"] = str(error)
    found["vllm, asked"] = changed(vllm_before)
    found["torch, asked"] = changed(torch_before)
    found["CPU worker"] = "vllm.v1.worker.cpu_worker" in sys.modules
    found["CUDA initialised"] = torch.cuda.is_initialized()
    print(RESULT + json.dumps(found), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
