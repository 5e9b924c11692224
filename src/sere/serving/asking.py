"""Whether an engine asks for re-routing, and for which tier a request asks. Needs no torch."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

KEY = "sere"


def given(config: Any) -> Mapping[str, Any] | None:
    """What the user wrote behind "sere", or None where re-routing was not asked for."""
    additional = config.additional_config
    return additional.get(KEY) if isinstance(additional, Mapping) and KEY in additional else None


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
    near = difflib.get_close_matches(KEY, names, n=1)
    return names[near[0]] if near else names.get("table")
