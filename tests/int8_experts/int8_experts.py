"""vLLM 0.32 offers its int8 experts on x86 only with AMX, but the kernel also has a path for
AVX-512. This vLLM plug-in lets it be chosen there."""

from __future__ import annotations


def register() -> None:
    """Entry point of `vllm.general_plugins`."""
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUExpertsInt8

    CPUExpertsInt8._supports_current_device = staticmethod(lambda: True)
