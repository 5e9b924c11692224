"""vLLM 0.32's CPU experts say that they run under expert parallelism, but ignore the expert map and
read past their weights. This vLLM plug-in maps ids to local ones before they do; a slot of another
rank's expert becomes expert 0 with weight 0."""

from __future__ import annotations

import functools
from typing import Any


def register() -> None:
    """Entry point of `vllm.general_plugins`."""
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    original = CPUUnquantizedExperts.apply

    @functools.wraps(original)
    def apply(experts: Any, *args: Any, **kwargs: Any) -> None:
        expert_map = kwargs["expert_map"]
        if expert_map is not None:
            local = expert_map[kwargs["topk_ids"].long()]
            ids = local.clamp(min=0).to(kwargs["topk_ids"].dtype)
            weights = kwargs["topk_weights"] * (local >= 0)
            kwargs |= {"topk_ids": ids, "topk_weights": weights}
        original(experts, *args, **kwargs)

    CPUUnquantizedExperts.apply = apply
