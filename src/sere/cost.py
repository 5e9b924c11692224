"""How long a decode step's experts take: read them, and compute with them.

    seconds of a step = sum over MoE layers (b * active experts + a * rows) + rest

The model of OEA (arXiv 2511.02237), which fits measurements on H100 and B200 with R^2 > 0.99. The
constants come from a device's data sheet (`roofline`) or from the real engine (`fitted`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sere.moe import MoELayer


@dataclass(frozen=True)
class Cost:
    """b: seconds per active expert. a: seconds per row (token). route: seconds that re-routing adds
    to a layer. rest: seconds of everything else in a step. source: where they come from."""

    b: float
    a: float
    route: float = 0.0
    rest: float = 0.0
    source: str = "given"

    def seconds(self, active: float, rows: float, layers: int, *, routed: bool = True) -> float:
        """Of one decode step; active: mean over its layers."""
        layer = self.b * active + self.a * rows + (self.route if routed else 0.0)
        return layers * layer + self.rest


def roofline(
    layer: MoELayer,
    K: int,
    *,
    bandwidth: float = 3.35e12,
    flops: float = 4e14,
    expert_bytes: float | None = None,
    route: float = 5e-6,
) -> Cost:
    """From a data sheet.

    bandwidth: bytes per second of memory. flops: what the expert kernels reach, per second; the
    defaults are an H100's. expert_bytes: of one expert as it is served, by default in bf16. route:
    seconds of the operator in a CUDA graph.
    """
    parameters = sum(p.numel() for p in layer.experts.parameters()) / layer.E
    size = expert_bytes or 2 * parameters
    source = f"from {size / 1e6:.3g} MB an expert, {bandwidth / 1e9:.4g} GB/s, {flops:.3g} flop/s"
    return Cost(size / bandwidth, size * K / flops, route, 0.0, source)


def fitted(points: Sequence[tuple[float, float, float]], layers: int) -> Cost:
    """From measured steps (mean active experts, rows, seconds), by least squares; no constant is
    negative. Raises `ValueError` where there are fewer than four."""
    if len(points) < 4:
        raise ValueError(f"{len(points)} measured points: a fit of three constants needs four")
    active, rows, seconds = np.array(points).T
    design = np.stack([layers * active, layers * rows, np.ones_like(rows)], axis=1)
    scale = design.max(0)
    kept = [0, 1, 2]
    while True:
        found = np.linalg.lstsq((design / scale)[:, kept], seconds, rcond=None)[0]
        if (found >= 0).all() or len(kept) == 1:
            break
        kept.remove(kept[int(found.argmin())])
    constants = np.zeros(3)
    constants[kept] = np.maximum(found, 0)
    b, a, rest = (float(c) for c in constants / scale)
    return Cost(b, a, 0.0, rest, f"fitted to {len(points)} measured points")
