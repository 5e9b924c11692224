"""Where a decode step's time goes on a GPU: kernel by kernel, under each policy.

    python benchmarks/gpu_profile.py -o profile_gpu.json [--layers 4]

The Qwen3-30B-A3B shape with CUDA graphs. PyTorch's profiler records a short and a long generation;
their difference is decoding alone. On a machine without a GPU it profiles operators of the CPU.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from sere.policy import Policy
from sere.results import provenance

SHORT, LONG = 10, 40
# Part of a step: words in a kernel's name, tried from the top.
PARTS = {
    "re-routing (ours)": ("reroute", "_all_at_once", "_decide_and_move", "sere"),
    "experts": ("fused_moe", "cutlass_moe", "moe_gemm"),
    "expert alignment, sums": ("moe_align", "moe_sum", "count_and_sort", "act_and_mul", "silu"),
    "router's top-k": ("topk", "top_k"),
    "attention": ("attn", "attention", "flash", "reshape_and_cache"),
    "dense matrices": ("gemm", "cutlass", "nvjet", "cublas", "_mm", "addmm", "splitk"),
    "norms, rotary": ("norm", "rotary", "rope"),
    "sampling": ("argmax", "softmax", "sample", "logits"),
}


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("-o", "--output", default="profile_gpu.json")
    parser.add_argument("--shape", default="qwen3-30b-a3b")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batches", default="1,8,32,128")
    arguments = parser.parse_args()
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the profiler sees one process
    batches = tuple(int(batch) for batch in arguments.batches.split(","))
    rows, facts = measured(arguments.shape, arguments.layers, batches)
    provenance.save_json(
        arguments.output, {"provenance": provenance.provenance(), **facts, "rows": rows}
    )
    print(as_text(rows, facts["layers"]))


def measured(
    shape: str, layers: int, batches: tuple[int, ...]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A row for every batch size and policy: microseconds a step by part, and the kernels."""
    from sere.serving.engine import Engine
    from sere.speed.setup import Load, subject

    load = Load(batches, output_len=LONG)
    rows = []
    with subject(shape, None, load, layers=layers) as served:
        engine = Engine(served.folder, served.table, batch=max(batches), **served.options)
        arms = {"off": None, "S=K": Policy(S=served.K), "S=1": Policy(S=1), "S=2": Policy(S=2)}
        for batch in batches:
            prompts = load.prompts(batch, 0, served.vocabulary)
            for name, policy in arms.items():
                engine.set_policy(policy)
                engine.generate(prompts, SHORT, to_the_end=True)
                step_us = engine.generate(prompts, LONG, to_the_end=True).decode_s / (LONG - 1)
                kernels = decoding(engine, prompts)
                rows.append(
                    {
                        "batch": batch,
                        "policy": name,
                        "step_us": 1e6 * step_us,
                        "parts_us": by_part(kernels),
                        "kernels": kernels,
                    }
                )
                print(f"batch {batch}, {name}: {1e6 * step_us:.0f} us a step", flush=True)
        return rows, served.facts


def decoding(engine: Any, prompts: list[list[int]]) -> list[dict[str, Any]]:
    """Kernels of a decode step: name, times it runs, microseconds in all; the longest first."""
    on_gpu = torch.cuda.is_available()
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU

    def recorded(tokens: int) -> dict[str, tuple[int, float]]:
        with profile(activities=[activity]) as found:
            engine.generate(prompts, tokens, to_the_end=True)
        return {
            one.key: (
                one.count,
                one.self_device_time_total if on_gpu else one.self_cpu_time_total,
            )
            for one in found.key_averages()
        }

    short, long = recorded(SHORT), recorded(LONG)
    steps = LONG - SHORT
    kernels = [
        {
            "name": name[:160],
            "runs": (count - short.get(name, (0, 0))[0]) / steps,
            "us": (us - short.get(name, (0, 0.0))[1]) / steps,
        }
        for name, (count, us) in long.items()
    ]
    return sorted((k for k in kernels if k["us"] > 0.2), key=lambda k: -k["us"])


def by_part(kernels: list[dict[str, Any]]) -> dict[str, float]:
    """Microseconds a step of each of `PARTS`, and of all else."""
    parts = dict.fromkeys([*PARTS, "all else"], 0.0)
    for kernel in kernels:
        parts[_part(kernel["name"].lower())] += kernel["us"]
    return parts


def _part(name: str) -> str:
    return next(
        (part for part, words in PARTS.items() if any(w in name for w in words)), "all else"
    )


def as_text(rows: list[dict[str, Any]], layers: int) -> str:
    """Microseconds a step; what no kernel accounts for is launching, waiting and the host."""

    def cells(row: dict[str, Any]) -> Iterator[str]:
        parts = row["parts_us"]
        yield row["policy"]
        yield f"{row['step_us']:.0f}"
        yield from (f"{us:.0f}" for us in parts.values())
        yield f"{row['step_us'] - sum(parts.values()):.0f}"

    head = [f"batch ({layers} layers)", "policy", "step", *PARTS, "all else", "no kernel"]
    return provenance.text_table(head, [[str(row["batch"]), *cells(row)] for row in rows])


if __name__ == "__main__":
    main()
