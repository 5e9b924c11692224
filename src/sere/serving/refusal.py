"""How serving says no: at start-up, with the reason."""

from __future__ import annotations

import os
import sys
import traceback
from itertools import takewhile
from pathlib import Path
from types import TracebackType


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


def _hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not isinstance(error, ServingError):
        sys.__excepthook__(kind, error, trace)
        return
    frames = traceback.extract_tb(trace)
    own = list(takewhile(lambda frame: "vllm" not in Path(frame.filename).parts, frames))
    if own and not _is_vllms(sys.argv[0]):
        print("Traceback (most recent call last; SERE_DEBUG=1 shows all of it):", file=sys.stderr)
        print("".join(traceback.format_list(own)), end="", file=sys.stderr)
        print(f"sere: error: {error}", file=sys.stderr)
    else:
        print(f"sere: error: {error}\n(SERE_DEBUG=1 shows the traceback)", file=sys.stderr)


def _is_vllms(program: str) -> bool:
    """Whether this is vLLM's own program, in which no frame is the user's."""
    path = Path(program)
    return path.name == "vllm" or "vllm" in path.parent.parts
