"""vLLM's own worker loads target and drafter, and runs nothing: for kernels that no CPU has.

Reads a list of jobs as JSON, each the arguments of vLLM's `EngineArgs`. Prints for each what has
become of its MoE layers: by name the class of the router, and which decoder layer sere took it for.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from tests.engine_script import RESULT


def load(options: dict[str, Any]) -> dict[str, tuple[str, int | None]]:
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.network_utils import get_distributed_init_method, get_open_port
    from vllm.v1.worker.cpu_worker import CPUWorker

    from sere.serving.session import session_of

    config = EngineArgs(**options).create_engine_config()
    meeting = get_distributed_init_method("127.0.0.1", get_open_port())
    worker = CPUWorker(config, 0, 0, meeting, is_driver_worker=True)
    with set_current_vllm_config(config):
        worker.init_device()
        worker.load_model()
    session = session_of(config)
    assert session is not None
    bound = {layer: index for index, layer in session.layers.items()}
    return {
        name: (type(layer.router).__name__, bound.get(getattr(layer, "sere", None)))
        for name, layer in config.compilation_config.static_forward_context.items()
        if hasattr(layer, "router")
    }


def main() -> None:
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    print(RESULT + json.dumps([load(job) for job in json.loads(sys.stdin.read())]), flush=True)


if __name__ == "__main__":
    main()
