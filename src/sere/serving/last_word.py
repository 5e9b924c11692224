"""Once an engine has started, it is asked what it serves. That nothing is re-routed is the last
thing said before it does: whoever started it may have overlooked it among the first hundred lines
(see `start_up`). What requests may ask for can depend on a table that it has just found."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from sere.serving.asking import given
from sere.serving.may_ask import hear
from sere.serving.remote import ask_engines
from sere.serving.start_up import say_last

_LOG = logging.getLogger("vllm.sere")


def starting(original: Callable[..., None]) -> Callable[..., None]:
    """Wraps the constructor of `PoolingOfflineMixin`, the last that `LLM` calls of its own."""

    def __init__(llm: Any, *args: Any, **kwargs: Any) -> None:
        original(llm, *args, **kwargs)
        if given(config := llm.llm_engine.vllm_config) is not None:
            told = llm.llm_engine.collective_rpc("sere_telemetry")
            hear(config, told[0])
            say_last(told)

    return __init__


class LastWord:
    """ASGI middleware: before a server says that it has started."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Mapping[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "lifespan":
            await self._app(scope, receive, send)
            return

        async def sending(message: Mapping[str, Any]) -> None:
            if message["type"] == "lifespan.startup.complete":
                await _say(scope["app"].state)
            await send(message)

        await self._app(scope, receive, sending)


async def _say(state: Any) -> None:
    config = getattr(state, "vllm_config", None)
    if config is None or given(config) is None:
        return
    try:
        engines = await ask_engines(state.engine_client, "sere_telemetry")
    except Exception as error:  # it will be told on /metrics
        _LOG.warning("sere: no engine says whether it re-routes: %s", error)
        return
    told = [snapshot for workers in engines.values() for snapshot in workers]
    hear(config, told[0])
    say_last(told)
