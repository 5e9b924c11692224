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

    def void(self) -> None:
        """A dummy run follows: no row is real."""
        self.buffer.fill_(int(RowClass.VOID))

    def fill(
        self, query_lengths: npt.NDArray[np.integer], prefilling: npt.NDArray[np.bool_]
    ) -> None:
        """Classify the rows of the coming batch.

        query_lengths: [R] rows of each request, in batch order.
        prefilling: [R] whether the request's rows are prefill.
        """
        prefill_class = RowClass.EXACT if self.gate == "decode" else RowClass.FAST
        per_request = np.where(prefilling, prefill_class, RowClass.FAST).astype(np.int8)
        rows = np.repeat(per_request, query_lengths)
        self.buffer[: len(rows)].copy_(torch.from_numpy(rows))
        self.buffer[len(rows) :].fill_(int(RowClass.VOID))

    def of(self, T: int) -> Tensor:
        """[T] classes of the rows that a layer sees."""
        if len(self.buffer) < T:
            raise RuntimeError(
                f"a batch of {T} rows, but the scheduler announced {len(self.buffer)} at most: "
                "sere does not support this mode of vLLM; please report it"
            )
        return self.buffer[:T]
