"""Everything private of vLLM that sere relies on, by name and by what needs it.

What re-routing needs must be there, or start-up refuses to re-route; what only another feature
needs stops that feature. `tests/serving/test_contract.py` finds uses that are not named here.
"""

from __future__ import annotations

from sere.serving.contract_cache import CACHE_SYMBOLS, PREFIX_CACHE
from sere.serving.contract_calibration import (
    CALIBRATION_SYMBOLS,
    EXPERTS_CALL,
    SELF_CALIBRATION,
)
from sere.serving.contract_front_end import FRONT_END_NEEDS, FRONT_END_SYMBOLS
from sere.serving.needs import Needs, Where

SUPPORTED = ((0, 32), (0, 34))  # versions of vLLM: from, up to but not including

_MOE = "vllm.model_executor.layers.fused_moe"
_LOADERS = "vllm.model_executor.model_loader"
_PARALLEL = "vllm.distributed.parallel_state"
_KV_CACHE = "vllm.v1.kv_cache_interface"
_V1_DRAFTERS, _V2_DRAFTERS = "vllm.v1.spec_decode", "vllm.v1.worker.gpu.spec_decode"
_CPU_WORKER = ("vllm.v1.worker.cpu_worker", "CPUWorker")
_GPU_WORKER = ("vllm.v1.worker.gpu_worker", "Worker")
_V1, _V2 = "vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.model_runner"

# What is called, wrapped or derived from: name here -> where.
SYMBOLS: dict[str, Where] = (
    FRONT_END_SYMBOLS
    | CACHE_SYMBOLS
    | CALIBRATION_SYMBOLS
    | {
        "VllmConfig": ("vllm.config", "VllmConfig"),
        "get_current_vllm_config": ("vllm.config", "get_current_vllm_config"),
        "get_forward_context": ("vllm.forward_context", "get_forward_context"),
        "create_fused_moe_router": (f"{_MOE}.layer", "create_fused_moe_router"),
        "BaseRouter": (f"{_MOE}.router.base_router", "BaseRouter"),
        "MoERunner": (f"{_MOE}.runner.moe_runner", "MoERunner"),
        "FusedMoEExperts": (f"{_MOE}.modular_kernel", "FusedMoEExperts"),
        "RoutedExperts": (f"{_MOE}.routed_experts", "RoutedExperts"),
        "ModelRunnerV1": (_V1, "GPUModelRunner"),
        "ModelRunnerV2": (_V2, "GPUModelRunner"),
        "WorkerBase": ("vllm.v1.worker.worker_base", "WorkerBase"),
        "Executor": ("vllm.v1.executor.abstract", "Executor"),
        "InputProcessor": ("vllm.v1.engine.input_processor", "InputProcessor"),
        "VLLMValidationError": ("vllm.exceptions", "VLLMValidationError"),
        "get_tp_group": (_PARALLEL, "get_tp_group"),
        "get_dp_group": (_PARALLEL, "get_dp_group"),
        "determine_expert_map": (f"{_MOE}.expert_map_manager", "determine_expert_map"),
        "BaseModelLoader": (f"{_LOADERS}.base_loader", "BaseModelLoader"),
        "model_loaders": (_LOADERS, "_LOAD_FORMAT_TO_MODEL_LOADER"),
        "_rebind_kernels": ("vllm.triton_utils.dispatcher", "_rebind_kernels"),
        "load_general_plugins": ("vllm.plugins", "load_general_plugins"),
        "set_current_vllm_config": ("vllm.config", "set_current_vllm_config"),
        "init_distributed_environment": (_PARALLEL, "init_distributed_environment"),
        "initialize_model_parallel": (_PARALLEL, "initialize_model_parallel"),
        "initialize_model": (f"{_LOADERS}.utils", "initialize_model"),
        "EngineArgs": ("vllm.engine.arg_utils", "EngineArgs"),
        "ModelConfig": ("vllm.config", "ModelConfig"),
    }
)
# Of these, whichever can be imported on a machine are needed there.
BY_DEVICE = ("ModelRunnerV2",)


