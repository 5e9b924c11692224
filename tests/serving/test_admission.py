"""What a request asks for is checked on every route of a server, before anything is answered."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sere.serving.server import NAME
from tests.servers import Server

pytestmark = [pytest.mark.engine, pytest.mark.modes]

TEXT = {"model": NAME, "prompt": "add 1+2:", "max_tokens": 3, "temperature": 0}
CHAT = {
    "model": NAME,
    "messages": [{"role": "user", "content": "add 1+2:"}],
    "max_tokens": 3,
    "temperature": 0,
}
RESPONSE = {"model": NAME, "input": "add 1+2:", "max_output_tokens": 3}
TOKENS = {"model": NAME, "token_ids": [5, 6, 7], "sampling_params": {"max_tokens": 3}}
BEAMS = {"use_beam_search": True, "n": 2}
STREAM = {"stream": True}
ROUTES: dict[str, tuple[str, dict[str, Any]]] = {
    "completion": ("/v1/completions", TEXT),
    "completions of several prompts": ("/v1/completions", TEXT | {"prompt": ["a", "b"]}),
    "several completions": ("/v1/completions", TEXT | {"n": 2, "temperature": 1}),
    "completion, streamed": ("/v1/completions", TEXT | STREAM),
    "completion by beam search": ("/v1/completions", TEXT | BEAMS),
    "chat": ("/v1/chat/completions", CHAT),
    "chat, streamed": ("/v1/chat/completions", CHAT | STREAM),
    "chat by beam search": ("/v1/chat/completions", CHAT | BEAMS),
    "chats": ("/v1/chat/completions/batch", CHAT | {"messages": [CHAT["messages"]] * 2}),
    "response": ("/v1/responses", RESPONSE),
    "response, streamed": ("/v1/responses", RESPONSE | STREAM),
    "message": ("/v1/messages", CHAT),
    "message, streamed": ("/v1/messages", CHAT | STREAM),
    "invocation": ("/invocations", TEXT),
    "tokens": ("/inference/v1/generate", TOKENS),
    "tokens, streamed": ("/inference/v1/generate", TOKENS | STREAM),
}


def asking(body: dict[str, Any], tier: str) -> dict[str, Any]:
    if "token_ids" in body:
        return body | {"sampling_params": body["sampling_params"] | {"extra_args": {"sere": tier}}}
    return body | {"vllm_xargs": {"sere": tier}}


DROP_WHAT_THEY_DO_NOT_KNOW = {"message", "message, streamed", "tokens", "tokens, streamed"}


@pytest.mark.parametrize("route", sorted({*ROUTES} - DROP_WHAT_THEY_DO_NOT_KNOW))
def test_what_stands_where_nobody_reads_it_is_refused(route: str, server: Server) -> None:
    """vLLM takes unknown fields of a request and leaves them out."""
    path, body = ROUTES[route]
    status, said = server.post(path, body | {"sere": "exact"})
    assert status == 400, said
    assert 'vllm_xargs": {"sere": "exact"}' in json.loads(said)["error"]["message"]


@pytest.mark.parametrize("route", ROUTES)
def test_a_route_takes_a_tier_and_refuses_what_is_none(route: str, server: Server) -> None:
    """With HTTP 400 and our sentence, streams too; what may be asked for is served."""
    path, body = ROUTES[route]
    status, said = server.post(path, asking(body, "fastest"))
    assert status == 400, said
    assert "'fastest': expected" in said
    status, said = server.post(path, asking(body, "S=2"))
    assert status == 200, said
