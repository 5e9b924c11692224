"""Speed where memory is the limit: one layer of a published model's shape in the real engine.

In a process of its own: its gigabytes are gone when it ends, and a machine that is too small for
them costs this half of the demo only.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sere.speed.shapes import shape_named

SHAPE = "qwen3-30b-a3b"
# (layers, batch sizes): what fits into memory and two minutes, and still is bound by memory.
_ON_CPU, _ON_GPU = (1, (1, 8, 32)), (8, (1, 8, 32, 128))
_POLICIES = ('{"S": 2}', '{"S": 1}')
_LENGTHS = ("--input-len", "8", "--output-len", "16")


def command(shape: str, output: Path, table: Path) -> list[str]:
    """`sere bench` of a shape, or of a model with its own table."""
    layers, batches = _ON_GPU if torch.cuda.is_available() else _ON_CPU
    what = [shape, "--layers", str(layers)] if shape_named(shape) else [shape, str(table)]
    sizes = [word for batch in batches for word in ("--batch", str(batch))]
    policies = [word for policy in _POLICIES for word in ("--policy", policy)]
    flags = [*sizes, *policies, *_LENGTHS, "--force", "-o", str(output)]
    return [sys.executable, "-m", "sere", "bench", *what, *flags]


def measure(words: Sequence[str]) -> dict[str, Any]:
    """What the command wrote; where it failed, {"not_measured": why}."""
    print(f"speed: {' '.join(words[2:5])} ... in a process of its own", file=sys.stderr)
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode == 0:
        found: dict[str, Any] = json.loads(Path(words[-1]).read_text())
        return found
    return {"not_measured": _reason(done.returncode, done.stderr)}


def _reason(status: int, errors: str) -> str:
    """The sentence that it ended with, or the signal that ended it."""
    said = [line for line in errors.splitlines() if line.strip()]
    last = said[-1].removeprefix("sere: error: ") if said else f"exit {status}"
    if status >= 0:
        return last
    name = signal.Signals(-status).name
    killed = " (so is a process that asks for more memory than there is)"
    return f"it was ended by {name}{killed if name == 'SIGKILL' else ''}; its last words: {last}"
