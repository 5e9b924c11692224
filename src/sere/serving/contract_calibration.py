"""What an engine that calibrates itself relies on in vLLM; see `contract`."""

from __future__ import annotations

from sere.serving.needs import Needs, Where

_MOE = "vllm.model_executor.layers.fused_moe"
EXPERTS_CALL: dict[Where, tuple[str, ...]] = {
    (f"{_MOE}.routed_experts", "RoutedExperts.forward_modular"): (
        "self",
        "x",
        "topk_weights",
        "topk_ids",
    )
}
"""How a layer's experts are called, by three features."""
_OUTPUT = "vllm.v1.core.sched.output"
_KV_CACHE = "vllm.v1.kv_cache_interface"
_CPU_WORKER = ("vllm.v1.worker.cpu_worker", "CPUWorker")
_GPU_WORKER = ("vllm.v1.worker.gpu_worker", "Worker")

CALIBRATION_SYMBOLS: dict[str, Where] = {
    "SchedulerOutput": (_OUTPUT, "SchedulerOutput"),
    "NewRequestData": (_OUTPUT, "NewRequestData"),
    "cached_tokenizer_from_config": ("vllm.tokenizers.registry", "cached_tokenizer_from_config"),
    "set_forward_context": ("vllm.forward_context", "set_forward_context"),
    "FlexibleArgumentParser": ("vllm.utils.argparse_utils", "FlexibleArgumentParser"),
}
SELF_CALIBRATION = Needs(
    called={
        "SchedulerOutput": ("make_empty",),
        "NewRequestData": (),
        "cached_tokenizer_from_config": (),
        "get_tp_group": (),
        "set_forward_context": (),
        "EngineArgs": ("add_cli_args", "from_cli_args"),
        "LLMEngine": ("from_engine_args", "collective_rpc"),
        "FlexibleArgumentParser": ("parse_args",),
        "RoutedExperts": ("forward_modular",),
    },
    read={
        CALIBRATION_SYMBOLS["SchedulerOutput"]: (
            "scheduled_new_reqs",
            "num_scheduled_tokens",
            "total_num_scheduled_tokens",
            "finished_req_ids",
            "scheduled_cached_reqs",
        ),
        (_OUTPUT, "CachedRequestData"): (
            "req_ids",
            "new_block_ids",
            "num_computed_tokens",
            "num_output_tokens",
        ),
        ("vllm.model_executor.models.interfaces_base", "VllmModelForTextGeneration"): (
            "compute_logits",
        ),
        (f"{_MOE}.runner.moe_runner", "MoERunner"): (
            "routed_experts",
            "routed_output_transform",
            "_fused_output_is_reduced",
        ),
        (f"{_MOE}.routed_experts", "RoutedExperts"): (
            "quant_config",
            "apply_router_weight_on_input",
        ),
        ("vllm.distributed.parallel_state", "GroupCoordinator"): (
            "all_reduce",
            "broadcast_object",
        ),
        _CPU_WORKER: ("execute_model", "sample_tokens", "get_model", "model_runner"),
        _GPU_WORKER: ("execute_model", "sample_tokens", "get_model", "model_runner"),
        ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner"): ("kv_cache_config",),
        (_KV_CACHE, "KVCacheConfig"): ("kv_cache_groups", "num_blocks"),
        (_KV_CACHE, "KVCacheGroupSpec"): ("kv_cache_spec",),
        (_KV_CACHE, "KVCacheSpec"): ("block_size",),
        ("vllm.v1.engine.llm_engine", "LLMEngine"): ("engine_core",),
        ("vllm.v1.engine.core_client", "EngineCoreClient"): ("shutdown",),
        ("vllm.engine.arg_utils", "EngineArgs"): ("additional_config", "enforce_eager"),
        ("vllm.config", "CompilationConfig"): (
            "cudagraph_mode",
            "max_cudagraph_capture_size",
        ),
        ("vllm.config", "CUDAGraphMode"): ("mixed_mode",),
        ("vllm.config", "VllmConfig"): ("lora_config", "kv_transfer_config"),
        ("vllm.config", "ParallelConfig"): (
            "data_parallel_size",
            "decode_context_parallel_size",
            "enable_eplb",
            "tensor_parallel_size",
        ),
        ("vllm.config", "ModelConfig"): (
            "dtype",
            "is_encoder_decoder",
            "max_model_len",
            "quantization",
            "skip_tokenizer_init",
        ),
    },
    parameters=EXPERTS_CALL,
)
