"""May a request of this engine ask for this? Asked in the front end, and again in the engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sere.checkpoint import Fingerprint
from sere.policy import Policy, PolicyError
from sere.serving.asking import given
from sere.serving.invariance import check_tier, note
from sere.serving.session import model_default, settings_of, table_of
from sere.serving.settings import cap_of, policy_is_found_later
from sere.serving.tiers import Tier

_CAP = "_sere_cap"  # on the compilation config


def check_request(config: Any, asked: Any) -> None:
    """Raise `PolicyError` if a request asks for what is no tier, or for more than the cap.

    asked: what it says behind "sere" (see `asked_by`).
    """
    own = given(config)
    if asked is None or own is None:
        return
    cap = getattr(config.compilation_config, _CAP, None)
    if cap is None:
        cap = cap_of({**model_default(config), **own})
        object.__setattr__(config.compilation_config, _CAP, cap)
    tier = Tier.parse(asked)
    check_tier(config, tier, lambda: _started_with(config))
    if tier > cap:
        raise PolicyError(f'this server gives at most "{cap}", "{tier}" was asked for')


def hear(config: Any, told: Mapping[str, Any]) -> None:
    """Go by what a worker tells (`telemetry.snapshot`) once its engine has started: where the
    policy comes from the engine's own table, nobody else knows it."""
    if _is_found_later(config):
        policy = Policy.from_dict(told["policy"]) if told["policy"] else Policy()
        note(config, policy, told["E"], told["K"])


def _is_found_later(config: Any) -> bool:
    return policy_is_found_later({**model_default(config), **(given(config) or {})})


def _started_with(config: Any) -> tuple[Policy, Fingerprint] | None:
    """None where this process has not heard of it: the engine's own knows, and asks again."""
    if _is_found_later(config):
        return None
    settings = settings_of(config)
    return settings.policy, table_of(config, settings).fingerprint
