"""vLLM's OpenAI server as a child process, and vLLM's own load generator against it.

Both are started by module, not by the `vllm` command, which does not start from the CPU wheel.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sere.policy import Policy

# `vllm bench serve`, without the command's look-up of the wheel's name.
_BENCH_SERVE = (
    "from vllm.benchmarks.serve import add_cli_args, main;"
    "from vllm.utils.argparse_utils import FlexibleArgumentParser as Parser;"
    "parser = Parser(); add_cli_args(parser); main(parser.parse_args())"
)
NAME = "served"
"""Which model to ask for."""
_START_S = 1800  # a large model on a slow disk
_TAIL = 3000


class ServerError(RuntimeError):
    """The server or its load generator failed: holds the end of what it printed."""


class Server:
    """A running server; made by `serving`."""

    def __init__(self, folder: str, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self.folder, self.port = folder, port
        self._process, self._log = process, log
        self.url = f"http://127.0.0.1:{port}"

    def wait(self) -> None:
        """Until it answers. Raises `ServerError` if it dies first."""
        for _ in range(_START_S):
            if self._process.poll() is not None:
                raise ServerError(f"the server died:\n{self._log.read_text()[-_TAIL:]}")
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(1)
        raise ServerError(f"the server did not answer in {_START_S} s")

    def complete(self, prompt: list[int], max_tokens: int) -> list[int]:
        """Greedy token ids after one prompt, alone."""
        answer = self._post(
            "/v1/completions",
            {
                "model": NAME,
                "prompt": prompt,
                "max_tokens": max_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "return_token_ids": True,
            },
        )
        return list(answer["choices"][0]["token_ids"])

    def set_policy(self, policy: Policy | None) -> None:
        """Switch a server that re-routes."""
        settings = policy.to_dict() if policy else None
        self._post("/collective_rpc", {"method": "sere_policy", "args": [settings]})

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=600) as response:
            text = response.read()
        return json.loads(text) if text else None

    def drive(
        self, *, rate: float, requests: int, input_len: int, output_len: int, seed: int, warm: int
    ) -> dict[str, float]:
        """`vllm bench serve` at so many requests per second (inf: all at once).

        warm: requests before, which do not count.
        """
        with TemporaryDirectory() as folder:
            flags = {
                "--backend": "openai",
                "--base-url": self.url,
                "--endpoint": "/v1/completions",
                "--model": NAME,
                "--served-model-name": NAME,
                "--tokenizer": self.folder,
                "--dataset-name": "random",
                "--random-input-len": input_len,
                "--random-output-len": output_len,
                "--num-prompts": requests,
                "--request-rate": rate,
                "--num-warmups": warm,
                "--seed": seed,
                "--temperature": 0,
                "--result-dir": folder,
                "--result-filename": "result.json",
            }
            words = [str(word) for pair in flags.items() for word in pair]
            command = [sys.executable, "-c", _BENCH_SERVE, *words]
            done = subprocess.run(
                [*command, "--ignore-eos", "--save-result", "--disable-tqdm"],
                capture_output=True,
                text=True,
            )
            written = Path(folder) / "result.json"
            if done.returncode or not written.exists():
                raise ServerError(
                    f"vllm bench serve failed:\n{(done.stdout + done.stderr)[-_TAIL:]}"
                )
            found = json.loads(written.read_text())
        if found["completed"] != requests:
            raise ServerError(f"{requests - found['completed']} of {requests} requests failed")
        return {
            "tpot_ms": found["median_tpot_ms"],
            "ttft_ms": found["median_ttft_ms"],
            "ttft_p99_ms": found["p99_ttft_ms"],
            "tokens_per_s": found["output_throughput"],
        }


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def serving(
    folder: str,
    options: dict[str, Any],
    sere: dict[str, Any] | None,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    """A server on a free port of this machine; ends with the block.

    options: as for `vllm.LLM`. sere: the value in `additional_config`, None for stock vLLM.
    environment: by default this process's, and that policies can be switched.
    """
    port = free_port()
    flags = ["--model", folder, "--served-model-name", NAME, "--host", "127.0.0.1"]
    flags += ["--port", str(port), "--no-enable-prefix-caching", *_flags(options)]
    if sere is not None:
        flags += ["--additional-config", json.dumps({"sere": sere})]
    if environment is None:
        environment = {"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ, "VLLM_SERVER_DEV_MODE": "1"}
    with TemporaryDirectory() as temporary:
        log = Path(temporary) / "server.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *flags],
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        server = Server(folder, process, port, log)
        try:
            server.wait()
            yield server
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _flags(options: dict[str, Any]) -> Sequence[str]:
    """{"max_model_len": 128, "enforce_eager": True} -> --max-model-len 128 --enforce-eager."""
    words: list[str] = []
    for name, value in options.items():
        if value is False:
            continue
        words.append("--" + name.replace("_", "-"))
        if value is not True:
            words.append(json.dumps(value) if isinstance(value, dict) else str(value))
    return words
