"""What the prefix cache relies on: the part of `contract` that is about vLLM's scheduler."""

from __future__ import annotations

from sere.serving.needs import Needs, Where

_SCHEDULER = "vllm.v1.core.sched.scheduler"

CACHE_SYMBOLS: dict[str, Where] = {
    "EngineCore": ("vllm.v1.engine.core", "EngineCore"),
    "EngineCoreRequest": ("vllm.v1.engine", "EngineCoreRequest"),
    "Scheduler": (_SCHEDULER, "Scheduler"),
    "generate_block_hash_extra_keys": ("vllm.v1.core.block_pool", "generate_block_hash_extra_keys"),
    "offload_event_keys": (
        "vllm.v1.simple_kv_offload.manager",
        "generate_block_hash_extra_keys",
    ),
}
PREFIX_CACHE = Needs(
    called={
        "EngineCore": ("preprocess_add_request", "collective_rpc"),
        "EngineCoreRequest": (),
        "Scheduler": ("_update_request_as_session", "_free_request_blocks"),
        "generate_block_hash_extra_keys": (),
        "offload_event_keys": (),
    },
    read={
        CACHE_SYMBOLS["EngineCore"]: (
            "vllm_config",
            "mm_receiver_cache",
            "request_block_hasher",
            "scheduler",
        ),
        CACHE_SYMBOLS["Scheduler"]: (
            "vllm_config",
            "hash_block_size",
            "encoder_cache_manager",
            "aux_output_connector",
        ),
        ("vllm.v1.request", "Request"): (
            "_block_hasher",
            "block_hashes",
            "update_block_hashes",
            "append_output_token_ids",
            "all_token_ids",
            "num_tokens",
            "num_prompt_tokens",
            "num_computed_tokens",
            "sampling_params",
        ),
        ("vllm.v1.request", "StreamingUpdate"): ("sampling_params",),
        ("vllm.v1.core.encoder_cache_manager", "EncoderCacheManager"): ("free",),
        (
            "vllm.distributed.aux_output_connector.connector",
            "AuxOutputSchedulerConnector",
        ): ("request_finished",),
        ("vllm.config", "VllmConfig"): ("kv_transfer_config", "kv_events_config"),
        ("vllm.config", "CacheConfig"): ("enable_prefix_caching", "num_gpu_blocks"),
        ("vllm.config", "KVTransferConfig"): (
            "kv_connector",
            "kv_connector_module_path",
            "kv_connector_extra_config",
        ),
        ("vllm.config", "KVEventsConfig"): ("enable_kv_cache_events",),
    },
    parameters={
        ("vllm.v1.engine.core", "EngineCore.preprocess_add_request"): ("self", "request"),
        ("vllm.v1.engine.core", "EngineCore.collective_rpc"): ("self", "method"),
        (_SCHEDULER, "Scheduler._update_request_as_session"): ("self", "session", "update"),
        (_SCHEDULER, "Scheduler._free_request_blocks"): ("self", "request"),
    },
)
