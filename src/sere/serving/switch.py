"""An operator's route on vLLM's server: what is on, and another policy from now on.

    GET  /sere/policy                        {"engines": {"0": {"policy": ..., "enabled": ...}}}
    POST /sere/policy  {"policy": null}      stock routing
                       {"policy": "start"}   what the server began with
                       {"policy": {"S": 1}}  another one

It exists only where there is a key (`admin_key`), which requests carry as `Authorization: Bearer`;
that it says no without one is as vLLM answers a path that it has not. All engines behind the server
are asked first whether they can, so that one that cannot keeps all as they are.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping
from typing import Any

from sere.checks import once_each
from sere.policy import Policy, PolicyError, in_words
from sere.serving.admin_key import admin_key, opens
from sere.serving.asking import given
from sere.serving.metrics import Snapshot
from sere.serving.remote import ask_engines

PATH = "/sere/policy"
ANSWER_S = 60.0
"""How long an engine may take: it answers between two steps."""
_LARGEST = 2**20  # bytes of a request: a policy with overrides for a hundred layers has a tenth
_LOG = logging.getLogger("vllm.sere")

Scope = Mapping[str, Any]
States = dict[str, dict[str, Any]]


class Refusal(Exception):
    """What a request is answered instead: HTTP status and a sentence."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Switch:
    """ASGI middleware with the route in it."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self._one_at_a_time = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or not _is_ours(scope):
            await self._app(scope, receive, send)
            return
        state = scope["app"].state
        try:
            key = _key_of(getattr(state, "vllm_config", None))
            if key is None:
                await self._app(scope, receive, send)
                return
            self._admit(scope, key)
            answer = await self._answer(scope, receive, state.engine_client)
            await _reply(send, 200, {"engines": answer})
        except Refusal as refusal:
            await _reply(send, refusal.status, {"error": str(refusal)})

    def _admit(self, scope: Scope, key: bytes) -> None:
        scheme, _, word = _header(scope, b"authorization").partition(b" ")
        if scheme.lower() != b"bearer" or not opens(word.strip(), key):
            _LOG.warning("sere: %s was called with a wrong key by %s", PATH, _caller(scope))
            raise Refusal(401, "the key is missing or wrong: send Authorization: Bearer KEY")
        if scope["method"] not in ("GET", "POST"):
            raise Refusal(405, f"{scope['method']} {PATH}: expected GET or POST")

    async def _answer(self, scope: Scope, receive: Any, client: Any) -> States:
        if scope["method"] == "GET":
            return await _states(client)
        asked = _asked(await _body(receive))
        async with self._one_at_a_time:
            before = await _states(client)
            for engine, obstacles in (await _ask(client, "sere_obstacle", asked)).items():
                if reason := next(filter(None, obstacles), None):
                    said = _LOG.warning
                    said(
                        "sere: %s asked engine %s for %s: %s", _caller(scope), engine, asked, reason
                    )
                    raise Refusal(400, reason)
            await _ask(client, "sere_policy", asked)
            after = await _states(client)
        told = {engine: (_words(before[engine]), _words(after[engine])) for engine in after}
        _LOG.warning("sere: %s switched the policy (before, after): %s", _caller(scope), told)
        return after


def _is_ours(scope: Scope) -> bool:
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", "")).rstrip("/") == PATH


def _key_of(config: Any) -> bytes | None:
    settings = None if config is None else given(config)
    if settings is None:
        return None
    try:
        return admin_key(settings)
    except PolicyError as error:  # it was one when the server started
        _LOG.warning("sere: %s is closed: %s", PATH, error)
        return None


def _header(scope: Scope, name: bytes) -> bytes:
    headers: list[tuple[bytes, bytes]] = scope["headers"]
    return next((value for key, value in headers if key == name), b"")


def _caller(scope: Scope) -> str:
    return str((scope.get("client") or ("somebody",))[0])


async def _body(receive: Any) -> bytes:
    body = b""
    while True:
        message = await receive()
        if message["type"] != "http.request":
            raise Refusal(400, "the request ended early")
        body += bytes(message.get("body", b""))
        if len(body) > _LARGEST:
            raise Refusal(413, f"the request has more than {_LARGEST} bytes")
        if not message.get("more_body"):
            return body


def _asked(body: bytes) -> Any:
    expected = 'expected {"policy": null}, {"policy": "start"} or {"policy": {"S": 1}}'
    try:
        asked = json.loads(body, object_pairs_hook=once_each)
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"not JSON ({error}): {expected}") from None
    if not isinstance(asked, Mapping) or set(asked) != {"policy"}:
        raise Refusal(400, expected)
    return asked["policy"]


async def _ask(client: Any, method: str, *args: Any) -> dict[str, list[Any]]:
    """By engine what its workers answer."""
    try:
        answers = await asyncio.wait_for(ask_engines(client, method, *args), ANSWER_S)
    except TimeoutError:
        raise Refusal(
            504, f"no answer in {ANSWER_S:.0f} s: what was asked happens when the engine does"
        ) from None
    except Exception as error:
        _LOG.exception("sere: an engine did not take %s", method)
        raise Refusal(503, f"an engine answered: {error}") from error
    return {str(engine): workers for engine, workers in answers.items()}


async def _states(client: Any) -> States:
    """By engine what is on in its first worker; all of them agree."""
    told = await _ask(client, "sere_telemetry")
    return {engine: _state(snapshots[0]) for engine, snapshots in told.items() if snapshots}


def _state(snapshot: Snapshot) -> dict[str, Any]:
    told = {name: snapshot[name] for name in ("policy", "fallback", "inert")}
    return {"enabled": told["inert"] is None, **told}


def _words(state: Mapping[str, Any]) -> str:
    return in_words(state["policy"] and Policy.from_dict(state["policy"]))


async def _reply(send: Any, status: int, answer: Any) -> None:
    body = json.dumps(answer).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
