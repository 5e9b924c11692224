"""Being installed changes nothing: what the plug-in does to a process that never asks for sere, and
what it does once a config asks. In fresh processes, on the platform of this machine and on one that
is taken for a GPU's; `make cuda-import` runs the same on vLLM's CUDA builds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.serving.installed_script import RESULT

ROOT = Path(__file__).parent.parent.parent
MODULES = {
    "sere": "the package",
    "sere.serving": "the room",
    "sere.serving.asking": "does this config ask for sere?",
    "sere.serving.contract": "names of vLLM",
    "sere.serving.contract_cache": "the same, of the scheduler",
    "sere.serving.contract_calibration": "the same, of the engine's own calibration",
    "sere.serving.contract_front_end": "the same, of front ends",
    "sere.serving.needs": "how the two say it",
    "sere.serving.random_weights": "a load format that engines may ask for which do not re-route",
    "sere.serving.symbols": "looking these names up",
    "sere.serving.vllm_plugin": "the entry point",
}
"""All that vLLM's loading of plug-ins imports, with us among them. None is vLLM's."""
LISTENING = {
    "vllm.config.vllm.VllmConfig.__post_init__": "a config is made: does it ask?",
    "vllm.plugins.load_general_plugins": "a process of an engine starts: are its parts loaded now?",
}
AND_THERE = {
    "vllm.v1.executor.abstract.Executor.__init__": "a config comes from another process",
    "vllm.v1.worker.worker_base.WorkerBase.__init__": "a config comes from another process",
}
PUBLIC = ("torch", "torch.cuda", "torch.accelerator", "torch.Tensor", "torch._C.TensorBase")
VLLMS_OWN = {"vllm.plugins.plugins_loaded"}  # its note that it has loaded plug-ins


def installed(platform: str) -> dict[str, Any]:
    command = (sys.executable, "-m", "tests.serving.installed_script", platform)
    paths = (str(ROOT), os.environ.get("PYTHONPATH", ""))
    env = {**os.environ, "VLLM_PLUGINS": "sere", "PYTHONPATH": os.pathsep.join(paths)}
    run = subprocess.run(command, capture_output=True, text=True, env=env)
    for line in run.stdout.splitlines():
        if line.startswith(RESULT):
            found: dict[str, Any] = json.loads(line.removeprefix(RESULT))
            return found
    raise AssertionError(run.stderr)


@pytest.mark.parametrize("platform", ["own", "cuda"])
def test_being_installed_changes_nothing(platform: str) -> None:
    found = installed(platform)
    assert found["modules"] == sorted(MODULES)
    assert found["torch"] == []
    assert set(found["vllm"]) - VLLMS_OWN == set(LISTENING)
    assert set(found["vllm, not asked"]) == set(AND_THERE)
    assert not found["CUDA initialised"]
    if platform == "own":
        assert found["refused"] is None and len(found["vllm, asked"]) > 10
    public = [name for name in found["torch, asked"] if name.rpartition(".")[0] in PUBLIC]
    assert public == []  # the rest is torch's compiler, loaded with vLLM's model runners
    assert not found["CPU worker"]  # its import would have changed the above
