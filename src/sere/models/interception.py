"""Between a checkpoint's files and transformers: `from_pretrained` finds out which files and which
model, and somebody else says what is read of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Load = Callable[..., Any]


@contextmanager
def loading_by(read: Callable[[Load, Any, list[str], Any, Any], Any]) -> Iterator[None]:
    """Let `from_pretrained` take for loaded what `read(load, model, files, config, expected_keys)`
    returns; `load(model, weights, files, config, expected_keys)` is what it would have called, with
    no weights but the files."""
    from transformers import PreTrainedModel

    load = PreTrainedModel._load_pretrained_model

    def load_otherwise(
        model: Any, state_dict: None, files: list[str], config: Any, expected_keys: Any = None
    ) -> Any:
        return read(load, model, files, config, expected_keys)

    PreTrainedModel._load_pretrained_model = staticmethod(load_otherwise)
    try:
        yield
    finally:
        PreTrainedModel._load_pretrained_model = staticmethod(load)
