"""With `enable_lora`, vLLM 0.32 computes experts by a Triton kernel, which has no CPU backend. This
vLLM plug-in puts the same sums in its place, a row at a time: what a row gets does not depend on
the batch's shape."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu


def register() -> None:
    """Entry point of `vllm.general_plugins`."""
    from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts

    TritonExperts.apply = apply


def apply(
    experts: Any,
    output: Tensor,
    hidden_states: Tensor,
    w1: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    **_: Any,
) -> None:
    """output, hidden_states: [T, H]. w1: [E, 2 N, H], gate and up. w2: [E, H, N]."""
    context = experts._lora_context
    adapters = context.punica_wrapper.token_lora_indices.tolist() if context else []
    for row, x in enumerate(hidden_states):
        ids = topk_ids[row].long()
        adapter = adapters[row] if row < len(adapters) else -1
        if adapter < 0 or not context.adapter_enabled[adapter]:
            output[row] = topk_weights[row] @ _mlp(x, w1[ids], w2[ids])
            continue
        pairs = (
            zip(context.w13_lora_a_stacked, context.w13_lora_b_stacked, strict=True),
            zip(context.w2_lora_a_stacked, context.w2_lora_b_stacked, strict=True),
        )
        up, down = (
            torch.cat([b[adapter, ids] @ a[adapter, ids] for a, b in pair], 1) for pair in pairs
        )
        output[row] = topk_weights[row] @ _mlp(x, w1[ids] + up, w2[ids] + down)


def _mlp(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """[K, H] outputs of K experts: x [H], w1 [K, 2 N, H], w2 [K, H, N]."""
    gate, up = (w1 @ x).chunk(2, dim=1)
    return (w2 @ (silu(gate) * up)[..., None]).squeeze(-1)
