"""Whether an engine asks for re-routing, and for which tier a request asks. Needs no torch."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any

KEY = "sere"
AUTO = "auto"
"""In the place of settings: an engine that calibrates itself."""


def given(config: Any) -> Mapping[str, Any] | None:
    """What the user wrote behind "sere", or None where re-routing was not asked for."""
    additional = config.additional_config
    if not isinstance(additional, Mapping) or KEY not in additional:
        return None
    return {AUTO: True} if additional[KEY] == AUTO else additional[KEY]


def unread(additional: Any) -> str | None:
    """Why what is meant for us in vLLM's additional_config would be read by nobody, or None."""
    if not isinstance(additional, Mapping):
        return None
    if KEY in additional and additional[KEY] is None:
        return (
            '"sere": null asks for nothing: write {"sere": {}} for the table beside the model and '
            'the defaults, "auto" for an engine that calibrates itself, or leave "sere" out'
        )
    if isinstance(own := additional.get(KEY), str) and own != AUTO:
        return (
            f'"sere": {own!r} is no setting: write "auto" for an engine that calibrates itself, or '
            '{"sere": {"table": "sere.table"}}'
        )
    for name in additional:
        if name != KEY and re.match(rf"{KEY}([^a-z]|$)", str(name), re.IGNORECASE):
            return (
                f"additional_config: nobody reads {name!r}: all settings go behind one key, "
                '{"sere": {"table": "t.safetensors", "S": 2}}'
            )
    return None


def asked_by(params: Any) -> Any:
    """What a request's parameters say behind "sere", or None."""
    extra = getattr(params, "extra_args", None)
    return extra.get(KEY) if isinstance(extra, Mapping) else None


def misspelt(additional: Any) -> str | None:
    """What the user may have meant for the key "sere" of vLLM's additional_config, where that is
    not there: a key like it, or settings that belong behind it."""
    if not isinstance(additional, Mapping) or KEY in additional:
        return None
    names = {str(name).lower(): str(name) for name in additional}
    near = difflib.get_close_matches(KEY, names, n=1, cutoff=0.7)
    return names[near[0]] if near else names.get("table")
