"""What the search tries: who answers for an expert that is not loaded, and which pools.

A kind is what a policy says once for all batch sizes. Similar experts compete as the paper's rule;
experts by their expected error, linear maps and constants each have a tau.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sere.models.moe import MoELayer
from sere.policy import Policy
from sere.table import Table

TAUS = tuple(round(10 ** (-3.5 + i / 6), 6) for i in range(20))  # 0.0003 to 0.46
ANY_LOSS = 1.9  # beyond them: only what is far louder than its layer is loaded besides a pool
QUANTILES = (0.75, 0.5, 0.25)  # of the paper's threshold
POOLS = (0.5, 0.375)  # shares of a layer's experts
ON_TOP = (0, 1)  # S beside a pool


@dataclass(frozen=True)
class Kind:
    """name: in results. base: what all policies of the kind share."""

    name: str
    base: Policy

    def at(self, tau: float, S: int = 1, pool: float | None = None) -> Policy:
        return replace(self.base, S=S, pool=pool, tau=tau)

    @property
    def maps(self) -> bool:
        return self.base.frees


ERROR = Kind("error", Policy(S=1, min_active=1, tau=0.0))
PAPER = Kind("paper", Policy(S=1))


def kinds_of(table: Table, layers: Sequence[MoELayer]) -> list[Kind]:
    """The kinds with a tau. Maps: where the table has some and every layer takes them, at the rank
    of the file, at half of it, and their constants alone."""
    if not table.R or not all(layer.adapter.adds for layer in layers):
        return [ERROR]
    ranks = dict.fromkeys([table.R, max(table.R // 2, 1)])
    linear = [
        Kind(f"linear {rank}", replace(ERROR.base, fill="linear", rank=rank)) for rank in ranks
    ]
    return [ERROR, *linear, Kind("constant", replace(ERROR.base, fill="constant"))]


def kind_of(policy: Policy) -> str:
    """The name of a policy's kind."""
    if policy.frees:
        return "constant" if policy.fill == "constant" else f"linear {policy.rank}"
    return PAPER.name if policy.tau is None else ERROR.name


def in_words(kind: str) -> str:
    """Who answers for an expert that is not loaded."""
    linear = f"linear maps of rank {kind.removeprefix('linear ')}"
    named = {"error": "stand-ins by expected error", "paper": "the paper's rule"}
    return {**named, "constant": "constants"}.get(kind, linear)


def pools_of(table: Table, first_choices: float) -> list[tuple[float, int]]:
    """(pool, S beside it) that can read fewer experts than S = 1 alone: those that hold fewer than
    the rows' first choices name."""
    E, K = table.fingerprint.E, table.fingerprint.K
    sizes = {pool: Policy(pool=pool).pool_of(E) for pool in POOLS}
    return [
        (pool, S)
        for pool, size in sizes.items()
        if size < first_choices
        for S in ON_TOP
        if S or size >= K
    ]


def first_choices(E: int, rows: int) -> float:
    """How many experts they name at most, on average: where all are called alike."""
    return E * (1 - (1 - 1 / E) ** rows)
