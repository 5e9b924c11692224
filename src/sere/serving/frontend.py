"""sere's metrics on vLLM's own `/metrics`.

The counters live on devices of other processes than the one that answers HTTP. A small ASGI layer
around the API server asks the engine for them when `/metrics` is asked for, and appends them to
what vLLM answers. That works in whatever way vLLM collects its own (one process, or several API
servers with `PROMETHEUS_MULTIPROC_DIR`), and costs nothing between scrapes.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric

from sere.serving import admission
from sere.serving.asking import given
from sere.serving.last_word import LastWord
from sere.serving.metrics import Snapshot, families
from sere.serving.remote import ask_engines
from sere.serving.switch import Switch

PATIENCE_S = 2.0
"""How long a scrape waits for the engine before it gives out the figures of the last one."""
FRESH_S = 0.5
"""Figures younger than this are given out again: a flood of scrapes does not reach the engine."""

_LOG = logging.getLogger("vllm.sere")

Engines = dict[int, list[Snapshot]]


def exporting(original: Callable[..., None]) -> Callable[..., None]:
    """Wraps `attach_router` of vLLM's metrics, which gets the application before it runs."""

    def attach_router(app: Any) -> None:
        original(app)
        app.add_middleware(AppendMetrics)
        app.add_middleware(Switch)
        app.add_middleware(LastWord)
        admission.wrap_server()

    return attach_router


class AppendMetrics:
    """ASGI middleware: `/metrics` also holds sere's metrics if the engine re-routes."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self._source: Source | None = None
        self._failed = False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["path"].rstrip("/") == "/metrics":
            state = scope["app"].state
            config = getattr(state, "vllm_config", None)
            if config is not None and given(config) is not None:
                self._source = self._source or Source(state.engine_client)
                if text := await self._text(self._source):
                    send = _appending(send, text)
                    scope = {**scope, "headers": _plain(scope["headers"])}
        await self._app(scope, receive, send)

    async def _text(self, source: Source) -> bytes:
        """Ours; nothing where that fails, as vLLM's own metrics must not go with it."""
        try:
            return await source.text()
        except Exception:
            if not self._failed:
                self._failed = True
                _LOG.exception("sere: no metrics of sere on /metrics; this is logged once")
            return b""


def _plain(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """A request's headers without wishes: plain text is the one format that can be appended to."""
    return [(name, value) for name, value in headers if not name.startswith(b"accept")]


def _appending(send: Any, text: bytes) -> Any:
    """An ASGI `send` that adds `text` to the end of a successful response."""
    appended = b""

    async def sending(message: Any) -> None:
        nonlocal appended
        if message["type"] == "http.response.start" and message["status"] == 200:
            appended = text
            headers = [(k, v) for k, v in message["headers"] if k != b"content-length"]
            message = {**message, "headers": headers}
        elif message["type"] == "http.response.body" and not message.get("more_body"):
            message = {**message, "body": message.get("body", b"") + appended}
        await send(message)

    return sending


class Source:
    """The figures of all engines behind one API server."""

    def __init__(self, client: Any) -> None:
        """client: vLLM's `AsyncLLM`."""
        self._client = client
        self._engines: Engines = {}
        self._asked: asyncio.Task[Engines] | None = None
        self._answered = -FRESH_S

    async def text(self) -> bytes:
        """Prometheus text, from figures asked for now, or from the last ones if none come."""
        up = await self._refresh()
        return generate_latest(_Fixed(families(self._engines, up=up)))

    async def _refresh(self) -> bool:
        if time.monotonic() - self._answered < FRESH_S:
            return True
        if self._asked is None:
            self._asked = asyncio.create_task(ask_engines(self._client, "sere_telemetry"))
        done, _ = await asyncio.wait({self._asked}, timeout=PATIENCE_S)
        if not done:
            return False  # a later scrape waits for the same answer
        task, self._asked = done.pop(), None
        if error := task.exception():
            _LOG.warning("sere: no fresh metrics, an engine answered: %s", error)
            return False
        self._engines, self._answered = task.result(), time.monotonic()
        return True


class _Fixed(CollectorRegistry):
    """Metrics as a registry, which is what `generate_latest` takes."""

    def __init__(self, metrics: list[Metric]) -> None:
        super().__init__(auto_describe=False)
        self._metrics = metrics

    def collect(self) -> list[Metric]:
        return self._metrics
