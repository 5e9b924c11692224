"""Which kernel computes a layer's experts, and which one stock vLLM would have taken.

Some kernels route inside themselves, where re-routing cannot reach. Layers that are to be re-routed
refuse them, and vLLM's selection goes on to its next candidate. Where it would have taken one,
"off" and exact requests are that engine without re-routing, which is stock vLLM to rounding and not
to the bit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

_REFUSED = "_sere_refused"  # on a layer's FusedMoEConfig: the first that stock would have taken
_AS_STOCK: ContextVar[bool] = ContextVar(
    "kernels that route inside themselves count", default=False
)


def vetoing(original: Callable[..., Any], is_to_reroute: Callable[[], bool]) -> Callable[..., Any]:
    """Wraps `FusedMoEExperts.is_supported_config`, which vLLM's selection asks each candidate."""

    def is_supported_config(
        cls: Any, moe_config: Any, *args: Any, **kwargs: Any
    ) -> tuple[bool, str | None]:
        if cls.is_monolithic() and not _AS_STOCK.get() and is_to_reroute():
            if not hasattr(moe_config, _REFUSED) and _stock_takes(cls, moe_config, args, kwargs):
                setattr(moe_config, _REFUSED, cls.__name__)
            return False, "kernel does not support routes adjusted after routing (sere)"
        supported: tuple[bool, str | None] = original(cls, moe_config, *args, **kwargs)
        return supported

    return is_supported_config


def _stock_takes(cls: Any, moe_config: Any, args: Any, kwargs: Any) -> bool:
    """What the candidate says without us; its own class may ask for more than all candidates do."""
    moe_config = copy.copy(moe_config)
    moe_config.require_decomposed_backend = False  # vLLM 0.33: what our routers ask for
    token = _AS_STOCK.set(True)
    try:
        return bool(cls.is_supported_config(cls, moe_config, *args, **kwargs)[0])
    finally:
        _AS_STOCK.reset(token)


def serving(runner: Any) -> str:
    """What computes the experts of a layer (vLLM's `MoERunner`), by vLLM's name."""
    method = runner.routed_experts.quant_method
    kernel = getattr(method, "moe_kernel", None)
    if kernel is not None:
        return type(kernel.impl.fused_experts).__name__
    chosen: type = getattr(method, "experts_cls", None) or type(method)
    return chosen.__name__


def of_stock(runner: Any) -> str:
    """What stock vLLM would have taken for it."""
    router = runner.router
    allowed = getattr(super(type(router), router), "supports_monolithic_kernels", True)
    refused: str | None = getattr(runner.moe_config, _REFUSED, None)
    return refused if refused and allowed else serving(runner)


def difference(serve: list[str], stock: list[str]) -> str | None:
    """What is to be said where the two are not the same; names of kernels, or None."""
    if serve == stock:
        return None
    return (
        f'stock vLLM would take {", ".join(stock)}, which routes inside itself: "off" and exact '
        f"requests equal {', '.join(serve)} without re-routing, not stock to the bit"
    )
