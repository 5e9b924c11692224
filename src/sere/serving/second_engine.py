"""A second engine in one process, on CPUs.

When a CPU engine starts, vLLM (0.32, 0.33) looks through everything in every loaded module for
kernels that it replaces, and fails at an object of llvmlite's that answers to any name
("'_lib_fn_wrapper' object has no attribute 'get'"). The operator has loaded
llvmlite with numba: the first engine's, or an evaluation's in the same process.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from sere.serving.symbols import lacking, module_of, wrap

_UNSCANNABLE = "llvmlite.binding.ffi"


def in_the_way() -> bool:
    """Whether it is loaded already: a calibration or an evaluation in this process did it."""
    return _UNSCANNABLE in sys.modules


@functools.cache
def allow() -> None:
    """Keep that object from vLLM's look; to be called before it looks again."""
    if not lacking("a second engine"):
        wrap(module_of("_rebind_kernels"), "_rebind_kernels", _without_it)


def _without_it(original: Callable[..., None]) -> Callable[..., None]:
    def _rebind_kernels(*args: Any, **kwargs: Any) -> None:
        hidden = sys.modules.pop(_UNSCANNABLE, None)
        try:
            original(*args, **kwargs)
        finally:
            if hidden is not None:
                sys.modules[_UNSCANNABLE] = hidden

    return _rebind_kernels
