"""What a run of `sere tune` will take, before it starts: settings, time, memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sere.evaluation.quality import LOGITS
from sere.models.outlay import time_in_words
from sere.models.skeleton import Skeleton
from sere.table import Table
from sere.tuning.by_layer import GROUPS, PER_LAYER, SHARES
from sere.tuning.kinds import QUANTILES, TAUS, Kind, first_choices, pools_of
from sere.tuning.search import halvings

_TOGETHER = 8  # settings a batch size, about, until one policy does for all sizes


@dataclass
class Plan:
    """settings: about how many are measured. pools: how many of them have one, at most; those that
    cannot be faster any more are left out. maps: how many have some. passages: that each is
    measured on. seconds: of one of them. kept: how many an earlier run has left, in `file`."""

    settings: int
    pools: int
    maps: int
    passages: int
    seconds: float = 0.0
    kept: int = 0
    file: str = ""

    @classmethod
    def of(
        cls,
        table: Table,
        kinds: Sequence[Kind],
        batches: Sequence[int],
        per_layer: bool,
        passages: int,
    ) -> Plan:
        """By the steps of the search: see `one_size.search`."""
        E, larger = table.fingerprint.E, [batch for batch in batches if batch > 1]
        paper = (table.fingerprint.K - 1) * (1 + halvings(len(QUANTILES)))
        layered = min(GROUPS, len(table.layers)) * len(PER_LAYER) + len(SHARES)
        one = halvings(len(TAUS))
        chains = sum(len(pools_of(table, first_choices(E, batch))) for batch in larger)
        pools = halvings(len(TAUS) + 1) * chains
        searched = paper + (layered if per_layer else 0)
        mapped = [kind for kind in kinds if kind.maps]
        maps = len(mapped) * (one * len(larger) + pools) + (_TOGETHER if mapped else 0)
        plain = (1 + _TOGETHER) * len(batches) + (searched + one) * len(larger) + pools
        return cls(plain + maps, pools * len(kinds), maps, passages)

    def as_text(self, model: Any) -> str:
        """For people. model: in memory, or a `Skeleton`."""
        logits = f"at most {2 * LOGITS / 1e9:.1f} GB of logits"
        if isinstance(model, Skeleton):
            memory = f"one layer's weights at a time and {logits}"
        else:
            weights = sum(p.numel() * p.element_size() for p in model.parameters())
            memory = f"{weights / 1e9:.1f} GB of weights and {logits}"
        text = f"about {self.settings} settings on {self.passages} passages each{self._what}"
        text += f", {memory}"
        if self.kept:
            text += (
                f"; an earlier run has left {self.kept} of them in {self.file}, which are not "
                f"measured again: about {self.left} are left"
            )
        if not self.seconds:
            return text
        about = time_in_words(self.left * self.seconds)
        return f"{text}; stock routing took {self.seconds:.1f} s, so about {about} in all"

    @property
    def left(self) -> int:
        return max(self.settings - self.kept, 1)

    @property
    def _what(self) -> str:
        some = {"a pool": self.pools, "maps": self.maps}
        parts = [f"at most {count} of them with {what}" for what, count in some.items() if count]
        return f" ({', '.join(parts)})" if parts else ""
