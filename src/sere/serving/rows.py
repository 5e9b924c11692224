"""Which class is each row of the forward pass? One device buffer per worker, filled before every
pass and read by every layer, so that it may change between replays of one captured graph.

The rule: rows of a request that still reads its prompt are EXACT (prefill; the last prompt token
too), rows of a request that generates are FAST, what follows the real rows is VOID. A request
with more rows than decoding can have (recomputation after preemption) counts as prefill.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sere.kernels import RowClass


class RowClasses:
    """Row classes of the forward pass under way.

    buffer: [max_tokens] int8 `RowClass` on the worker's device; all VOID until the first real
        batch, hence in profiling, warm-up and graph capture.
    gate: "decode" or "all" (prefill rows are FAST, too), the policy's `rows`.
    """

    def __init__(self, max_tokens: int, device: torch.device | str, gate: str) -> None:
        self.buffer = torch.zeros(max_tokens, dtype=torch.int8, device=device)
        self.gate = gate
        # Written on the host, then copied; on a CPU the buffer itself.
        self._staged = self.buffer if self.buffer.device.type == "cpu" else self.buffer.cpu()
        self._host = self._staged.numpy()
        self._filled = 0  # rows of the last batch: what follows them is VOID already
        self._views: dict[int, Tensor] = {}

    def void(self) -> None:
        """A dummy run follows: no row is real."""
        self._fill(np.empty(0, np.int8))

    def fill(
        self, prefilling: npt.NDArray[np.bool_], query_lengths: npt.NDArray[np.integer] | None
    ) -> None:
        """Classify the rows of the coming batch.

        prefilling: [R] whether each request's rows are prefill, in batch order.
        query_lengths: [R] rows of each request; None where each has one.
        """
        if self.gate != "decode":
            prefilling = np.zeros_like(prefilling)
        classes = np.add(prefilling, int(RowClass.FAST), dtype=np.int8)  # FAST or, one more, EXACT
        self._fill(classes if query_lengths is None else np.repeat(classes, query_lengths))

    def _fill(self, rows: npt.NDArray[np.int8]) -> None:
        n, filled = len(rows), self._filled
        self._host[:n] = rows
        if n < filled:
            self._host[n:filled] = int(RowClass.VOID)
        self._filled, changed = n, max(n, filled)
        if self._staged is not self.buffer:
            self.buffer[:changed].copy_(self._staged[:changed])

    def of(self, T: int) -> Tensor:
        """[T] classes of the rows that a layer sees."""
        if T not in self._views:
            if len(self.buffer) < T:
                raise RuntimeError(
                    f"a batch of {T} rows, but the scheduler announced {len(self.buffer)} at most: "
                    "sere does not support this mode of vLLM; please report it"
                )
            self._views[T] = self.buffer[:T]
        return self._views[T]


assert RowClass.EXACT == RowClass.FAST + 1, "fill counts on it"
