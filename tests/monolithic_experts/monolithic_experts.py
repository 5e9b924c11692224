"""Candidates that route inside themselves, as stock vLLM takes them on some GPUs. This vLLM plug-in
puts them before those of the CPU engine; stock would refuse the first and take the second."""

from __future__ import annotations

from typing import Any


def register() -> None:
    """Entry point of `vllm.general_plugins`."""
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
    from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEExperts
    from vllm.model_executor.layers.fused_moe.oracle import unquantized

    class Picky(CPUUnquantizedExperts):
        @staticmethod
        def is_monolithic() -> bool:
            return True

        @staticmethod
        def is_supported_config(cls: Any, *args: Any, **kwargs: Any) -> tuple[bool, str | None]:
            supported, reason = FusedMoEExperts.is_supported_config(cls, *args, **kwargs)
            return (False, "this shape") if supported else (supported, reason)

    class RoutesInside(CPUUnquantizedExperts):
        @staticmethod
        def is_monolithic() -> bool:
            return True

    known = unquantized.backend_to_kernel_cls
    unquantized.backend_to_kernel_cls = lambda backend: [Picky, RoutesInside, *known(backend)]
