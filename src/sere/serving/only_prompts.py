"""Requests that never decode: an answer of one token comes out of its prompt's own step, which is
routed as stock does. Somebody who scores prompts would take stock's figures for re-routing's."""

from __future__ import annotations

import logging
from typing import Any

_LOG = logging.getLogger("vllm.sere")
_ENOUGH = 16  # requests, from the first on


class OnlyPrompts:
    """Says so, once, where the first requests all ask for one token."""

    def __init__(self) -> None:
        self._left = _ENOUGH

    def note(self, sampling: Any, *, says: bool = True) -> None:
        """A request begins. sampling: vLLM's parameters. says: whether this worker is to log it."""
        if self._left and getattr(sampling, "max_tokens", None) != 1:
            self._left = 0
        elif self._left:
            self._left -= 1
            if says and not self._left:
                _LOG.warning(
                    "sere: the first %d requests ask for one token each, and such answers are "
                    "stock's: they come out of the prompt's step, which is not re-routed; ask for "
                    'more tokens, or start with "rows": "all"',
                    _ENOUGH,
                )
