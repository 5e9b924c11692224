"""How serving says no: at start-up, with the reason."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import TracebackType


class ServingError(RuntimeError):
    """Re-routing was asked for and cannot take effect: says why, and what to do."""


def say_plainly() -> None:
    """Where a refusal is about to end vLLM's own program, let it end with our sentence and not with
    a traceback through vLLM; SERE_DEBUG=1 keeps it. Other programs may have a use for theirs."""
    program = Path(sys.argv[0])
    of_vllm = program.name == "vllm" or "vllm" in program.parent.parts
    if of_vllm and not os.environ.get("SERE_DEBUG") and sys.excepthook is sys.__excepthook__:
        sys.excepthook = _hook


def _hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if isinstance(error, ServingError):
        print(f"sere: error: {error}\n(SERE_DEBUG=1 shows the traceback)", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)
