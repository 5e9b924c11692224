"""vLLM's own OpenAI server, started as a user starts it."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sere.serving.server import NAME, serving
from tests.engines import OPTIONS, environment

ADMIN_KEY = "a key that tests know"
_CHAT = (
    "{% for one in messages %}{{ one.content if one.content is string else one.content[0].text }}"
)
# The cache of prefixes as the server has it by default, in blocks that short prompts fill; chats;
# tokens in, tokens out.
SETTINGS = {
    **OPTIONS,
    "enable_prefix_caching": True,
    "block_size": 32,
    "enable_scale_out": True,
    "chat_template": _CHAT + "{% endfor %}",
}


class Server:
    """A running server."""

    def __init__(self, url: str) -> None:
        self.url = url

    def get(self, path: str, **headers: str) -> str:
        request = urllib.request.Request(self.url + path, headers=headers)
        with urllib.request.urlopen(request, timeout=60) as response:
            text: str = response.read().decode()
            return text

    def post(self, path: str, body: dict[str, Any], **headers: str) -> tuple[int, str]:
        """The status and the answer, whatever they are."""
        headers = {"Content-Type": "application/json", **headers}
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def complete(self, prompts: list[Any], max_tokens: int, **more: Any) -> Any:
        """Greedy completions of a batch of texts or token ids, as the server answers them."""
        body = {"model": NAME, "prompt": prompts, "max_tokens": max_tokens, "temperature": 0}
        request = urllib.request.Request(
            f"{self.url}/v1/completions",
            json.dumps({**body, **more}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)


@contextmanager
def openai_server(sere: dict[str, Any] | None, **env: str) -> Iterator[Server]:
    """A server of the bundled model that answers; `sere` as in `additional_config`."""
    options = dict(SETTINGS)
    folder = str(options.pop("model"))
    with serving(folder, options, sere, environment(**env)) as running:
        yield Server(running.url)
