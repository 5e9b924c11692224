"""What every implementation is handed."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """T rows to be re-routed together; all tensors on one device.

    ids: [T, K] int16, int32 or int64, the router's choice, slots in any order; never written to.
    weights: [T, K] floating point, the combine weights (not logits) of those slots; `run` writes
        what re-routing makes of them into the same memory.
    rows: [T] int8 `RowClass` or `keeping(n)`; None means that all rows are FAST.
    """

    ids: Tensor
    weights: Tensor
    rows: Tensor | None = None
