"""The part of `contract` that is of front ends: servers, `LLM`, and what they hand over."""

from __future__ import annotations

from sere.serving.needs import Needs, Where

_CORE_CLIENT = "vllm.v1.engine.core_client"
_BEAM = "vllm.entrypoints.generate.beam_search"
_OPENAI, _SPEECH = "vllm.entrypoints.openai", "vllm.entrypoints.speech_to_text"

FRONT_END_SYMBOLS: dict[str, Where] = {
    "attach_router": ("vllm.entrypoints.serve.instrumentator.metrics", "attach_router"),
    "AsyncMPClient": (_CORE_CLIENT, "AsyncMPClient"),
    "AsyncLLM": ("vllm.v1.engine.async_llm", "AsyncLLM"),
    "LLMEngine": ("vllm.v1.engine.llm_engine", "LLMEngine"),
    "RustFrontendProcessManager": ("vllm.v1.utils", "RustFrontendProcessManager"),
    "PoolingOfflineMixin": ("vllm.entrypoints.pooling.offline", "PoolingOfflineMixin"),
    "EngineCore": ("vllm.v1.engine.core", "EngineCore"),
    "BeamSearchOnlineMixin": (f"{_BEAM}.online", "BeamSearchOnlineMixin"),
    "BeamSearchOfflineMixin": (f"{_BEAM}.offline", "BeamSearchOfflineMixin"),
    "CompletionRequest": (f"{_OPENAI}.completion.protocol", "CompletionRequest"),
    "ChatCompletionRequest": (f"{_OPENAI}.chat_completion.protocol", "ChatCompletionRequest"),
    "OpenAIServingResponses": (f"{_OPENAI}.responses.serving", "OpenAIServingResponses"),
    "TranscriptionRequest": (f"{_SPEECH}.transcription.protocol", "TranscriptionRequest"),
    "TranslationRequest": (f"{_SPEECH}.translation.protocol", "TranslationRequest"),
}

_METRICS = Needs(
    called={
        "attach_router": (),
        "AsyncLLM": (),
        "AsyncMPClient": ("call_utility_all_async",),
    },
    read={
        FRONT_END_SYMBOLS["AsyncLLM"]: ("engine_core",),
        FRONT_END_SYMBOLS["AsyncMPClient"]: ("engine_ranks_managed",),
        # What this function stores in the application's state.
        ("vllm.entrypoints.openai.api_server", "init_app_state"): ("engine_client", "vllm_config"),
    },
    parameters={(_CORE_CLIENT, "AsyncMPClient.call_utility_all_async"): ("self", "method")},
)
_LAST = Needs(
    called={"PoolingOfflineMixin": ("__init__",), "LLMEngine": ("collective_rpc",)},
    read={
        FRONT_END_SYMBOLS["LLMEngine"]: ("vllm_config",),
        ("vllm.entrypoints.llm", "LLM"): ("llm_engine",),
    },
)
_RUST = Needs(
    called={"RustFrontendProcessManager": ("__init__",)},
    read={("vllm.engine.arg_utils", "EngineArgs"): ("additional_config",)},
    parameters={
        ("vllm.v1.utils", "RustFrontendProcessManager.__init__"): (
            "self",
            "binary_path",
            "sock",
            "args",
        )
    },
)
_ROUTES = Needs(
    called={
        "AsyncLLM": ("generate", "add_request"),
        "LLMEngine": ("add_request",),
        "BeamSearchOnlineMixin": ("beam_search",),
        "BeamSearchOfflineMixin": ("beam_search",),
        "CompletionRequest": ("to_beam_search_params", "to_sampling_params"),
        "ChatCompletionRequest": ("to_beam_search_params", "to_sampling_params"),
        "TranscriptionRequest": ("to_beam_search_params",),
        "TranslationRequest": ("to_beam_search_params",),
    },
    read={
        ("vllm.engine.protocol", "EngineClient"): ("vllm_config",),
        FRONT_END_SYMBOLS["LLMEngine"]: ("vllm_config",),
        FRONT_END_SYMBOLS["BeamSearchOnlineMixin"]: ("engine_client",),
        ("vllm.entrypoints.llm", "LLM"): ("llm_engine",),
        FRONT_END_SYMBOLS["CompletionRequest"]: ("vllm_xargs",),
        FRONT_END_SYMBOLS["ChatCompletionRequest"]: ("vllm_xargs",),
        FRONT_END_SYMBOLS["TranscriptionRequest"]: ("vllm_xargs",),
        FRONT_END_SYMBOLS["TranslationRequest"]: ("vllm_xargs",),
        ("vllm.v1.engine", "EngineCoreRequest"): ("sampling_params",),
    },
    parameters={
        (f"{_BEAM}.online", "BeamSearchOnlineMixin.beam_search"): (
            "self",
            "prompt",
            "request_id",
            "params",
        ),
        (f"{_BEAM}.offline", "BeamSearchOfflineMixin.beam_search"): ("self", "prompts", "params"),
    },
)
_RESPONSES = Needs(
    called={"OpenAIServingResponses": ("create_responses",)},
    read={
        FRONT_END_SYMBOLS["OpenAIServingResponses"]: ("engine_client",),
        ("vllm.entrypoints.openai.responses.protocol", "ResponsesRequest"): ("vllm_xargs",),
    },
    parameters={
        (f"{_OPENAI}.responses.serving", "OpenAIServingResponses.create_responses"): (
            "self",
            "request",
        )
    },
)
_CORE = Needs(
    called={"EngineCore": ("preprocess_add_request",)},
    read={
        FRONT_END_SYMBOLS["EngineCore"]: ("vllm_config",),
        ("vllm.v1.engine", "EngineCoreRequest"): ("sampling_params",),
    },
    parameters={("vllm.v1.engine.core", "EngineCore.preprocess_add_request"): ("self", "request")},
)

RUST = "the front end in Rust"
LAST = "the last word before it serves"
METRICS, ROUTES, CORE = "metrics", "tiers on every route", "tiers from other front ends"
RESPONSES = "tiers of responses that are streamed"
FRONT_END_NEEDS: dict[str, Needs] = {
    METRICS: _METRICS,
    LAST: _LAST,
    RUST: _RUST,
    ROUTES: _ROUTES,
    RESPONSES: _RESPONSES,
    CORE: _CORE,
}
