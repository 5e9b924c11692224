"""Answers that do not depend on who else is in the batch: who may ask for them, and what is refused
where vLLM promises them to everybody (`VLLM_BATCH_INVARIANT`).

An INDEPENDENT row is re-routed by the pool of the policy that the engine started with, and by its
own weights (rule 10 of the specification). What vLLM's kernels make of it may still differ by the
size of a batch, in the last bits: that is what vLLM's promise is about.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from sere.checkpoint import Fingerprint
from sere.policy import Policy, PolicyError
from sere.serving.refusal import ServingError
from sere.serving.settings import Settings
from sere.serving.tiers import EXACT, INDEPENDENT, Tier

_PROMISE = "VLLM_BATCH_INVARIANT promises results that do not depend on the batch"
_OBSTACLE = "_sere_independence"  # on the compilation config: "" where there is none


def promised() -> bool:
    """Whether vLLM is asked to answer alike in every batch."""
    return os.environ.get("VLLM_BATCH_INVARIANT", "0") not in ("", "0")


def check_default(config: Any, settings: Settings, model: Fingerprint) -> None:
    """Raise `ServingError` where requests that ask for nothing could not have what they get."""
    if promised() and settings.default not in (EXACT, INDEPENDENT):
        raise ServingError(
            f'sere cannot re-route: {_PROMISE}, and "default": "{settings.default}" makes them '
            'depend on it; set "default": "independent" (with a pool) or "exact", or unset it'
        )
    if settings.default != INDEPENDENT:
        return
    if reason := _obstacle(config, settings.policy, model.E, model.K):
        raise ServingError(f'sere cannot take "default": "independent" here: {reason}')


def check_tier(
    config: Any, tier: Tier, started_with: Callable[[], tuple[Policy, Fingerprint] | None]
) -> None:
    """Raise `PolicyError` if a request may not ask for the tier. started_with: the engine's first
    policy, and its model, or None if that is to be asked elsewhere; asked until it is known."""
    if promised() and tier not in (EXACT, INDEPENDENT):
        raise PolicyError(
            f'{_PROMISE}, "{tier}" depends on it: ask for "exact" or "independent", or for nothing'
        )
    if tier != INDEPENDENT:
        return
    if _known(config) is None and (first := started_with()):
        policy, model = first
        note(config, policy, model.E, model.K)
    if reason := _known(config):
        raise PolicyError(f'"independent" is not to be had here: {reason}')


def note(config: Any, policy: Policy, E: int, K: int) -> None:
    """Judge requests by the policy that the engine started with, from now on."""
    reason = _obstacle(config, policy, E, K) or ""
    object.__setattr__(config.compilation_config, _OBSTACLE, reason)


def _known(config: Any) -> str | None:
    reason: str | None = getattr(config.compilation_config, _OBSTACLE, None)
    return reason


def may_be_asked_for(config: Any, policy: Policy, model: Fingerprint) -> bool:
    """Whether requests may be independent in an engine that starts with this policy."""
    return _obstacle(config, policy, model.E, model.K) is None


def _obstacle(config: Any, policy: Policy, E: int, K: int) -> str | None:
    """Why no row can be independent, and what to do; or None."""
    if (members := policy.pool_of(E)) < K:
        held = f"its pool holds {members}" if members else "it has no pool"
        return (
            f"such rows know the pool of the policy that the engine starts with, and {held}: start "
            f'with "pool" of at least {K} of the {E} experts, at the top level'
        )
    if config.speculative_config is not None:
        return "how many drafts are verified depends on the batch; start without speculative_config"
    return None
