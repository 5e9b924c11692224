"""What a policy's settings may be, one by one."""

from __future__ import annotations

import difflib
import math
import sys
from collections.abc import Iterable, Mapping
from typing import Any


class PolicyError(ValueError):
    """A policy that cannot be meant: names the value, what was expected and what to do."""


def nearest(given: str, known: Iterable[str]) -> str | None:
    """The known word that somebody may have meant, or None."""
    alike = {name.lower(): name for name in known}
    near = difflib.get_close_matches(given.lower(), alike, n=1)
    return alike[near[0]] if near else None


def told(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A policy's settings without those that say nothing: what is empty, and rho = 0 beside the
    threshold that takes its place."""
    instead = any(settings.get(name) is not None for name in ("tau", "rho_quantile"))
    return {
        name: value
        for name, value in settings.items()
        if value not in (None, {}) and not (name == "rho" and instead)
    }


def check_keys(what: str, given: Mapping[str, Any], known: list[str] | tuple[str, ...]) -> None:
    """Raise `PolicyError` for a key that nobody would read, with the nearest known one."""
    for key in given:
        if key not in known:
            near = nearest(str(key), known)
            hint = f"did you mean {near!r}?" if near else f"known keys: {', '.join(known)}"
            raise PolicyError(f"{what}: unknown key {key!r}; {hint}")


def once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `json.loads` as object_pairs_hook: it would take the last of two like keys in silence."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise PolicyError(f"{twice!r} is given twice: leave one of them out")
    return found


def is_index(key: Any) -> bool:
    """Whether a key, a string in JSON, is a whole number that could count anything, in its only
    spelling: two would be one number."""
    text = str(key)
    return text.isdecimal() and len(text) < 10 and text == str(int(text))


def check_count(name: str, value: Any, *, optional: bool, least: int = 1) -> None:
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise PolicyError(f"{name}={value!r}: expected a whole number >= {least}")
    if value < least:
        hint = "" if value or least == 0 else ", or 0 with a pool" if name == "S" else ""
        raise PolicyError(f"{name}={value}: expected a whole number >= {least}{hint}")


def check_pool(value: Any) -> None:
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return
    if not isinstance(value, float) or not 0 < value <= 1:
        raise PolicyError(
            f"pool={value!r}: expected a share of the layer's experts, 0 < share <= 1 such as 0.5, "
            "or how many, a whole number >= 1"
        )


def check_choice(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value is not None and value not in known:
        raise PolicyError(f"{name}={value!r}: expected one of {', '.join(known)}")


def check_tau(value: Any) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 2:
        raise PolicyError(
            f"tau={value!r}: expected a loss per token and expert, 0 <= tau < 2, usually 0.001 to "
            "0.1"
        )


def check_quantile(value: Any) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise PolicyError(
            f"rho_quantile={value!r}: expected a share of the experts, 0 <= share < 1"
        )


def checked_rho(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise PolicyError(f"rho={value!r}: expected a number >= 0, usually between 0 and 1")
    if not (0 <= value <= sys.float_info.max or value == math.inf):
        raise PolicyError(f"rho={value}: expected a number >= 0, usually between 0 and 1")
    return float(value)


def check_sizes(policy: Any, pool: int, K: int, E: int, name: str) -> None:
    """Raise `PolicyError` where numbers make no sense for K of E experts per token.

    policy: a `Policy`. pool: members of its pool, 0 for none. name: where it was read, or "".
    """
    if policy.S > K:
        raise PolicyError(
            f"{name}S={policy.S} exceeds the {K} experts per token of this model: "
            f"choose 1 <= S < {K}, or S={K} to switch re-routing off"
        )
    for key, value in (
        ("min_active", policy.min_active),
        ("max_active", policy.max_active),
        ("pool", pool),
    ):
        if value is not None and value > E:
            raise PolicyError(f"{name}{key}={value} exceeds this model's {E} experts")
    if policy.max_active is not None and policy.max_active < (policy.min_active or K):
        raise PolicyError(
            f"{name}max_active={policy.max_active} is below min_active="
            f"{policy.min_active or K} (default: the model's {K} experts per token): "
            "raise max_active or set min_active"
        )
    given = f"{name}pool={policy.pool} ({pool} of {E} experts)"
    if policy.S == 0 and pool < K:
        raise PolicyError(
            f"{given}: with S=0 a row's {K} experts all come from the pool: it has to hold at "
            f"least {K}, or give S >= 1"
        )
    if pool and policy.max_active is not None and pool > policy.max_active:
        raise PolicyError(
            f"{given} exceeds max_active={policy.max_active}, to which the pool counts: raise "
            "max_active or lower pool"
        )
