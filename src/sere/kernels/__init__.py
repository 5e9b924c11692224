"""The operator: one function, one specification, several implementations.

`sere.kernels.reference` is the specification; implementations are tested to equal it bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from sere.kernels import reference
from sere.kernels.plan import Plan
from sere.kernels.reference import COUNTERS, RowClass

__all__ = [
    "COUNTERS",
    "IMPLEMENTATIONS",
    "Plan",
    "RowClass",
    "implementation_for",
    "new_counters",
    "reroute",
]

Implementation = Callable[[Tensor, Tensor, Plan, Tensor | None, Tensor | None], Tensor]


def _numba(*arguments: Any) -> Tensor:
    # Imported on first use: vLLM 0.32's CPU workers fail to start in a process that has llvmlite
    # loaded (their scan for Triton kernels trips over one of its objects).
    from sere.kernels import numba_kernel

    return numba_kernel.run(*arguments)


IMPLEMENTATIONS: dict[str, Implementation] = {"reference": reference.run}
if find_spec("numba"):
    IMPLEMENTATIONS["numba"] = _numba


def implementation_for(device: torch.device) -> str:
    """Which implementation serves tensors of a device."""
    return "numba" if device.type == "cpu" and "numba" in IMPLEMENTATIONS else "reference"


def new_counters(device: torch.device | str | None = None) -> Tensor:
    """Zeroed counters [len(COUNTERS)] int64 for `reroute` to add to."""
    return torch.zeros(len(COUNTERS), dtype=torch.int64, device=device)


def reroute(
    topk_ids: Tensor,
    topk_weights: Tensor,
    plan: Plan,
    rows: Tensor | None = None,
    counters: Tensor | None = None,
) -> Tensor:
    """Move tokens of secondary experts to the most similar primary expert of the batch.

    topk_ids: [T, K] integer, the router's choice, slots in any order; never written to.
    topk_weights: [T, K] floating point, the combine weights (not logits) of those slots.
    plan: neighbour lists and settings of this layer, on the same device.
    rows: [T] int8 `RowClass` on the same device; None means that all rows are FAST.
    counters: optional [len(COUNTERS)] int64 on the same device, added to in place.

    Returns new ids [T, K] of the same dtype; the weights stay as they are. The rules are listed
    in `sere.kernels.reference`. Raises `ValueError` for shapes that do not fit together.
    """
    _check(topk_ids, topk_weights, rows)
    run = IMPLEMENTATIONS[implementation_for(topk_ids.device)]
    return run(topk_ids, topk_weights, plan, rows, counters)


def _check(topk_ids: Tensor, topk_weights: Tensor, rows: Tensor | None) -> None:
    if topk_ids.ndim != 2 or topk_ids.shape != topk_weights.shape:
        raise ValueError(
            f"topk_ids {list(topk_ids.shape)} and topk_weights {list(topk_weights.shape)}: "
            "expected two [T, K] tensors of one shape"
        )
    if topk_ids.is_floating_point() or not topk_weights.is_floating_point():
        raise ValueError(
            f"topk_ids {topk_ids.dtype}, topk_weights {topk_weights.dtype}: expected integer ids "
            "and floating-point weights (are the arguments swapped?)"
        )
    if rows is not None and rows.shape != topk_ids.shape[:1]:
        raise ValueError(f"rows {list(rows.shape)}: expected [T] = [{topk_ids.shape[0]}]")
