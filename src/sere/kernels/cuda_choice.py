"""Which form of the CUDA kernel serves a batch: what was fastest when a GPU was at hand.

`benchmarks/bench_variants.py --adopt` writes cuda_choice.json beside this file. Where it does not
exist, or knows no GPU of this kind, the form that was measured first serves.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from math import log2
from pathlib import Path
from typing import Any

from sere.kernels.cuda_variants import MEASURED, Variant

FILE = Path(str(files("sere.kernels"))) / "cuda_choice.json"
WORTH = 0.03
"""How much faster than `MEASURED` a form has to be, as a share, to be taken for it."""

Gpu = tuple[str, tuple[int, int]]
"""Its name and compute capability."""


@dataclass(frozen=True)
class Choice:
    """What to take for batches of up to T rows of a model with E experts, K a token."""

    E: int
    K: int
    T: int
    variant: Variant


def variant_for(gpu: Gpu, T: int, E: int, K: int) -> Variant:
    """The form that serves T rows."""
    choices = choices_for(gpu, E, K)
    wanted = next((c for c in choices if T <= c.T), choices[-1] if choices else None)
    if wanted is None or not wanted.variant.fits(T, E, K, gpu[1]):
        return MEASURED
    return wanted.variant


@functools.lru_cache(maxsize=64)
def choices_for(gpu: Gpu, E: int, K: int) -> tuple[Choice, ...]:
    """By T, those of the shape that was measured and is nearest to (E, K); none without a table."""
    known = of_gpu(gpu)
    if not known:
        return ()
    shapes = sorted({(c.E, c.K) for c in known})
    nearest = min(shapes, key=lambda s: abs(log2(s[0] / E)) + abs(log2(s[1] / K)))
    return tuple(sorted((c for c in known if nearest == (c.E, c.K)), key=lambda c: c.T))


@functools.cache
def of_gpu(gpu: Gpu) -> tuple[Choice, ...]:
    """What was measured on this GPU, or else on another of the same compute capability."""
    if not FILE.exists():
        return ()
    tables: Mapping[str, Any] = json.loads(FILE.read_text())["gpus"]
    alike = [name for name, table in tables.items() if tuple(table["capability"]) == gpu[1]]
    if not alike:
        return ()
    table = tables[gpu[0] if gpu[0] in alike else alike[0]]
    return tuple(Choice(**{**c, "variant": Variant(**c["variant"])}) for c in table["choices"])


def wants_short(gpu: Gpu, E: int, K: int) -> bool:
    """Whether the neighbour lists of a layer had better be int16."""
    return any(c.variant.short for c in choices_for(gpu, E, K))


def fastest(times: Mapping[int, Mapping[Variant, float]]) -> dict[int, Variant]:
    """The form to take by T, from microseconds of each at that T.

    A layer's lists are of one type: int16 if that is better over all T taken together.
    """

    def best(short: bool) -> dict[int, Variant]:
        found = {}
        for T, of in times.items():
            fit = {v: us for v, us in of.items() if v.short is short}
            found[T] = min(fit, key=fit.__getitem__) if fit else MEASURED
        return found

    def total(chosen: Mapping[int, Variant]) -> float:
        return sum(times[T].get(v, float("inf")) for T, v in chosen.items())

    chosen = min(best(False), best(True), key=total)
    if any(v.short for v in chosen.values()):
        return chosen
    return {
        T: v if times[T][v] < (1 - WORTH) * times[T].get(MEASURED, float("inf")) else MEASURED
        for T, v in chosen.items()
    }


def as_json(choices: Sequence[Choice]) -> list[dict[str, Any]]:
    """What `of_gpu` reads."""
    return [{**vars(c), "variant": vars(c.variant)} for c in choices]
