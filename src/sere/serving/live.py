"""What the layers of one worker share on the device, and how it follows the load.

A policy may say from how many decoded rows on to route otherwise (`Policy.batches`). Only numbers
differ between batch sizes, never neighbour lists, so that a step of another size costs one small
copy, queued like the step's inputs: no sync, and captured graphs of any kind see it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sere.kernels import COUNTERS
from sere.kernels.plan import OFF, SETTINGS, SETTINGS_OFF
from sere.policy import Policy
from sere.serving.no_table import NoTable
from sere.table import Table

# Places in a plan's settings.
MIN_ACTIVE, POOL, OWN_POOL = (SETTINGS.index(n) for n in ("min_active", "pool", "own_pool"))


@dataclass(frozen=True)
class _Setting:
    """All layers' settings for one batch size.

    values: [L, 7] int32 on the host, pinned where the device is another.
    off: stock routing. spares_one: a batch of one FAST row is left as it is in every layer.
    """

    values: Tensor
    off: bool
    spares_one: bool


class Live:
    """Settings that all layers' operators read, and counters that they add to.

    settings: [L, 7] int32, row i are the `Plan.settings` of the i-th layer; its address never
        changes. counters: [L, len(COUNTERS)] int64. K: experts a token.
    idle: whether the coming pass needs no operator. Decided on the host, hence only on CPUs, where
        no graph can freeze it.
    dormant: every pass is idle until another policy is set, so that nobody need look at its rows.
    left: how many passes, and FAST rows in them, were of a size that the policy leaves to stock
        routing. Nothing else counts them.
    together: the operator runs in every pass, as other ranks wait for this one's votes.
    lone: a layer that sees one row alone launches nothing, and its graph holds nothing: no policy
        without a pool moves a slot of it (every active expert is one that it names: rule 8);
        under one with a pool it launches again, or where graphs hold nothing (frozen) such a policy
        is refused. Such steps are counted here, but for critical slots, which only the operator
        sees.
    """

    def __init__(
        self,
        table: Table | NoTable,
        device: torch.device | str,
        *,
        together: bool = False,
        lone: bool = False,
        frozen: bool = False,
    ) -> None:
        self._table = table
        self.K = table.fingerprint.K
        self._places = {index: i for i, index in enumerate(table.layers)}
        self.settings = SETTINGS_OFF.repeat(len(self._places), 1).to(device)
        self.counters = torch.zeros(
            len(self._places), len(COUNTERS), dtype=torch.int64, device=device
        )
        self._on_host = self.settings.device.type == "cpu"
        self.idle = self.dormant = self._watched = False
        self.together = together
        self.lone = self._sees_lone = lone and not together
        self.frozen = frozen
        alone = [self._figures(steps=1, active_before=self.K, active_after=self.K, rows_fast=1)]
        alone.insert(0, self._figures(rows_exact=1))
        self._alone = torch.stack(alone).to(device)  # by whether the row is FAST
        self.left = (0, 0)
        self.follow(None)

    def place(self, index: int) -> int:
        """The row of decoder layer `index` in `settings` and `counters`."""
        return self._places[index]

    def learn(self, table: Table) -> None:
        """Go by another table of the same layers from the next policy on."""
        self._table = table

    def follow(self, policy: Policy | None) -> None:
        """Take the settings of a policy, for every batch size; None is stock routing."""
        buckets = [0, *policy.batches] if policy else [0]
        self._policy = policy
        if not self.frozen:
            self.lone = self._sees_lone and not (policy and policy.pools)
        self._own_pools = self._values(policy)[:, OWN_POOL]
        self._bank = {b: self._setting(policy.for_bucket(b) if policy else None) for b in buckets}
        self._use(0)
        self._settle()

    def watch(self, on: bool) -> None:
        """Whether the operator is to run whenever a row is real, because someone records it."""
        self._watched = on
        self._settle()

    def _settle(self) -> None:
        stock = all(setting.off for setting in self._bank.values())
        self.dormant = self.idle = self._may_idle() and stock

    def _may_idle(self) -> bool:
        return self._on_host and not self._watched and not self.together

    def _setting(self, policy: Policy | None) -> _Setting:
        values = self._values(policy)
        values[:, OWN_POOL] = self._own_pools  # of INDEPENDENT rows, whatever the others get
        pooled = values[:, [POOL, OWN_POOL]].any()
        spares_one = bool((values[:, MIN_ACTIVE] >= self.K).all() and not pooled)
        off = bool((values[:, 0] == OFF).all() and not self._own_pools.any())
        return _Setting(values if self._on_host else values.pin_memory(), off, spares_one)

    def _values(self, policy: Policy | None) -> Tensor:
        """[L, 7] int32 on the host: the layers' `Plan.settings`."""
        return torch.stack(
            [self._table.settings(i, policy) if policy else SETTINGS_OFF for i in self._places]
        )

    def _use(self, bucket: int) -> None:
        self._bucket, self._now = bucket, self._bank[bucket]
        self.settings.copy_(self._now.values, non_blocking=True)

    @property
    def counts(self) -> bool:
        """Whether the pass under way counts its rows: without a policy none does."""
        return self._policy is not None

    def reset(self) -> None:
        """Begin to count anew."""
        self.counters.zero_()
        self.left = (0, 0)

    def retract(self, rows: Mapping[str, int]) -> None:
        """Count so many rows of the pass under way less, by counter."""
        if self._now.off:
            self.left = (self.left[0], self.left[1] - rows.get("rows_fast", 0))
            return
        for name, number in rows.items():
            self.counters[:, COUNTERS.index(name)] -= number

    def choose(self, fast: int, exact: int) -> None:
        """Prepare a pass over so many rows that may be re-routed, and rows that may not."""
        if fast and len(self._bank) > 1 and self._policy:
            bucket = self._policy.bucket(fast)
            if bucket != self._bucket:
                self._use(bucket)
        if fast and self._policy and self._now.off:
            self.left = (self.left[0] + 1, self.left[1] + fast)
        self.idle = self._may_idle() and self._spared(fast, exact)
        if self.lone and not self.idle and fast + exact == 1 and not self._now.off:
            self.counters += self._alone[fast]

    def _spared(self, fast: int, exact: int) -> bool:
        """Whether the operator would change nothing; counts what it would have counted."""
        now = self._now
        if now.off:
            return True
        if fast == 1 and not exact and now.spares_one:
            K = self._table.fingerprint.K
            self._count(steps=1, active_before=K, active_after=K, rows_fast=1)
            return True
        if exact and not fast:
            self._count(rows_exact=exact)
            return True
        return False

    def _count(self, **figures: int) -> None:
        self.counters += self._figures(**figures)

    @staticmethod
    def _figures(**figures: int) -> Tensor:
        return torch.tensor([figures.get(name, 0) for name in COUNTERS], device="cpu")
