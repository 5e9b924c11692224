"""What it takes to run a model one decoder layer at a time, said before it starts."""

from __future__ import annotations

import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from sere.models.skeleton import Skeleton

# transformers merges a layer's experts while it loads them.
_WHILE_LOADING = 2.5


@dataclass(frozen=True)
class Outlay:
    """Of one reading of the weights.

    read: bytes of weights. flops: floating-point operations. states: bytes of hidden states on
    disk. memory: bytes.
    """

    read: int
    flops: float
    states: int
    memory: int

    def say(self, beside: str | Path, readings: str = "once") -> None:
        """On stderr. readings: how often that is."""
        folder, free = room_beside(beside)
        seconds = self.flops / _rate()
        print(
            f"one layer at a time: {_size(self.read)} of weights are read {readings}; each "
            f"time about {time_in_words(seconds)} of computing on this machine, "
            f"{_size(self.states)} of hidden states in {folder} ({_size(free)} "
            f"free), and {_size(self.memory)} of memory",
            file=sys.stderr,
            flush=True,
        )


def outlay(skeleton: Skeleton, rows: int, states: int, asked: float, beside: int = 0) -> Outlay:
    """rows: tokens of all passes. states: bytes of their hidden states. asked: how many experts
    compute for a token in each MoE layer. beside: bytes of memory for what else is held.
    """
    size = 4 if skeleton.widened else skeleton.model.dtype.itemsize
    counts = {name: _count(unit) for name, unit in skeleton.units.items()}
    whole, inside = _count(skeleton.model), sum(counts.values())
    active = float(whole)
    for layer in skeleton.layers:
        experts = _count(layer.experts)
        active += experts * (asked / layer.E - 1)
    return Outlay(
        read=skeleton.stored_bytes,
        flops=2 * active * rows,
        states=states,
        memory=round(size * (whole - inside + _WHILE_LOADING * max(counts.values())) + beside),
    )


def at_work(skeleton: Skeleton, rows: int, K: int) -> int:
    """Bytes of what one MoE layer's experts hold of so many tokens while they compute: each slot's
    input and output, and three rows of an expert's own width between them."""
    widest = max(skeleton.layers, key=lambda layer: _count(layer.experts) / layer.E)
    H: int = skeleton.model.config.get_text_config().hidden_size
    size = 4 if skeleton.widened else skeleton.model.dtype.itemsize
    return round(rows * K * (2 * H + _count(widest.experts) / widest.E / H) * size)


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _rate() -> float:
    """Floating-point operations a second of a product of this machine's."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a = torch.ones(512, 1024, device=device)
    b = torch.ones(1024, 1024, device=device)
    times = []
    for _ in range(3):
        began = time.perf_counter()
        (a @ b).sum().item()
        times.append(time.perf_counter() - began)
    return 2 * 512 * 1024 * 1024 / min(times)


def room_beside(path: str | Path) -> tuple[Path, int]:
    """The folder of a path, and the bytes that are free there."""
    folder = Path(path).resolve().parent
    return folder, shutil.disk_usage(folder).free


def _size(bytes_: float) -> str:
    """7 MB, 3.2 GB."""
    return f"{bytes_ / 1e9:.1f} GB" if bytes_ >= 1e9 else f"{bytes_ / 1e6:.0f} MB"


def time_in_words(seconds: float) -> str:
    """12 s, 3 min, 2.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
