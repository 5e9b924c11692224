"""What a run of `sere tune` will take, before it starts: settings, time, memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sere.evaluation.quality import LOGITS
from sere.models.outlay import time_in_words
from sere.models.skeleton import Skeleton
from sere.table import Table
from sere.tuning.search import GROUPS, PER_LAYER, QUANTILES, SHARES, TAUS

_TOGETHER = 8  # settings a batch size, about, until one policy does for all sizes


@dataclass
class Plan:
    """settings: about how many are measured. passages: that each is measured on. seconds: of one
    of them; 0 where a run that resumes has it already."""

    settings: int
    passages: int
    seconds: float = 0.0

    @classmethod
    def of(cls, table: Table, batches: Sequence[int], per_layer: bool, passages: int) -> Plan:
        """By the steps of the search: see `tune._search`."""
        paper = (table.fingerprint.K - 1) * (1 + _halvings(len(QUANTILES)))
        layered = min(GROUPS, len(table.layers)) * len(PER_LAYER) + len(SHARES)
        searched = _halvings(len(TAUS)) + (layered if per_layer else 0) + paper
        stock = 1 + _TOGETHER
        return cls(sum(stock + (searched if batch > 1 else 0) for batch in batches), passages)

    def as_text(self, model: Any) -> str:
        """For people. model: in memory, or a `Skeleton`."""
        logits = f"at most {2 * LOGITS / 1e9:.1f} GB of logits"
        if isinstance(model, Skeleton):
            memory = f"one layer's weights at a time and {logits}"
        else:
            weights = sum(p.numel() * p.element_size() for p in model.parameters())
            memory = f"{weights / 1e9:.1f} GB of weights and {logits}"
        text = f"about {self.settings} settings on {self.passages} passages each, {memory}"
        if self.seconds < 0.01:
            return f"{text}; a part is done already"
        about = time_in_words(self.settings * self.seconds)
        return f"{text}; stock routing took {self.seconds:.1f} s, so about {about} in all"


def _halvings(count: int) -> int:
    """Steps of a bisection."""
    return math.ceil(math.log2(count + 1))
