"""Running real engines from tests: each in a process of its own, so that plug-ins, environment and
vLLM's global state are exactly what a user's process has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sere import demo_model
from sere.serving.server import free_port
from tests.engine_script import RESULT

SCRIPT = Path(__file__).with_name("engine_script.py")
# Plug-ins for tests. The first gives vLLM 0.32's CPU engine the collectives of data parallelism.
GATHERV = Path(__file__).with_name("gatherv")
# The other makes its experts obey the expert map of expert parallelism.
EXPERT_MAP = Path(__file__).with_name("expert_map")
# Another: computes the experts of an engine with LoRA, whose kernel does not run on CPUs.
LORA_EXPERTS = Path(__file__).with_name("lora_experts")
# A third: lets vLLM's int8 experts run on CPUs without AMX.
INT8_EXPERTS = Path(__file__).with_name("int8_experts")
# Another: offers experts that route inside themselves before the CPU engine's own.
MONOLITHIC_EXPERTS = Path(__file__).with_name("monolithic_experts")
OPTIONS = {
    "model": str(demo_model.PATH),
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 128,
    "max_num_seqs": 32,
    "enable_prefix_caching": False,
}


class EngineFailure(RuntimeError):
    """The engine's process failed; the message holds the end of what it printed."""


def environment(**changes: str) -> dict[str, str]:
    """The environment of a child process: in-process engine, small cache, this project's tests."""
    return {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "PYTHONPATH": os.pathsep.join([str(SCRIPT.parent.parent), *_given_path()]),
        **changes,
    }


def _given_path() -> list[str]:
    """What a checkout is tested with that is not the installed one."""
    return [os.environ["PYTHONPATH"]] if "PYTHONPATH" in os.environ else []


def run_engine(
    steps: list[list[Any]],
    *,
    sere: dict[str, Any] | None = None,
    options: dict[str, Any] | None = None,
    env: dict[str, str] | None = None,
    paths: tuple[Path, ...] = (),
    timeout: int = 600,
) -> list[Any]:
    """Results of `steps` on a fresh engine; `sere` is the value in `additional_config`, `paths` are
    further folders to import from (and to find plug-ins in)."""
    return Starting(sere=sere, options=options, env=env, paths=paths).run(steps, timeout)


class Starting:
    """An engine that starts while others are asked; arguments as of `run_engine`."""

    def __init__(
        self,
        *,
        sere: dict[str, Any] | None = None,
        options: dict[str, Any] | None = None,
        env: dict[str, str] | None = None,
        paths: tuple[Path, ...] = (),
    ) -> None:
        settings = {**OPTIONS, **(options or {})}
        if sere is not None:
            settings["additional_config"] = {"sere": sere}
        variables = environment(**(env or {}))
        variables["PYTHONPATH"] = os.pathsep.join([variables["PYTHONPATH"], *map(str, paths)])
        self._process = subprocess.Popen(
            [sys.executable, str(SCRIPT)],
            env=variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdin
        self._process.stdin.write(json.dumps({"options": settings}) + "\n")
        self._process.stdin.flush()

    def run(self, steps: list[list[Any]], timeout: int = 600) -> list[Any]:
        """As `run_engine`; once."""
        try:
            output, errors = self._process.communicate(json.dumps(steps) + "\n", timeout)
        finally:
            self._process.kill()
        for line in output.splitlines():
            if line.startswith(RESULT):
                results: list[Any] = json.loads(line[len(RESULT) :])
                return results
        raise EngineFailure((output + errors)[-6000:])


def run_ranks(steps: list[list[list[Any]]], *, env: dict[str, str], **more: Any) -> list[list[Any]]:
    """As `run_engine`, with one engine for each of the lists of steps: the data-parallel ranks of
    one deployment, started as vLLM's offline example does."""
    port = free_port()

    def run_rank(rank: int) -> list[Any]:
        place = {"RANK": rank, "RANK_LOCAL": rank, "SIZE": len(steps), "MASTER_PORT": port}
        variables = {f"VLLM_DP_{name}": str(value) for name, value in place.items()}
        return run_engine(steps[rank], env={**env, **variables}, timeout=300, **more)

    with ThreadPoolExecutor(len(steps)) as pool:
        return list(pool.map(run_rank, range(len(steps))))
