"""A model is found, or what is wrong with its name is said within seconds."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from sere import demo_model
from sere.models.hub import located
from sere.models.loading import LoadError


def test_folders_and_the_bundled_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    assert located(str(tmp_path)) == str(tmp_path)
    assert located("demo") == str(demo_model.PATH)


@pytest.mark.parametrize("path", ["./no", "/no/such", "a/b/c", "~/models/x", "../x", "with space"])
def test_a_wrong_path_is_called_a_path(path: str) -> None:
    with pytest.raises(LoadError, match=r"no such folder$"):
        located(path)


def test_a_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(LoadError, match="is a file: name the folder"):
        located(str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "the hub is out of reach .*HF_HUB_OFFLINE=1"),
        ({"HF_HUB_OFFLINE": "1"}, "not downloaded before; HF_HUB_OFFLINE is set"),
    ],
    ids=["unreachable", "offline"],
)
def test_a_hub_that_is_not_there_is_given_up(
    environment: dict[str, str], said: str, tmp_path: Path
) -> None:
    """In a process of its own, as the hub's client reads its settings when it is imported."""
    script = "from sere.models.hub import located; located('nobody/nothing')"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "HF_HOME": str(tmp_path), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert re.search(f"LoadError: nobody/nothing: no such folder, and {said}", done.stderr)


QWEN: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_hidden_layers": 2,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "moe_intermediate_size": 32,
    "vocab_size": 128,
}
ON_THE_HUB: dict[str, tuple[dict[str, Any], str]] = {
    "dense": (
        {**QWEN, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
        "Qwen3ForCausalLM has no routed experts",
    ),
    "uneven-k": (
        {**QWEN, "per_layer_config": {"1": {"num_experts_per_tok": 3}}},
        "different numbers of experts per token",
    ),
    "uneven-e": (
        {**QWEN, "block_configs": [{"num_experts": 8}, {"num_experts": 5}]},
        "different numbers of experts ",
    ),
    "one-expert": ({**QWEN, "num_experts": 1, "num_experts_per_tok": 1}, "one expert per layer"),
    "no-k": ({**QWEN, "num_experts_per_tok": 0}, "has 0 experts per token of 8"),
    "large-k": ({**QWEN, "num_experts_per_tok": 9}, "has 9 experts per token of 8"),
    "gptq": (
        {**QWEN, "quantization_config": {"quant_method": "gptq", "bits": 4}},
        "gptq experts cannot be turned back",
    ),
    "gguf": (QWEN, "no weights in .safetensors on the hub"),
}


class Hub(BaseHTTPRequestHandler):
    """As much of a hub as its client asks for; of the files only the configurations are there."""

    asked: ClassVar[list[str]] = []

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Say nothing."""

    def _answer(self, body: bool) -> None:
        self.asked.append(self.path)
        name = next((each for each in ON_THE_HUB if f"/org/{each}" in self.path), "")
        weights = "model.gguf" if name == "gguf" else "model.safetensors"
        files = ["config.json", "tokenizer.json", weights]
        if "/tree/" in self.path:
            oid = {"type": "file", "size": 9, "oid": "b" * 40}
            data = json.dumps([{"path": each, **oid} for each in files]).encode()
        elif self.path.startswith("/api/"):
            about = {"id": f"org/{name}", "sha": "a" * 40}
            data = json.dumps({**about, "siblings": [{"rfilename": f} for f in files]}).encode()
        else:
            data = json.dumps(ON_THE_HUB[name][0]).encode() if "config.json" in self.path else b""
        self.send_response(200 if data else 500)
        self.send_header("X-Repo-Commit", "a" * 40)
        self.send_header("ETag", f'"{name}"')
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)


def test_the_configuration_is_enough_to_refuse_a_model_of_the_hub(tmp_path: Path) -> None:
    """Before the text is read, which is none, and before a weight is asked for."""
    (text := tmp_path / "text.jsonl").write_text("no JSON")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    script = f"""
from sere.calibration.calibrate import calibrate
for name in {list(ON_THE_HUB)}:
    try:
        calibrate(f"org/{{name}}", {str(tmp_path / "t")!r}, data={str(text)!r})
    except Exception as error:
        print(name, type(error).__name__, error, sep="|")
"""
    endpoint = f"http://127.0.0.1:{server.server_port}"
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": endpoint}
    try:
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True
        )
    finally:
        server.shutdown()
        server.server_close()
    said = dict(line.split("|", 1) for line in done.stdout.splitlines())
    for name, (_, expected) in ON_THE_HUB.items():
        assert expected in said[name]
    assert {Path(path).name for path in Hub.asked if "resolve" in path} == {"config.json"}
