"""Being installed changes nothing: what `register()` may do to a process that asks for nothing."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import torch, vllm.platforms
from vllm.platforms.interface import Platform, PlatformEnum

class Taken(Platform):  # for CUDA's; the real one needs compiled parts that are not in this build
    _enum, device_name, device_type = PlatformEnum.CUDA, "cuda", "cuda"

vllm.platforms._current_platform = Taken()
owners = (torch, torch.cuda, torch.accelerator)
before = {(m.__name__, n): getattr(m, n) for m in owners for n in dir(m)}
from sere.serving.vllm_plugin import register
register()
changed = sorted(n for (m, n), value in before.items() if getattr(sys.modules[m], n) is not value)
assert not changed, changed
assert "vllm.v1.worker.cpu_worker" not in sys.modules
assert not torch.cuda.is_initialized()
"""


def test_registering_on_a_gpu_machine_replaces_nothing_of_torch() -> None:
    run = subprocess.run(
        [sys.executable, "-c", "import sys\n" + SCRIPT], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
