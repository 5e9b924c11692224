"""No table yet: a state of its own. An engine that calibrates itself builds its layers before it
knows what to re-route; until it is given a table, and for good where there comes none, it routes as
stock does."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sere.checkpoint import Fingerprint
from sere.kernels import Plan
from sere.kernels.plan import SETTINGS_OFF, Placement
from sere.policy import Policy, PolicyError
from sere.serving.auto import NO_MAPS


@dataclass(frozen=True)
class NoTable:
    """Stands where a `Table` is to stand; plans have its shapes, so that one can take its place.

    fingerprint: the model that is served. reason: why there is none.
    """

    fingerprint: Fingerprint
    reason: str = "there is no table yet: the engine is still to calibrate itself"

    @property
    def layers(self) -> tuple[int, ...]:
        return self.fingerprint.layers

    def plan(self, index: int, policy: Policy, placement: Placement | None = None) -> Plan:
        return Plan.off(self.fingerprint.E, "cpu")  # vLLM builds models elsewhere by default

    def settings(self, index: int, policy: Policy) -> Tensor:
        return SETTINGS_OFF

    def can_move(self, policy: Policy) -> bool:
        return False

    def check_policy(self, policy: Policy) -> None:
        """Nothing can be switched on."""
        raise PolicyError(self.reason)

    def check_asked(self, policy: Policy, maps: int | None) -> None:
        """Raise `PolicyError` for a policy that no table of this model could serve; maps: the rank
        of those that the engine fits."""
        policy.check_against(self.fingerprint.K, self.fingerprint.E)
        if policy.frees_anywhere and maps is None:
            raise PolicyError(f'fill="{policy.fill}" needs linear maps, and {NO_MAPS}')
        ranks = [policy.for_layer(index).rank or 0 for index in self.layers]
        if (largest := max(ranks)) > (maps or largest):
            raise PolicyError(
                f"rank={largest} exceeds that of the maps which the engine fits, {maps}: lower it, "
                f'or write {{"auto": {{"maps": {largest}}}}}'
            )
        by_size = (policy.for_bucket(bucket) for bucket in policy.batches)
        named = set(policy.layers).union(*(own.layers for own in by_size if own))
        if unknown := sorted(named - set(self.layers)):
            raise PolicyError(f"layers {unknown} of the policy are not among {list(self.layers)}")
