"""Running real engines from tests: each in a process of its own, so that plug-ins, environment and
vLLM's global state are exactly what a user's process has.

Importing vLLM takes most of an engine's start, so it is done once: engines are forks of a process
that has run `from vllm import LLM` and nothing else, neither a plug-in nor a model. So is what such
an engine starts in turn (an engine core, workers), unless it `spawns`: then these import for
themselves, as at a user's.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory, mkstemp
from typing import Any

from sere import demo_model
from sere.serving.server import free_port
from tests import engine_script

_IMPORTED = multiprocessing.get_context("forkserver")
_IMPORTED.set_forkserver_preload(["vllm.entrypoints.llm"])
# Plug-ins for tests. The first gives vLLM 0.32's CPU engine the collectives of data parallelism.
GATHERV = Path(__file__).with_name("gatherv")
# The other makes its experts obey the expert map of expert parallelism.
EXPERT_MAP = Path(__file__).with_name("expert_map")
# Another: computes the experts of an engine with LoRA, whose kernel does not run on CPUs.
LORA_EXPERTS = Path(__file__).with_name("lora_experts")
# A third: lets vLLM's int8 experts run on CPUs without AMX.
INT8_EXPERTS = Path(__file__).with_name("int8_experts")
# Another: lets a CPU engine with experts start under VLLM_BATCH_INVARIANT.
BATCH_INVARIANT = Path(__file__).with_name("batch_invariant")
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
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *_given_path()]),
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
    spawns: bool = False,
    timeout: int = 600,
) -> list[Any]:
    """Results of `steps` on a fresh engine; `sere` is the value in `additional_config`, `paths` are
    further folders to import from (and to find plug-ins in)."""
    starting = Starting(sere=sere, options=options, env=env, paths=paths, spawns=spawns)
    return starting.run(steps, timeout)


class Starting:
    """An engine that starts while others are asked; arguments as of `run_engine`."""

    def __init__(
        self,
        *,
        sere: dict[str, Any] | None = None,
        options: dict[str, Any] | None = None,
        env: dict[str, str] | None = None,
        paths: tuple[Path, ...] = (),
        spawns: bool = False,
    ) -> None:
        settings = {**OPTIONS, **(options or {})}
        if sere is not None:
            settings["additional_config"] = {"sere": sere}
        variables = environment(**(env or {}))
        variables["PYTHONPATH"] = os.pathsep.join([variables["PYTHONPATH"], *map(str, paths)])
        self._pipe, theirs = _IMPORTED.Pipe()
        descriptor, self._log = mkstemp(prefix="engine")
        os.close(descriptor)
        self._process = _IMPORTED.Process(
            target=engine_script.serve,
            args=(settings, variables, [*map(str, paths)], self._log, theirs, spawns),
            daemon=True,  # ends with this process, whatever happens
        )
        self._process.start()
        theirs.close()

    def run(self, steps: list[list[Any]], timeout: int = 600) -> list[Any]:
        """As `run_engine`; once."""
        try:
            self._pipe.send(json.dumps(steps))
            if self._pipe.poll(timeout):
                results: list[Any] = json.loads(self._pipe.recv())
                self._process.join(60)
                return results
            raise EngineFailure(f"no answer in {timeout} s\n{self._printed()}")
        except (EOFError, OSError):  # it is gone
            raise EngineFailure(self._printed()) from None
        finally:
            self._process.kill()
            Path(self._log).unlink()

    def is_alive(self) -> bool:
        return self._process.is_alive()

    def kill(self) -> None:
        """End it with SIGKILL, wherever it is."""
        self._process.kill()
        self._process.join()
        Path(self._log).unlink()

    def _printed(self) -> str:
        return Path(self._log).read_text()[-6000:]


def run_program(
    code: str, *arguments: str, given: str = "", env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """As `python -c code arguments` would end, in a process of its own that has imported vLLM.

    given: what stands on its stdin. env: the whole environment; by default this process's.
    """
    with TemporaryDirectory() as folder:
        out, errors = Path(folder, "out"), Path(folder, "errors")
        variables = dict(os.environ if env is None else env)
        process = _IMPORTED.Process(
            target=engine_script.execute,
            args=(code, [*arguments], variables, given, str(out), str(errors)),
            daemon=True,
        )
        process.start()
        process.join(600)
        process.kill()
        process.join()
        assert process.exitcode is not None
        return subprocess.CompletedProcess(
            arguments, process.exitcode, out.read_text(), errors.read_text()
        )


def run_sere(*words: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """`sere ...`, as `run_program` runs it."""
    return run_program("from sere.cli import main; raise SystemExit(main())", *words, env=env)


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


def leave(results: Any) -> None:
    """End a rank that has put its results into a queue; past the interpreter's own end, in which
    threads of gloo abort the process now and then."""
    import torch

    results.close()
    results.join_thread()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)
