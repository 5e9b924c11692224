"""Calibration of a 30B-shaped model on a GPU: seconds, tokens/s and peak memory, against the
floating-point operations that it must do.

    python benchmarks/gpu_calibrate.py -o benchmarks/results/gpu/calibrate.json

Qwen3-30B-A3B's layers with random weights in bf16, as many as fit; 400 sequences of 128 random
tokens. "Must" is what the model and all experts of every layer compute for every token, and the
Gram matrices, at the rate of a large bf16 product measured first. The goal is 3 times that.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from sere.calibration.observation import Observer
from sere.models.moe import MoELayer, moe_layers, observed
from sere.results import provenance

GOAL = 3.0
GRAMS = 3  # of outputs, of unit outputs, and of those over the tokens sent to each expert
SHAPE = {"hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128, "head_dim": 128}
HEADS = {"num_attention_heads": 32, "num_key_value_heads": 4, "num_experts_per_tok": 8}
TINY = {"hidden_size": 64, "moe_intermediate_size": 32, "num_experts": 8, "head_dim": 16}
TINY_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2}


def main() -> None:
    """Build, warm up, measure, compare."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("-o", "--output", default="gpu_calibrate.json")
    parser.add_argument("--layers", type=int, help="default: as many as fit, at most 48")
    parser.add_argument("--samples", type=int, default=400)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tiny", action="store_true", help="a shape that any CPU can do")
    arguments = parser.parse_args()
    device = "cpu" if arguments.tiny else "cuda"
    layers = arguments.layers or (2 if arguments.tiny else fitting(torch.cuda.mem_get_info()[0]))
    model = built(layers, device, arguments.tiny)
    found = measured(model, arguments.samples, arguments.batch)
    rate = product_rate(device, 256 if arguments.tiny else 8192)
    must = found["flops"] / rate
    result = {
        "provenance": provenance.provenance(),
        "layers": layers,
        "samples": arguments.samples,
        **found,
        "product_flops": rate,
        "must_seconds": must,
        "times_what_it_must": found["seconds"] / must,
        "goal": GOAL,
    }
    for name in ("seconds", "tokens_per_second", "peak_bytes", "must_seconds"):
        print(f"{name}: {result[name]:.4g}")
    print(f"{result['times_what_it_must']:.2f} times what it must take; the goal is {GOAL}")
    provenance.save_json(arguments.output, result)


def fitting(free: int) -> int:
    """How many layers fit in 80 % of so many bytes, beside a GB of outputs and the vocabulary."""
    layer = 2 * SHAPE["num_experts"] * 3 * SHAPE["hidden_size"] * SHAPE["moe_intermediate_size"]
    return max(1, min(48, int((0.8 * free - 3e9) / (1.03 * layer))))


def built(layers: int, device: str, tiny: bool) -> Any:
    """A random Qwen3-MoE of so many layers, in bf16, made where it is to run."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes: dict[str, Any] = {**(TINY if tiny else SHAPE), **(TINY_HEADS if tiny else HEADS)}
    config = Qwen3MoeConfig(
        vocab_size=512 if tiny else 32000,
        intermediate_size=64,
        num_hidden_layers=layers,
        mlp_only_layers=[],
        decoder_sparse_step=1,
        **sizes,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            torch.manual_seed(0)
            model = Qwen3MoeForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    return model


@torch.inference_mode()
def measured(model: Any, samples: int, batch: int) -> dict[str, Any]:
    """Seconds of reading so many sequences of 128 tokens, and what was computed for it."""
    device, layers = model.device, moe_layers(model)
    random = torch.Generator(device).manual_seed(0)
    vocabulary = model.config.vocab_size
    ids = torch.randint(vocabulary, (samples, 128), device=device, generator=random)

    def read(sequences: torch.Tensor) -> None:
        observer = Observer("frobenius")
        with observed(layers, observer):
            for i, part in enumerate(torch.split(sequences, batch)):
                observer.begin(i, torch.ones_like(part, dtype=torch.bool))
                model(input_ids=part, use_cache=False)
        for layer in layers:
            observer.finish(layer)

    read(ids[:batch])  # warm-up
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = _timed(lambda: read(ids), device)
    tokens = ids.numel()
    return {
        "seconds": seconds,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else 0,
        "flops": flops_per_token(model, layers) * tokens,
    }


def flops_per_token(model: nn.Module, layers: list[MoELayer]) -> float:
    """The model's own pass, every expert of every layer, and the Gram matrices of their outputs."""
    K, H = model.config.num_experts_per_tok, model.config.hidden_size  # type: ignore[union-attr]
    whole = sum(p.numel() for p in model.parameters())
    experts = [sum(p.numel() for p in layer.experts.parameters()) for layer in layers]
    shares = [own * K / layer.E for own, layer in zip(experts, layers, strict=True)]
    grams = sum(GRAMS * layer.E**2 * int(H) for layer in layers)  # type: ignore[call-overload]
    return 2.0 * (whole - sum(experts) + sum(shares) + sum(experts) + grams)


def product_rate(device: str, n: int) -> float:
    """Operations a second of a product of two n x n matrices in bf16, the best of ten."""
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    times = [_timed(lambda: a @ a, torch.device(device)) for _ in range(10)]
    return 2 * n**3 / min(times)


def _timed(work: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
