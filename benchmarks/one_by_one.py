"""Checks run one by one in a process beside: each with its own time and limit, told as it ends.

A check that hangs (in a driver, where no signal reaches it) is ended with its process, and the rest
go on in another. What is known is on disk at every moment.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Check = Callable[[], str]
Results = dict[str, dict[str, Any]]
_SAYS = "one by one: "


def run(
    command: Sequence[str], limits: Mapping[str, float], tell: Callable[[Results], None]
) -> Results:
    """Run every check, in order: {name: {"result": ..., "seconds": ...}}.

    command: followed by names of checks, ends up in `serve`. limits: seconds by name. tell: called
    with what is known so far whenever a check has ended.
    """
    results: Results = {name: {"result": "not run yet"} for name in limits}
    tell(results)
    waiting = list(limits)
    while waiting:
        worker = _Worker([*command, *waiting])
        while waiting and worker.alive:
            name, began = waiting[0], time.monotonic()
            print(f"{name}: at most {limits[name]:.0f} s ...", flush=True)
            # The first line also waits for the process to be up.
            result = worker.next_line(limits[name])
            waiting.pop(0)
            results[name] = {"seconds": round(time.monotonic() - began, 1), **result}
            print(f"{name}: {results[name]['result']} ({results[name]['seconds']} s)", flush=True)
            tell(results)
        worker.end()
    return results


def serve(checks: Mapping[str, Check], names: Sequence[str]) -> None:
    """Run checks by name in this process, a line each for `run` in the one above."""
    for name in names:
        began = time.monotonic()
        try:
            result = f"ok: {checks[name]()}"
        except ImportError as error:
            result = f"not run: {error}"
        except Exception as error:  # one failing check must not hide the others
            result = f"FAILED: {type(error).__name__}: {error}"
        told = {"result": result, "seconds": round(time.monotonic() - began, 1)}
        print(_SAYS + json.dumps(told), flush=True)


def failed(results: Results) -> bool:
    """Whether a check has failed or was ended."""
    return any(r["result"].startswith(("FAILED", "ENDED")) for r in results.values())


class _Worker:
    """A process in a group of its own, whose lines are read as they come."""

    def __init__(self, command: Sequence[str]) -> None:
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        self.alive = True
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            if line.startswith(_SAYS):
                self._lines.put(line.removeprefix(_SAYS))
            else:
                sys.stderr.write(line)
        self._lines.put(None)

    def next_line(self, seconds: float) -> dict[str, Any]:
        """What the check that runs has said in the end, or what has become of it."""
        try:
            line = self._lines.get(timeout=seconds)
        except queue.Empty:
            self.end()
            return {"result": f"ENDED after {seconds:.0f} s"}
        if line is None:
            self.alive = False
            return {"result": f"FAILED: its process ended with {self._process.wait()}"}
        found: dict[str, Any] = json.loads(line)
        return found

    def end(self) -> None:
        """End the process and all that it has started."""
        self.alive = False
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
