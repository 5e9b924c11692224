"""What being installed does to a fresh process of vLLM, and what a config that asks for re-routing
does: `python -m tests.serving.installed_script PLATFORM` prints it as JSON behind `RESULT`.

PLATFORM: "own" is the one that vLLM finds here, "cuda" lets it take the machine for one with a GPU.
"""

from __future__ import annotations

import importlib
import json
import sys
import warnings
from contextlib import suppress
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

RESULT = "INSTALLED "
Snapshot = dict[str, Any]


def take_for_cuda() -> str:
    """vLLM's own platform with an H100 where its compiled parts are (NVML would say so, and never
    wakes CUDA); else one that says so and can nothing."""
    import vllm.platforms
    from vllm.platforms.interface import DeviceCapability, Platform, PlatformEnum

    class StandIn(Platform):  # type: ignore[misc]
        _enum, device_name, device_type = PlatformEnum.CUDA, "cuda", "cuda"

    base = StandIn
    with suppress(ImportError):
        base = importlib.import_module("vllm.platforms.cuda").NonNvmlCudaPlatform

    class Hopper(base):  # type: ignore[misc, valid-type]
        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> Any:
            return DeviceCapability(9, 0)

        @classmethod
        def get_device_name(cls, device_id: int = 0) -> str:
            return "NVIDIA H100 80GB HBM3"

        @classmethod
        def get_device_total_memory(cls, device_id: int = 0) -> int:
            return 80 * 2**30

    vllm.platforms._current_platform = Hopper()
    return str(base.__name__)


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
    import torch
    import vllm.config
    import vllm.plugins  # both are there wherever vLLM loads plug-ins

    found: dict[str, Any] = {"platform": take_for_cuda() if platform == "cuda" else "own"}
    torch_before, vllm_before, modules = contents("torch"), contents("vllm"), set(sys.modules)
    vllm.plugins.load_general_plugins()
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
