"""gpt-oss's MXFP4 experts on re-routed batches, against a plain computation.

    python benchmarks/gpu_mxfp4.py -o mxfp4.json

vLLM's kernel for them on Hopper sorts slots by expert and takes for granted that a row names each
expert once; a row that does not gets another row's output. Each batch holds re-routed rows and
one exact row; all are compared, weights as the kernel reads them. Needs a GPU.
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from sere.kernels import Plan, RowClass, reroute
from sere.policy import Policy
from sere.results import provenance

E, K, H, N = 128, 4, 2880, 2880  # gpt-oss-120b's; N: width of an expert
SIZES = (2, 8, 33, 70, 257)
ALPHA, LIMIT = 1.702, 7.0  # of its activation
TOLERANCE = 0.03
# The 16 values of four bits: sign, two of exponent, one of mantissa.
VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
VALUES = torch.cat([VALUES, -VALUES])


def main() -> int:
    """0 if every row of every batch is right."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("-o", "--output", default="mxfp4.json")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU: nothing was run", file=sys.stderr)
        return 1
    weights = drawn(E, H, N, "cuda")
    rows = [measured(T, weights) for T in SIZES]
    result = {"provenance": provenance.provenance(), "rows": rows}
    provenance.save_json(arguments.output, result)
    for row in rows:
        print(row)
    return int(not all(row["passed"] for row in rows))


def drawn(E: int, H: int, N: int, device: str, seed: int = 0) -> dict[str, Tensor]:
    """As a checkpoint has them: two values a byte along the inputs, a scale 2^(s - 127) for 32.

    up: [E, 2 N, H / 2], gate and linear part interleaved; down: [E, H, N / 2]; scales and biases.
    """
    g = torch.Generator(device).manual_seed(seed)

    def draw(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=g, device=device, dtype=torch.uint8)

    return {
        "up": draw(0, 256, E, 2 * N, H // 2),
        "up_scale": draw(117, 121, E, 2 * N, H // 32),
        "up_bias": torch.randn(E, 2 * N, generator=g, device=device),
        "down": draw(0, 256, E, H, N // 2),
        "down_scale": draw(117, 121, E, H, N // 32),
        "down_bias": torch.randn(E, H, generator=g, device=device),
    }


def plain(blocks: Tensor, scales: Tensor) -> Tensor:
    """[..., n / 2] bytes and [..., n / 32] scales -> [..., n] values, float32; low bits first."""
    values = VALUES.to(blocks.device)
    pairs = torch.stack([values[(blocks & 15).long()], values[(blocks >> 4).long()]], -1)
    whole = pairs.flatten(-2).unflatten(-1, (-1, 32))
    return (whole * torch.exp2(scales.float() - 127)[..., None]).flatten(-2)


def expected(x: Tensor, ids: Tensor, slots: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """[T, H] what each row's experts make of it, weighted, expert by expert."""
    out = torch.zeros(len(x), x.shape[1], dtype=torch.float32, device=x.device)
    for expert in ids.unique().tolist():
        row, slot = (ids == expert).nonzero(as_tuple=True)
        up = plain(weights["up"][expert], weights["up_scale"][expert])
        down = plain(weights["down"][expert], weights["down_scale"][expert])
        inner = x[row].float() @ up.T + weights["up_bias"][expert]
        gate = inner[:, ::2].clamp(max=LIMIT)
        linear = inner[:, 1::2].clamp(-LIMIT, LIMIT)
        inner = gate * torch.sigmoid(ALPHA * gate) * (linear + 1)
        found = inner @ down.T + weights["down_bias"][expert]
        out.index_add_(0, row, found * slots[row, slot].float()[:, None])
    return out


def batch(T: int, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ids before and after re-routing, and their weights; the last row is exact."""
    g = torch.Generator().manual_seed(T)
    logits = torch.rand(T, E, generator=g) + 2 * torch.rand(E, generator=g)
    slots, before = logits.softmax(1).topk(K)
    similarity = torch.rand(E, E, generator=g)
    rows = torch.full((T,), int(RowClass.FAST), dtype=torch.int8)
    rows[-1] = int(RowClass.EXACT)
    plan = Plan.build((similarity + similarity.T) / 2, Policy(S=1, min_active=1), K=K)
    ids, slots = before.int().to(device), slots.to(device)
    return ids, slots, *reroute(ids, slots, plan.to(device), rows.to(device))


def measured(T: int, weights: dict[str, Tensor]) -> dict[str, Any]:
    """Largest relative error of a row, as it came and re-routed."""
    before, slots, after, moved = batch(T, "cuda")
    x = torch.randn(T, H, device="cuda", dtype=torch.bfloat16)
    run = kernel(weights)
    errors = {}
    for name, ids, own in (("as they came", before, slots), ("re-routed", after, moved)):
        right = expected(x, ids, own.bfloat16(), weights)
        error = (run(x, ids, own).float() - right).norm(dim=1) / right.norm(dim=1)
        errors[name] = error.max().item()
    return {
        "T": T,
        "slots moved": int((before != after).sum()),
        "largest relative error of a row": errors,
        "passed": all(error < TOLERANCE for error in errors.values()),
    }


def kernel(weights: dict[str, Tensor]) -> Any:
    """vLLM's own, prepared as its quantisation method prepares it: (x, ids, weights) -> [T, H]."""
    from vllm.utils.import_utils import get_triton_kernels_version

    newest = get_triton_kernels_version() == "3.8"  # also makes vLLM's copy importable by its name
    matmul = import_module(f"triton_kernels.{'matmul' if newest else 'matmul_ogs'}")
    from vllm.model_executor.layers.fused_moe.config import mxfp4_w4a16_moe_quant_config
    from vllm.model_executor.layers.fused_moe.experts import gpt_oss_triton_kernels_moe as oai
    from vllm.model_executor.layers.quantization.utils import mxfp4_utils

    def prepared(blocks: Tensor, scales: Tensor) -> tuple[Any, Any]:
        w, flex, scale = mxfp4_utils._swizzle_mxfp4(blocks.clone(), scales.clone())
        how = mxfp4_utils.mx_scale_kwargs(scale)
        return w, matmul.PrecisionConfig(**how, flex_ctx=matmul.FlexCtx(rhs_data=flex))

    up, up_precision = prepared(weights["up"], weights["up_scale"])
    down, down_precision = prepared(weights["down"], weights["down_scale"])
    config = mxfp4_w4a16_moe_quant_config(
        w1_scale=up_precision,
        w2_scale=down_precision,
        w1_bias=weights["up_bias"],
        w2_bias=weights["down_bias"],
    )

    def run(x: Tensor, ids: Tensor, slots: Tensor) -> Tensor:
        routing = oai.make_routing_data(ids, slots, E)
        out = torch.empty_like(x)
        return oai.triton_kernel_fused_experts(
            out, x, up, down, *routing, topk=K, quant_config=config
        ).view(x.shape)

    return run


if __name__ == "__main__":
    raise SystemExit(main())