_REROUTING = Needs(
    called={
        "VllmConfig": ("__post_init__", "compute_hash", "uniform_decode_query_len"),
        "get_current_vllm_config": (),
        "get_forward_context": (),
        "create_fused_moe_router": (),
        "BaseRouter": ("_compute_routing",),
        "MoERunner": ("__init__", "is_monolithic", "layer_id", "do_naive_dispatch_combine"),
        "FusedMoEExperts": ("is_supported_config", "is_monolithic"),
        "ModelRunnerV1": ("_prepare_inputs", "_update_states", "_dummy_run", "capture_model"),
        "ModelRunnerV2": ("prepare_inputs", "add_requests", "_dummy_run", "capture_model"),
        "load_general_plugins": (),
        "WorkerBase": ("__init__", "compile_or_warm_up_model"),
        "Executor": (
            "__init__",
            "initialize_from_config",
            "compile_or_warm_up_model",
            "collective_rpc",
        ),
        "InputProcessor": ("_validate_params",),
        "VLLMValidationError": (),
    },
    read={
        SYMBOLS["MoERunner"]: ("layer_name", "moe_config", "router", "routed_experts"),
        SYMBOLS["RoutedExperts"]: ("quant_method",),
        (f"{_MOE}.fused_moe_method_base", "FusedMoEMethodBase"): ("moe_kernel",),
        (f"{_MOE}.modular_kernel", "FusedMoEKernel"): ("impl",),
        (f"{_MOE}.modular_kernel", "FusedMoEKernelModularImpl"): ("fused_experts",),
        SYMBOLS["BaseRouter"]: ("top_k",),
        (f"{_MOE}.config", "FusedMoEConfig"): ("num_logical_experts",),
        ("vllm.forward_context", "ForwardContext"): ("no_compile_layers",),
        SYMBOLS["ModelRunnerV1"]: ("vllm_config", "input_batch", "drafter"),
        ("vllm.v1.worker.gpu_input_batch", "InputBatch"): (
            "num_reqs",
            "req_ids",
            "num_computed_tokens_cpu",
            "num_prompt_tokens",
        ),
        SYMBOLS["ModelRunnerV2"]: ("vllm_config", "speculator"),
        (f"{_V1_DRAFTERS}.llm_base_proposer", "SpecDecodeBaseProposer"): ("load_model",),
        (f"{_V2_DRAFTERS}.speculator", "DraftModelSpeculator"): ("load_model",),
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
        ("vllm.sampling_params", "SamplingParams"): ("extra_args", "max_tokens"),
        SYMBOLS["InputProcessor"]: ("vllm_config",),
        SYMBOLS["Executor"]: ("vllm_config",),
        SYMBOLS["WorkerBase"]: ("vllm_config", "rank"),
        _CPU_WORKER: ("compile_or_warm_up_model", "load_model", "model_runner"),
        _GPU_WORKER: ("compile_or_warm_up_model", "load_model", "model_runner"),
        SYMBOLS["VllmConfig"]: (
            "additional_config",
            "cache_config",
            "compilation_config",
            "device_config",
            "load_config",
            "model_config",
            "parallel_config",
            "scheduler_config",
            "speculative_config",
        ),
        ("vllm.config", "CompilationConfig"): ("static_forward_context", "cudagraph_capture_sizes"),
        SYMBOLS["ModelConfig"]: (
            "model",
            "revision",
            "is_submodel_config",
            "runner_type",
            "hf_config",
            "hf_text_config",
            "hf_overrides",
            "runner_type",
            "enforce_eager",
            "get_layers_start_end_indices",
            "get_num_experts",
            "get_num_experts_per_tok",
            "get_total_num_hidden_layers",
        ),
        ("vllm.config", "CacheConfig"): ("kv_sharing_fast_prefill",),
        ("vllm.config", "LoadConfig"): ("load_format",),
        ("vllm.config", "DeviceConfig"): ("device", "device_type"),
        ("vllm.config", "ParallelConfig"): (
            "use_sequence_parallel_moe",
            "use_ubatching",
            "prefill_context_parallel_size",
            "pipeline_parallel_size",
            "distributed_executor_backend",
            "world_size",
        ),
        ("vllm.config", "SchedulerConfig"): (
            "max_num_batched_tokens",
            "max_num_seqs",
            "async_scheduling",
        ),
    },
    parameters={
        ("vllm.v1.executor.abstract", "Executor.__init__"): ("self", "vllm_config"),
        ("vllm.v1.worker.worker_base", "WorkerBase.__init__"): ("self", "vllm_config"),
        (_V1, "GPUModelRunner._prepare_inputs"): (
            "self",
            "scheduler_output",
            "num_scheduled_tokens",
        ),
        (_V1, "GPUModelRunner._update_states"): ("self", "scheduler_output"),
        (_V1, "GPUModelRunner._dummy_run"): ("self", "num_tokens"),
        (_V2, "GPUModelRunner.add_requests"): ("self", "scheduler_output"),
        (f"{_MOE}.router.base_router", "BaseRouter._compute_routing"): ("self", "hidden_states"),
        (f"{_MOE}.modular_kernel", "FusedMoEExperts.is_supported_config"): ("cls", "moe_config"),
        ("vllm.v1.engine.input_processor", "InputProcessor._validate_params"): ("self", "params"),
        ("vllm.exceptions", "VLLMValidationError.__init__"): ("self", "message", "parameter"),
    },
)
_SHADOW = Needs(
    called={"get_tp_group": (), "RoutedExperts": ("forward_modular",)},
    read={
        SYMBOLS["MoERunner"]: ("routed_experts",),
        (_PARALLEL, "GroupCoordinator"): ("all_reduce", "broadcast", "rank_in_group"),
        ("vllm.config", "ParallelConfig"): ("data_parallel_size", "enable_eplb"),
    },
    parameters=EXPERTS_CALL,
)
_LINEAR = Needs(
    called={
        "get_tp_group": (),
        "RoutedExperts": ("forward_modular",),
        "MoERunner": ("_fused_output_is_reduced",),
    },
    read={
        SYMBOLS["VllmConfig"]: ("lora_config",),
        SYMBOLS["MoERunner"]: ("routed_experts", "moe_config"),
        SYMBOLS["RoutedExperts"]: ("apply_router_weight_on_input",),
        (f"{_MOE}.config", "FusedMoEConfig"): ("hidden_dim_unpadded", "use_deferred_moe_finalize"),
        (_PARALLEL, "GroupCoordinator"): ("rank_in_group",),
        ("vllm.config", "ParallelConfig"): ("rank",),
        ("vllm.config", "ModelConfig"): ("get_hidden_size",),
    },
    parameters=EXPERTS_CALL,
)
_PLACEMENT = Needs(
    called={"determine_expert_map": ()},
    read={
        SYMBOLS["MoERunner"]: ("routed_experts",),
        SYMBOLS["RoutedExperts"]: ("expert_map_manager",),
        (f"{_MOE}.expert_map_manager", "ExpertMapManager"): (
            "use_ep",
            "ep_size",
            "global_num_experts",
            "placement_strategy",
        ),
        ("vllm.config", "ParallelConfig"): (
            "enable_eplb",
            "enable_expert_parallel",
            "tensor_parallel_size",
            "data_parallel_size",
        ),
    },
)
_UNION = Needs(
    called={"get_dp_group": ()},
    read={
        (_PARALLEL, "GroupCoordinator"): ("device_group",),
        ("vllm.config", "ParallelConfig"): (
            "data_parallel_size",
            "pipeline_parallel_size",
            "enable_eplb",
            "enable_elastic_ep",
            "enable_fault_tolerance",
        ),
    },
)
_SLEEP = Needs(
    called={},  # of the class of worker that an engine has: looked for when it is made
    read={
        SYMBOLS["ModelConfig"]: ("enable_sleep_mode",),
        _CPU_WORKER: ("sleep", "wake_up"),
        _GPU_WORKER: ("sleep", "wake_up"),
    },
    parameters={
        ("vllm.v1.worker.cpu_worker", "CPUWorker.wake_up"): ("self", "tags"),
        ("vllm.v1.worker.gpu_worker", "Worker.wake_up"): ("self", "tags"),
    },
)
_BENCH = Needs(
    called={
        "BaseModelLoader": ("download_model", "load_weights"),
        "model_loaders": (),
    },
    read={
        SYMBOLS["BaseModelLoader"]: ("load_config",),
        ("vllm.config", "LoadConfig"): ("model_loader_extra_config",),
        SYMBOLS["WorkerBase"]: ("device", "model_config"),
        SYMBOLS["ModelConfig"]: ("dtype",),
        SYMBOLS["ModelRunnerV1"]: ("kv_cache_config",),
        SYMBOLS["ModelRunnerV2"]: ("kv_cache_config",),
        (_KV_CACHE, "KVCacheConfig"): ("kv_cache_groups",),
        (_KV_CACHE, "KVCacheGroupSpec"): ("layer_names", "kv_cache_spec"),
        (_KV_CACHE, "KVCacheSpec"): ("block_size", "page_size_bytes"),
        ("vllm.outputs", "RequestOutput"): ("metrics",),
        ("vllm.v1.engine.llm_engine", "LLMEngine"): ("engine_core",),
        ("vllm.v1.engine.core_client", "EngineCoreClient"): ("shutdown",),
        ("vllm.v1.metrics.stats", "RequestStateStats"): ("first_token_ts", "last_token_ts"),
        # The load generator, in a process of its own that says what it lacks.
        ("vllm.benchmarks.serve", "add_cli_args"): (),
        ("vllm.benchmarks.serve", "main"): (),
        ("vllm.utils.argparse_utils", "FlexibleArgumentParser"): ("parse_args",),
    },
    parameters={
        (f"{_LOADERS}.base_loader", "BaseModelLoader.download_model"): ("self", "model_config"),
        (f"{_LOADERS}.base_loader", "BaseModelLoader.load_weights"): (
            "self",
            "model",
            "model_config",
        ),
    },
)
_SECOND_ENGINE = Needs(
    called={"_rebind_kernels": ()},
    parameters={("vllm.triton_utils.dispatcher", "_rebind_kernels"): ("overrides",)},
)
_DOCTOR = Needs(
    called={
        "EngineArgs": ("create_engine_config",),
        "ModelConfig": ("get_num_experts",),
        "set_current_vllm_config": (),
        "init_distributed_environment": (),
        "initialize_model_parallel": (),
        "initialize_model": (),
    },
    read={SYMBOLS["ModelConfig"]: ("dtype",)},
    parameters={
        (_PARALLEL, "init_distributed_environment"): (
            "world_size",
            "rank",
            "distributed_init_method",
            "local_rank",
            "backend",
        ),
        (f"{_LOADERS}.utils", "initialize_model"): ("vllm_config",),
    },
)

REROUTING, PLACEMENT, UNION, CALIBRATION = "re-routing", "placement", "union", "self-calibration"
LINEAR = "linear stand-ins"
NEEDS: dict[str, Needs] = {
    REROUTING: _REROUTING,
    "shadow": _SHADOW,
    PLACEMENT: _PLACEMENT,
    UNION: _UNION,
    CALIBRATION: SELF_CALIBRATION,
    LINEAR: _LINEAR,
    **FRONT_END_NEEDS,
    "prefix cache": PREFIX_CACHE,
    "sleep mode": _SLEEP,
    "bench": _BENCH,
    "a second engine": _SECOND_ENGINE,
    "doctor": _DOCTOR,
}
