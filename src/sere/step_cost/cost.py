"""How long a decode step's experts take: read them, and compute with them.

    seconds of a step = sum over MoE layers (b * active experts + a * rows) + rest

The model of OEA (arXiv 2511.02237), which fits measurements on H100 and B200 with R^2 > 0.99; and
one term more. Where 4 rows K <= E, vLLM's Triton experts give each slot a block of its own, which
reads a whole expert: those that are read already come from the cache, which is faster and not free
(issue 19). The constants come from a device's data sheet (`roofline`) or from the real engine
(`from_bench`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from sere.models.moe import MoELayer


@dataclass(frozen=True)
class Cost:
    """b: seconds per active expert. a: seconds per row (token). route: seconds that re-routing adds
    to a layer. rest: seconds of everything else in a step. source: where they come from. again:
    seconds per slot that reads an expert once more, in the small batches of E and K (0: never).
    card: whose they are where nobody said or measured it; predictions hold for such a card only."""

    b: float
    a: float
    route: float = 0.0
    rest: float = 0.0
    source: str = "given"
    again: float = 0.0
    E: int = 0
    K: int = 0
    card: str = ""

    def seconds(
        self,
        active: float,
        rows: float,
        layers: int,
        *,
        routed: bool = True,
        maps: float | None = None,
    ) -> float:
        """Of one decode step; active: mean over its layers. maps: what is read of linear maps, in
        experts, by a policy that has some: to launch them takes as long as to re-route."""
        layer = self.b * (active + (maps or 0.0)) + self.a * rows
        layer += self.route * (int(routed) + int(maps is not None))
        layer += self.again * read_again(active, rows, self.E, self.K)
        return layers * layer + self.rest

    @property
    def of(self) -> str:
        """What the seconds are the time of."""
        return "the whole step" if self.rest else "the experts"


CARD = "an H100"
CARDS_OWN = {"bandwidth": 3.35e12, "flops": 4e14, "route": 5e-6}


def read_again(active: float, rows: float, E: int, K: int) -> float:
    """Slots of a layer that read an expert which another slot reads, too; active: distinct ones."""
    return max(rows * K - active, 0.0) if 4 * rows * K <= E else 0.0


def roofline(
    layer: MoELayer,
    K: int,
    *,
    bandwidth: float | None = None,
    flops: float | None = None,
    expert_bytes: float | None = None,
    route: float | None = None,
    cache: float = 7.1e12,
) -> Cost:
    """From a data sheet.

    bandwidth: bytes per second of memory. flops: what the expert kernels reach, per second. route:
    seconds of the operator in a CUDA graph. Each by default an H100's, and then the cost says so.
    expert_bytes: of one expert as it is served, by default in bf16. cache: bytes per second at
    which an expert is read again (fitted to benchmarks/results/bench_h100_qwen3.json).
    """
    parameters = sum(p.numel() for p in layer.experts.parameters()) / layer.E
    size = expert_bytes or 2 * parameters
    given = {"bandwidth": bandwidth, "flops": flops, "route": route}
    assumed = {name: CARDS_OWN[name] for name, value in given.items() if value is None}
    of = {name: assumed.get(name, value) or 0.0 for name, value in given.items()}
    whose = {name: f" ({CARD}'s)" if name in assumed else "" for name in of}
    source = (
        f"from {size / 1e6:.3g} MB an expert{'' if expert_bytes else ' (this model in bf16)'}, "
        f"{of['bandwidth'] / 1e9:.4g} GB/s{whose['bandwidth']}, "
        f"{of['flops']:.3g} flop/s{whose['flops']}, "
        f"{of['route'] * 1e6:.3g} us to re-route{whose['route']}"
    )
    b, a = size / of["bandwidth"], size * K / of["flops"]
    card = CARD if assumed else ""
    return Cost(b, a, of["route"], 0.0, source, size / cache, layer.E, K, card)


@dataclass(frozen=True)
class Step:
    """One kind of decode step, measured. active: mean over layers; routed: whether it re-routed."""

    active: float
    rows: float
    seconds: float
    routed: bool = False


def fitted(steps: Sequence[Step], layers: int, E: int = 0, K: int = 0) -> Cost:
    """From measured steps, by least squares of relative errors; no constant is negative. E, K: of
    an engine whose small batches read an expert for every slot, else 0. Raises `ValueError` where
    there are not more steps than constants."""
    rows, seconds = np.array([s.rows for s in steps]), np.array([s.seconds for s in steps])
    active, routed = np.array([s.active for s in steps]), np.array([s.routed for s in steps])
    again = np.array([read_again(s.active, s.rows, E, K) for s in steps])
    ones = np.ones(len(steps)) / layers
    columns = layers * np.stack([active, rows, routed, ones, again])
    kept = [number for number, column in enumerate(columns) if column.any()]
    if len(steps) <= len(kept):
        raise ValueError(
            f"{len(steps)} measured steps: a fit of {len(kept)} constants needs {len(kept) + 1}; "
            "measure more policies or batch sizes"
        )
    scale = columns.max(1, initial=0)
    while True:
        design = (columns[kept] / scale[kept, None] / seconds).T
        found = np.linalg.lstsq(design, np.ones(len(steps)), rcond=None)[0]
        if (found >= 0).all() or len(kept) == 1:
            break
        kept.remove(kept[int(found.argmin())])
    constants = np.zeros(len(columns))
    constants[kept] = np.maximum(found, 0) / scale[kept]
    worst = np.abs(constants @ columns / seconds - 1).max()
    b, a, route, rest, slot = (float(c) for c in constants)
    source = f"fitted to {len(steps)} measured steps, within {worst:.1%}"
    return Cost(b, a, route, rest, source, slot, E, K)


def from_bench(path: str | Path, layers: Sequence[MoELayer], K: int) -> Cost:
    """What `sere bench` measured for the model that has these layers.

    Raises `ValueError` for a file that is no such result, for another or a cut model, and for fewer
    than two batch sizes.
    """
    try:
        found = json.loads(Path(path).read_text())
        sizes, results = found["roofline"]["sizes"], found["results"]
        of = (found["E"], found["K"], sizes["layers"], round(sizes["expert"]))
        on_gpu = bool(found.get("graphs"))
        steps = [
            Step(arm["active_after"], each["batch"], arm["tpot_ms"] / 1e3, bool(arm["policy"]))
            for each in results
            for arm in each["arms"]
            if not arm.get("merge")  # in results of 0.1: fewer slots for as many experts
        ]
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; `sere bench MODEL TABLE` writes one") from None
    except (ValueError, KeyError, TypeError):  # UnicodeDecodeError is a ValueError
        raise ValueError(
            f"{path} is no result of a bench: expected what `sere bench MODEL TABLE` writes"
        ) from None
    experts = sum(p.numel() for layer in layers for p in layer.experts.parameters())
    here = (layers[0].E, K, len(layers), round(experts / sum(layer.E for layer in layers)))
    if of != here:
        raise ValueError(
            f"{path} is of another model, {found['model']}: {_described(of)}; this one has "
            f"{_described(here)}: run `sere bench` on it"
        )
    if len({step.rows for step in steps}) < 2:
        raise ValueError(f"{path} has one batch size: measure at least two")
    cost = fitted(steps, len(layers), *((layers[0].E, K) if on_gpu else ()))
    return replace(cost, source=f"{cost.source} of {found['model']} in {found['dtype']}, {path}")


def _described(model: tuple[int, int, int, int]) -> str:
    E, K, layers, parameters = model
    return f"{layers} layers of {E} experts, {K} per token, {parameters:,} parameters each"
