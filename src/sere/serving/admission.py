"""What a request may ask for is checked on every way into the engine, before a worker sees it.

All of an API server's routes call `AsyncLLM.generate`, which is checked at the call: a stream has
not begun then, and the answer is HTTP 400. `LLM` calls `LLMEngine.add_request`. Both take requests
that were made elsewhere. A beam search makes requests of its own, which ask for what it was asked.
What comes from other front ends (vLLM's in Rust) meets the check in the engine.
"""

from __future__ import annotations

import asyncio
import functools
import json
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextvars import ContextVar
from typing import Any

from sere.policy import PolicyError
from sere.serving.asking import KEY, asked_by
from sere.serving.contract_front_end import CORE, RESPONSES, ROUTES
from sere.serving.may_ask import check_request
from sere.serving.symbols import lacking, symbol, wrap

_LOG = logging.getLogger("vllm.sere")

# What the beam search asked for whose steps are being made.
_BEAM: ContextVar[Any] = ContextVar("sere_beam", default=None)


@functools.cache
def wrap_front_end() -> None:
    """In a process that makes an engine's config."""
    if not _has(ROUTES):
        return
    wrap(symbol("AsyncLLM"), "generate", _calling)
    wrap(symbol("AsyncLLM"), "add_request", _calling)
    wrap(symbol("LLMEngine"), "add_request", _calling)
    wrap(symbol("BeamSearchOnlineMixin"), "beam_search", _searching_online)
    wrap(symbol("BeamSearchOfflineMixin"), "beam_search", _searching_offline)
    texts = [*map(symbol, ("CompletionRequest", "ChatCompletionRequest"))]
    speeches = [*map(symbol, ("TranscriptionRequest", "TranslationRequest"))]
    for request in (*texts, *speeches):
        wrap(request, "to_beam_search_params", _carrying)
    for request in texts:
        wrap(request, "to_sampling_params", _reading)


@functools.cache
def wrap_server() -> None:
    """In an API server as it adds its routes: it has loaded what serves them by then."""
    if _has(RESPONSES):
        wrap(symbol("OpenAIServingResponses"), "create_responses", _responding)


@functools.cache
def wrap_engine() -> None:
    """In a process that holds an engine's core."""
    if _has(CORE):
        wrap(symbol("EngineCore"), "preprocess_add_request", _receiving)


def _has(feature: str) -> bool:
    if reason := lacking(feature):
        _LOG.warning("sere: %s are not checked: %s", feature, reason)
    return not reason


def check(config: Any, asked: Any) -> None:
    """Raise vLLM's own error, which servers answer with HTTP 400, unless this may be asked for."""
    try:
        check_request(config, asked)
    except PolicyError as error:
        refusal = symbol("VLLMValidationError")
        raise refusal(f'"sere": {error}', parameter="extra_args") from None


def check_place(request: Any) -> None:
    """Raise the same error where a request of an API says it in a place that nobody reads: vLLM
    takes fields that it does not know, and leaves them out."""
    if (said := getattr(request, KEY, None)) is not None:
        raise symbol("VLLMValidationError")(
            f'"sere": {said!r} stands beside vllm_xargs, where it would be left out: write '
            f'"vllm_xargs": {{"sere": {json.dumps(said, default=str)}}}',
            parameter=KEY,
        )


def admitting(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps `InputProcessor._validate_params`, which sees every request of this process but those
    that were made elsewhere; a step of a beam search gets what the search was asked for."""

    def _validate_params(processor: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        if (asked := _BEAM.get()) is not None and asked_by(params) is None:
            params.extra_args = {**(params.extra_args or {}), KEY: asked}
        check(processor.vllm_config, asked_by(params))
        return original(processor, params, *args, **kwargs)

    return _validate_params


def _receiving(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps `EngineCore.preprocess_add_request`: not every front end is ours to wrap. A request
    that is refused here ends with an error; the engine serves on."""

    def preprocess_add_request(core: Any, request: Any) -> Any:
        check(core.vllm_config, asked_by(request.sampling_params))
        return original(core, request)

    return preprocess_add_request


def _calling(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a method that takes sampling parameters, or a request that holds some."""

    def call(engine: Any, *args: Any, **kwargs: Any) -> Any:
        for params in _parameters(*args, *kwargs.values()):
            check(engine.vllm_config, asked_by(params))
        return original(engine, *args, **kwargs)

    return call


def _parameters(*arguments: Any) -> Iterator[Any]:
    for argument in arguments:
        yield argument
        yield getattr(argument, "sampling_params", None)


def _reading(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps `to_sampling_params` of an API request."""

    def to_sampling_params(request: Any, *args: Any, **kwargs: Any) -> Any:
        check_place(request)
        return original(request, *args, **kwargs)

    return to_sampling_params


def _responding(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps `create_responses`, which generates only once its stream, or what runs in the
    background, has begun."""

    def create_responses(serving: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        check_place(request)
        check(serving.engine_client.vllm_config, (request.vllm_xargs or {}).get(KEY))
        return original(serving, request, *args, **kwargs)

    return create_responses


# --- beam search ------------------------------------------------------------------------------


def _carrying(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps `to_beam_search_params` of an API request: vLLM leaves `vllm_xargs` behind."""

    def to_beam_search_params(request: Any, *args: Any, **kwargs: Any) -> Any:
        check_place(request)
        params = original(request, *args, **kwargs)
        params.extra_args = request.vllm_xargs
        return params

    return to_beam_search_params


def _searching_online(original: Callable[..., Any]) -> Callable[..., Any]:
    def beam_search(
        serving: Any, prompt: Any, request_id: str, params: Any, *args: Any, **kwargs: Any
    ) -> AsyncIterator[Any]:
        asked = asked_by(params)
        check(serving.engine_client.vllm_config, asked)
        found: AsyncIterator[Any] = original(serving, prompt, request_id, params, *args, **kwargs)
        return found if asked is None else _asking(asked, found)

    return beam_search


async def _asking(asked: Any, found: AsyncIterator[Any]) -> AsyncIterator[Any]:
    """A search in a task of its own, so that what it asks for is not asked for beside it."""

    async def search() -> list[Any]:
        _BEAM.set(asked)
        return [output async for output in found]

    for output in await asyncio.create_task(search()):
        yield output


def _searching_offline(original: Callable[..., Any]) -> Callable[..., Any]:
    def beam_search(llm: Any, prompts: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        asked = asked_by(params)
        check(llm.llm_engine.vllm_config, asked)
        before = _BEAM.set(asked)
        try:
            return original(llm, prompts, params, *args, **kwargs)
        finally:
            _BEAM.reset(before)

    return beam_search
