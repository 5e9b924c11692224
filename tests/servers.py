"""vLLM's own OpenAI server, started as a user starts it."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.engines import OPTIONS, environment

PATIENCE_S = 300
FLAGS = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "128", "--max-num-seqs", "32"]


class Server:
    """A running server."""

    def __init__(self, url: str) -> None:
        self.url = url

    def get(self, path: str, **headers: str) -> str:
        request = urllib.request.Request(self.url + path, headers=headers)
        with urllib.request.urlopen(request, timeout=60) as response:
            text: str = response.read().decode()
            return text

    def complete(self, prompts: list[str], max_tokens: int, **more: Any) -> Any:
        """Greedy completions of a batch, as the server answers them."""
        body = {"model": "demo", "prompt": prompts, "max_tokens": max_tokens, "temperature": 0}
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
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ["--model", OPTIONS["model"], "--served-model-name", "demo", "--port", str(port)]
    if sere is not None:
        flags += ["--additional-config", json.dumps({"sere": sere})]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1"]
    with subprocess.Popen([*command, *flags, *FLAGS], env=environment(**env)) as process:
        try:
            server = Server(f"http://127.0.0.1:{port}")
            _wait(server, process)
            yield server
        finally:
            process.terminate()


def _wait(server: Server, process: subprocess.Popen[bytes]) -> None:
    for _ in range(PATIENCE_S):
        assert process.poll() is None, "the server died"
        try:
            server.get("/health")
            return
        except urllib.error.URLError:
            time.sleep(1)
    raise TimeoutError(f"{server.url} did not answer in {PATIENCE_S} s")
