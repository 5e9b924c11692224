"""Where a decode step's time goes on a CPU: PyTorch's profiler inside vLLM's engine.

    python benchmarks/profile_decode.py -o benchmarks/results/profile_cpu.json

The Qwen3-30B-A3B shape, two layers, random weights, float32, as in `sere bench`. Times of a step
are taken without the profiler; operators, with it, over a generation that decodes but for one step.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

from torch.profiler import ProfilerActivity, profile

from sere.policy import Policy
from sere.results import provenance
from sere.serving.engine import Engine
from sere.speed.setup import Load, subject

SHAPE, LAYERS = "qwen3-30b-a3b", 2
TOKENS = 24
PARTS = {
    "experts": ("_C::cpu_fused_moe",),
    "dense matrices": ("_C::onednn_mm", "aten::mm", "aten::addmm"),
    "attention": ("_C::cpu_attention_with_kv_cache",),
    "top-k": ("aten::topk",),
}
ARMS = [("stock", None), ("S=1", Policy(S=1))]


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", default="profile_cpu.json")
    arguments = parser.parse_args()
    load = Load((8, 32, 64), input_len=1, output_len=TOKENS)
    with subject(SHAPE, None, load, layers=LAYERS) as served:
        engine = Engine(served.folder, served.table, batch=max(load.batches), **served.options)
        rows = []
        for batch in load.batches:
            prompts = load.prompts(batch, 0, served.vocabulary)
            for name, policy in ARMS:
                engine.set_policy(policy)
                rows.append({"batch": batch, "policy": name, **measured(engine, prompts)})
        result = {"provenance": provenance.provenance(), **served.facts, "rows": rows}
    provenance.save_json(arguments.output, result)
    print(as_text(result))


def measured(engine: Engine, prompts: list[list[int]]) -> dict[str, Any]:
    """Milliseconds of a step and of its parts."""

    def step_ms() -> float:
        return engine.generate(prompts, TOKENS, to_the_end=True).decode_s / (TOKENS - 1) * 1e3

    step_ms()
    whole = statistics.median(step_ms() for _ in range(5))
    with profile(activities=[ProfilerActivity.CPU]) as found:
        step_ms()
    times = {event.key: event.self_cpu_time_total / TOKENS / 1e3 for event in found.key_averages()}
    parts = {part: sum(times.get(op, 0) for op in ops) for part, ops in PARTS.items()}
    return {"step_ms": whole, "parts_ms": parts, "rest_ms": whole - sum(parts.values())}


def as_text(result: dict[str, Any]) -> str:
    """A row for every batch size and policy, milliseconds of a step."""
    rows = [
        [
            f"{row['batch']}",
            row["policy"],
            f"{row['step_ms']:.1f}",
            *(f"{row['parts_ms'][part]:.2f}" for part in PARTS),
            f"{row['rest_ms']:.2f}",
        ]
        for row in result["rows"]
    ]
    return provenance.text_table(["batch", "policy", "step", *PARTS, "all else"], rows)


if __name__ == "__main__":
    main()
