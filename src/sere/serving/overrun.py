"""Rows of requests that had ended.

Under vLLM's asynchronous scheduling a step is prepared before the tokens of the one before are
known. A request that these end is in that step, too: its row is computed and votes, as nobody can
take it out any more, but it is no row of an answer, and is not to stay counted as one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt

from sere.kernels import RowClass

_COUNTERS = {int(RowClass.EXACT): "rows_exact", int(RowClass.INDEPENDENT): "rows_independent"}


class LatestPass:
    """The requests of the latest pass whose rows were counted, in batch order."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """No pass, or none whose rows were counted."""
        self._requests: Sequence[str] = ()

    def note(
        self,
        requests: Sequence[str],
        prefilling: npt.NDArray[np.bool_],
        lengths: npt.NDArray[np.integer] | None,
        classes: npt.NDArray[np.int8] | np.int8,
    ) -> None:
        """Arguments as of `RowClasses.fill`. In every step, so nothing is computed here."""
        self._requests, self._prefilling = requests, prefilling
        self._lengths, self._classes = lengths, classes

    def of(self, ended: Collection[str]) -> Counter[str]:
        """How many decode rows of these requests it had, by the counter of their class."""
        found = Counter[str]()
        if not self._requests:
            return found
        classes = np.broadcast_to(self._classes, len(self._requests))
        for i, request in enumerate(self._requests):
            if request in ended and not self._prefilling[i]:
                rows = 1 if self._lengths is None else int(self._lengths[i])
                found[_COUNTERS.get(int(classes[i]), "rows_fast")] += rows
        return found
