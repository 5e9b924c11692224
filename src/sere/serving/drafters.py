"""Second models in a worker: drafters, which propose tokens, are left alone.

What a drafter proposes, the target verifies: its routing decides speed, never tokens, and tables,
counters and policies are of the target. The two cannot be told apart by their layers: a drafter's
may have the target's indices (`mtp.layers.0`, `draft_model.model.layers.0`) or the next free one.
They can by what is being loaded: vLLM's workers load the target, and then tell the model
runner's drafter, whatever its kind, to load itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_DRAFTERS = ("drafter", "speculator")  # where model runners V1 and V2 keep theirs
_OWNED = "_sere_drafter"  # on a drafter's layers
_LOADING: ContextVar[bool] = ContextVar("a drafter is being loaded", default=False)


def is_loading() -> bool:
    """Whether the model that is being built is a drafter."""
    return _LOADING.get()


def is_drafters(config: Any) -> bool:
    """Whether a vLLM config is one that vLLM derived for a drafter, or while it was loaded."""
    return is_loading() or config.model_config.runner_type == "draft"


def claim(runner: Any) -> None:
    """Remember that a layer (vLLM's `MoERunner`) is a drafter's."""
    setattr(runner, _OWNED, True)


def owns(runner: Any) -> bool:
    """Whether a layer is a drafter's."""
    return getattr(runner, _OWNED, False)


def telling_apart(original: Callable[..., None]) -> Callable[..., None]:
    """Wraps a worker's `load_model`."""

    def load_model(worker: Any, *args: Any, **kwargs: Any) -> None:
        for name in _DRAFTERS:
            drafter: Any = getattr(worker.model_runner, name, None)
            if hasattr(drafter, "load_model"):
                drafter.load_model = _marked(drafter.load_model)
        original(worker, *args, **kwargs)

    return load_model


def _marked(load: Callable[..., Any]) -> Callable[..., Any]:
    def load_model(*args: Any, **kwargs: Any) -> Any:
        with _drafter():
            return load(*args, **kwargs)

    return load_model


@contextmanager
def _drafter() -> Iterator[None]:
    token = _LOADING.set(True)
    try:
        yield
    finally:
        _LOADING.reset(token)
