"""What a forked engine starts in turn (its core, its workers): forks too, of the process that it is
one of, where vLLM would start interpreters that import it anew, for ten seconds of a core each.

As new as those in all that is tested: that process has imported vLLM, neither a plug-in nor a
model, and environment and sys.path are those of the engine.
"""

from __future__ import annotations

import atexit
import logging
import os
from multiprocessing import context, forkserver
from typing import Any

_printed_to: list[str] = []


def settle(variables: dict[str, str], out: str, errors: str) -> None:
    """Make this process's environment and where it prints (two files) those that are given."""
    os.environ.clear()
    os.environ.update(variables)
    for number, file in ((1, out), (2, errors)):
        descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(descriptor, number)
        os.close(descriptor)
    # vLLM has read it as it was imported
    logging.getLogger("vllm").setLevel(variables.get("VLLM_LOGGING_LEVEL", "INFO"))
    _printed_to[:] = [out, errors]


class _Surroundings:
    """As one unpickles it, a process has the surroundings of that which pickled it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _surround, (dict(os.environ), *_printed_to)


def _surround(*given: Any) -> None:
    settle(*given)
    fork_what_is_spawned()


class _Process(context.ForkServerProcess):
    def __init__(self, *given: Any, **more: Any) -> None:
        self._surroundings = _Surroundings()  # first, so that all else is unpickled in them
        super().__init__(*given, **more)

    def run(self) -> None:
        try:
            super().run()
        finally:
            atexit._run_exitfuncs()  # a forked process runs none by itself


class _Context(context.ForkServerContext):
    Process = _Process


def fork_what_is_spawned() -> None:
    """In a process of a fork server's: what it spawns from now on comes from that server."""
    forkserver._forkserver.ensure_running = lambda: None  # type: ignore[attr-defined]
    context._concrete_contexts["spawn"] = _Context()  # type: ignore[attr-defined]
