"""vLLM 0.32 serves no MoE model on a CPU under `VLLM_BATCH_INVARIANT`: its CPU experts do not say
whether they are batch-invariant, and what it puts in the place of PyTorch's sums is Triton, which
has no CPU. This vLLM plug-in says that they are (whoever loads it checks), and leaves the sums."""

from __future__ import annotations


def register() -> None:
    """Entry point of `vllm.general_plugins`."""
    from vllm.model_executor.determinism import batch_invariant
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    CPUUnquantizedExperts._supports_batch_invariance = staticmethod(lambda: True)
    batch_invariant.enable_batch_invariant_mode = lambda: None
