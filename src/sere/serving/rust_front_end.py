"""vLLM's front end in Rust (`VLLM_USE_RUST_FRONTEND`): what of sere it has not, said at start-up.

It speaks to the same engines, which re-route as ever and check what requests ask for (`admission`).
But `/metrics` and the switch are layers around vLLM's server in Python, which does not run then.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from sere.serving.admin_key import SETTING, VARIABLE, admin_key
from sere.serving.asking import given
from sere.serving.refusal import ServingError

_LOG = logging.getLogger("vllm.sere")


def starting(original: Callable[..., None]) -> Callable[..., None]:
    """Wraps the constructor of what starts it."""

    def __init__(
        manager: Any, binary_path: Any, sock: Any, args: Any, *more: Any, **kwargs: Any
    ) -> None:
        settings = given(args)
        if settings is not None:
            if admin_key(settings) is not None:
                raise ServingError(
                    "sere cannot be switched behind vLLM's front end in Rust, which has no route "
                    "for it: start without VLLM_USE_RUST_FRONTEND, or without "
                    f"{VARIABLE} and {SETTING}"
                )
            _LOG.warning(
                "sere: behind vLLM's front end in Rust requests are re-routed and tiers obeyed, "
                "but /metrics has nothing of sere, there is no switch, and what is no tier is "
                "answered with HTTP 500 and not 400; start without VLLM_USE_RUST_FRONTEND for these"
            )
        original(manager, binary_path, sock, args, *more, **kwargs)

    return __init__
