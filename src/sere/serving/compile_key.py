"""What of sere's settings counts in the key of vLLM's compile cache.

vLLM hashes `additional_config` whole, so that every other policy, and every other path of a table,
would compile anew (20 s and more, issue 17). But the compiled code only holds a call of our opaque
operator: what this reads from live buffers does not change it.

The stored settings stay the plain dict that they are. vLLM would take an object with `compute_hash`
in its place, but reads keys of its own from it only where it is a dict, and then hashes it as one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from sere import __version__
from sere.policy import Policy
from sere.serving import admin_key
from sere.serving.asking import KEY, given
from sere.serving.session import maps_of

# Live buffers, or of the front end. A setting that is not named here counts.
_NOT_COMPILED = {field.name for field in fields(Policy)} | {
    "table",
    "auto",
    "fingerprint",
    "maps",  # see `maps_of`
    "merge",
    "default",
    "cap",
    "any_version",
    "placement",
    admin_key.SETTING,
}


def compiled(settings: object) -> object:
    """What counts of the user's "sere", and who compiled: JSON-able."""
    if not isinstance(settings, Mapping):
        return settings
    counts = {key: value for key, value in settings.items() if key not in _NOT_COMPILED}
    return {"version": __version__, **counts}


def keyed(original: Callable[..., str]) -> Callable[..., str]:
    """Wraps `VllmConfig.compute_hash`; what others keep in `additional_config` counts as before."""

    def compute_hash(config: Any, *args: Any, **kwargs: Any) -> str:
        settings = given(config)
        if settings is None:
            return original(config, *args, **kwargs)
        hashed = copy.copy(config)
        own: dict[str, object] = {KEY: compiled(settings)}
        if maps := maps_of(config):  # two calls more in every layer that has them
            own[f"{KEY} maps"] = maps
        object.__setattr__(hashed, "additional_config", {**config.additional_config, **own})
        return original(hashed, *args, **kwargs)

    return compute_hash
