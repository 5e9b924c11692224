"""How serving says no: at start-up, with the reason.

Where an engine runs in a process of its own, vLLM's first process only learns that it ended, and
says so in words of its own ("See root cause above"). So what refuses there leaves its sentence in a
file, whose name the environment hands on, and the first process ends with that.
"""

from __future__ import annotations

import atexit
import functools
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from types import TracebackType
from typing import Any
from uuid import uuid4

from sere.policy import PolicyError
from sere.table import TableError

_PLACE = "SERE_REFUSAL_FILE"


class ServingError(RuntimeError):
    """Re-routing was asked for and cannot take effect: says why, and what to do."""


def debugging() -> bool:
    """Whether whole tracebacks are wanted."""
    return bool(os.environ.get("SERE_DEBUG"))


def say_plainly() -> None:
    """Where a refusal is about to end the program, let it end with our sentence and not with a
    traceback through vLLM and pydantic; SERE_DEBUG=1 keeps it. Whoever catches it sees no
    difference, and a program with a hook of its own keeps that."""
    if not debugging() and sys.excepthook is sys.__excepthook__:
        sys.excepthook = _hook


def expect_word() -> None:
    """In the first process, before its engines start: end with what one of theirs leaves."""
    if multiprocessing.parent_process() is None:
        _place().unlink(missing_ok=True)  # an earlier engine's
        say_plainly()


@functools.cache
def _place() -> Path:
    place = Path(tempfile.gettempdir(), f"sere-refusal-{uuid4().hex}")
    os.environ[_PLACE] = str(place)
    atexit.register(place.unlink, missing_ok=True)
    return place


def leaving_word(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a step of an engine's start, which a refusal ends."""

    def step(*args: Any, **kwargs: Any) -> Any:
        try:
            return original(*args, **kwargs)
        except (ServingError, PolicyError, TableError) as error:
            if multiprocessing.parent_process() is not None and (place := os.environ.get(_PLACE)):
                with suppress(OSError):  # such as another rank's word
                    Path(place).touch(0o600, exist_ok=False)
                    Path(place).write_text(str(error), encoding="utf-8")
            raise

    return step


def _left(frames: Sequence[traceback.FrameSummary]) -> str | None:
    """What an engine's process has left, if it is vLLM that has failed."""
    if multiprocessing.parent_process() is not None or all(map(_is_own, frames)):
        return None
    try:
        return Path(os.environ[_PLACE]).read_text(encoding="utf-8") or None
    except (KeyError, OSError):
        return None


def _is_own(frame: traceback.FrameSummary) -> bool:
    return "vllm" not in Path(frame.filename).parts


def _hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    frames = traceback.extract_tb(trace)
    said = str(error) if isinstance(error, ServingError) else _left(frames)
    if said is None or isinstance(error, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    own = list(takewhile(_is_own, frames))
    if own and not _is_vllms(sys.argv[0]):
        print("Traceback (most recent call last; SERE_DEBUG=1 shows all of it):", file=sys.stderr)
        print("".join(traceback.format_list(own)), end="", file=sys.stderr)
        print(f"sere: error: {said}", file=sys.stderr)
    else:
        print(f"sere: error: {said}\n(SERE_DEBUG=1 shows the traceback)", file=sys.stderr)


def _is_vllms(program: str) -> bool:
    """Whether this is vLLM's own program, in which no frame is the user's."""
    path = Path(program)
    return path.name == "vllm" or "vllm" in path.parent.parts
