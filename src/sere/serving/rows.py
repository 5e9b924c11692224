"""Which class is each row of the forward pass? One device buffer per worker, filled before every
pass and read by every layer, so that it may change between replays of one captured graph.

The rule: rows of a request that still reads its prompt are EXACT (prefill; the last prompt token
too), rows of a request that generates are of the class that the request asked for, FAST by
default; what follows the real rows is VOID. A request with more rows than decoding can have
(recomputation after preemption) counts as prefill.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sere.kernels import RowClass, keeping
from sere.serving.incidents import Incidents

_EXACT, _FAST = np.int8(RowClass.EXACT), np.int8(RowClass.FAST)


def row_class(kept: int, K: int) -> int:
    """The class of a decode row that keeps its `kept` best of K experts, whatever the policy;
    below 0: of an INDEPENDENT one."""
    if kept < 0:
        return int(RowClass.INDEPENDENT)
    if kept >= K:
        return int(RowClass.EXACT)
    return keeping(kept) if kept else int(RowClass.FAST)


class RowClasses:
    """Row classes of the forward pass under way.

    buffer: [max_tokens] int8 `RowClass` or `keeping(n)` on the worker's device; all VOID until the
        first real batch, hence in profiling, warm-up and graph capture.
    gate: "decode" or "all" (prefill rows are what the request's decode rows are), the policy's
        `rows`.
    size, filled: rows there is room for, and rows of the pass.
    fast, exact: how many rows of the pass may be re-routed, and how many may not.
    incidents: of this worker.
    """

    def __init__(self, max_tokens: int, device: torch.device | str, gate: str) -> None:
        self.buffer = torch.zeros(max_tokens, dtype=torch.int8, device=device)
        self.gate = gate
        self.fast = self.exact = 0
        # Written on the host: on a CPU the buffer itself.
        self._host = self.buffer.numpy() if self.buffer.device.type == "cpu" else None
        self.size = max_tokens
        self.filled = 0  # rows of the last batch: what follows them is VOID already
        self.incidents = Incidents()
        self._views: dict[int, Tensor] = {}

    def void(self) -> None:
        """A dummy run follows: no row is real."""
        self._fill(0, _FAST)

    def fill(
        self,
        prefilling: npt.NDArray[np.bool_],
        query_lengths: npt.NDArray[np.integer] | None,
        wanted: npt.NDArray[np.int8] | np.int8 = _FAST,
        total: int | None = None,
    ) -> None:
        """Classify the rows of the coming batch.

        prefilling: [R] whether each request's rows are prefill, in batch order.
        query_lengths: [R] rows of each request; None where each has one.
        wanted: [R] the class that each request's decode rows have, or one for all.
        total: rows of the batch, where `query_lengths` may be too long: how many drafts of each
            request are verified is then known on the device only. No row gets less than it asked
            for: unless all are alike, all are EXACT.
        """
        classes: npt.NDArray[np.int8] | np.int8 = wanted
        if self.gate == "decode" and np.count_nonzero(prefilling):
            classes = np.where(prefilling, _EXACT, wanted)
        R = len(prefilling)
        if query_lengths is None:
            self._fill(R, classes)
        elif total is None or total == query_lengths.sum():
            rows = np.repeat(np.broadcast_to(classes, R), query_lengths)
            self._fill(len(rows), rows)
        else:
            alike = bool((classes == np.ravel(classes)[0]).all())
            self._fill(total, np.ravel(classes)[0] if alike else _EXACT)

    def _fill(self, n: int, rows: npt.NDArray[np.int8] | np.int8) -> None:
        """rows: [n] classes, or one for all. The plain step, decode alone, costs microseconds."""
        self.incidents.begin_step()
        if n > self.size:
            raise RuntimeError(f"a batch of {n} rows, where vLLM said {self.size} at most")
        changed, self.filled = max(n, self.filled), n
        one = isinstance(rows, np.int8)
        self.exact = n * int(rows == _EXACT) if one else int(np.count_nonzero(rows == _EXACT))
        self.fast = n - self.exact
        if self._host is not None:
            self._host[:n] = rows
            if n < changed:
                self._host[n:changed] = int(RowClass.VOID)
            return
        # A fresh piece of pinned memory each time: the last copy may still wait for its turn.
        staged = torch.zeros(changed, dtype=torch.int8, pin_memory=True)
        staged.numpy()[:n] = rows
        self.buffer[:changed].copy_(staged, non_blocking=True)

    def known(self, T: int) -> bool:
        """Whether T rows that a layer sees are those of the batch, and padding."""
        return self.filled <= T <= self.size

    def of(self, T: int) -> Tensor:
        """[T] classes of the rows that a layer sees; VOID where they are not known."""
        if not self.known(T):
            return torch.zeros(T, dtype=torch.int8, device=self.buffer.device)
        if T not in self._views:
            self._views[T] = self.buffer[:T]
        return self._views[T]

    def surprise(self, T: int) -> None:
        """A layer sees fewer rows than the batch has, or more than there can be."""
        self.incidents.survive(
            "telling a layer's rows apart",
            RuntimeError(
                f"a layer sees {T} rows of a batch of {self.filled} (at most {self.size}): this "
                "mode of vLLM splits or gathers batches in a way that sere does not know"
            ),
        )
