"""Results of the verbs that need a vLLM engine, and of a summary over seeds, as they write them."""

from __future__ import annotations

from typing import Any

from benchmarks.pareto import FIGURES as SUMMED
from benchmarks.pareto import summary
from sere.engine_runs.generation import Part, Written
from sere.policy import Policy
from sere.serving.engine import Batch

FIGURES = ("active", "kl", "top1", "perplexity", "exact_match")
HARNESS = {
    "provenance": {"commit": "abc", "date": "2026-01-01T00:00:00+00:00", "machine": "a GPU"},
    "backend": "hf",
    "batch": 4,
    "arms": [
        {
            "name": name,
            "metrics": {"sums": {"exact_match,none": value}},
            "errors": {"sums": {"exact_match": 0.01}},
            "decodes": {"sums": True},
        }
        for name, value in (("stock", 0.97), ("S=1", 0.9612345))
    ],
}


def pareto(evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """As benchmarks/pareto.py sums up two seeds."""
    seeds = [
        {
            arm["name"]: {
                size: {
                    name: figure[0] + seed / 100 for name, figure in found.items() if name in SUMMED
                }
                for size, found in zip(("8", "32"), arm["batches"].values(), strict=True)
            }
            for arm in evaluation["arms"]
        }
        for seed in (1, 2)
    ]
    return summary(seeds)


def generation() -> dict[str, Any]:
    stock, other = Written("stock", None), Written("</script><b>S=1</b>", None)
    answers = ["12", "34"]
    mine = Batch(["12", "34"], [[1, 2], [3, 4]], 4, 1.0)
    theirs = Batch(["12", "35"], [[1, 2], [3, 5, 5]], 5, 1.0)
    for batch in ((mine, theirs), (mine, mine)):
        stock.parts.append(Part.of(answers, batch[0], batch[0], (12, 2)))
        other.parts.append(Part.of(answers, batch[1], batch[0], (9, 2)))
    arms = [{"name": one.name, **one.figures(stock)} for one in (stock, other)]
    return {"batch": 2, "prompts": 4, "arms": arms, "provenance": {"date": "2026-01-02T00:00"}}


def bench(model: str, rules: list[str]) -> dict[str, Any]:
    """As `sere bench` writes them: two batch sizes, stock and each of `rules`."""
    policies = [None, *(Policy.from_json(rule) for rule in rules)]
    return {
        "provenance": {"commit": "def", "machine": "two cores"},
        "model": model,
        "E": 8,
        "K": 2,
        "layers": 2,
        "of_layers": 2,
        "dtype": "float32",
        "load": {"input_len": 4, "output_len": 8, "rounds": 3, "batches": [1, 4]},
        "roofline": {"text": "10 GB/s"},
        "results": [
            {"batch": batch, "arms": [_timed(p, i, batch) for i, p in enumerate(policies)]}
            for batch in (1, 4)
        ],
    }


def served(label: str | None, rate: float | str, **figures: Any) -> dict[str, Any]:
    """As `vllm bench serve --save-result` of vLLM 0.32 writes one run (a part of its figures)."""
    known = {
        "date": "20261124-041950",
        "endpoint_type": "openai",
        "backend": "openai",
        "label": label,
        "model_id": "tiny",
        "tokenizer_id": "tiny",
        "num_prompts": 60,
        "request_rate": rate,
        "burstiness": 1.0,
        "max_concurrency": None,
        "duration": 6.1,
        "completed": 60,
        "failed": 0,
        "total_input_tokens": 2880,
        "total_output_tokens": 1920,
        "request_throughput": 9.85,
        "output_throughput": 315.21,
        "mean_ttft_ms": 11.2,
        "median_ttft_ms": 9.51,
        "p99_ttft_ms": 25.02,
        "mean_tpot_ms": 2.7,
        "median_tpot_ms": 2.66,
        "p99_tpot_ms": 5.46,
    }
    return {**known, **figures}


def served_by_sere() -> dict[str, Any]:
    """As `sere bench --rate` writes it: stock first."""
    figures = {"ttft_ms": 9.0, "ttft_p99_ms": 20.0, "tokens_per_s": 300.0}
    rates = [
        {
            "rate": rate,
            "arms": [
                {"name": "stock", "tpot_ms": 4.0 * scale, **figures},
                {"name": "S=1", "tpot_ms": 2.5 * scale, **figures},
            ],
        }
        for rate, scale in ((4.0, 1), (float("inf"), 3))
    ]
    load = {"input_len": 128, "output_len": 32, "rounds": 5, "batches": [8]}
    return {"model": "tiny", "load": load, "requests": 100, "server": rates}


def _timed(policy: Policy | None, number: int, batch: int) -> dict[str, Any]:
    speedup = 1 + 0.3 * number * batch / 4
    return {
        "name": policy.brief() if policy else "stock",
        "policy": policy.to_dict() if policy else None,
        "tpot_ms": 9.37 * batch / speedup,
        "tpot_ms_by_round": [9.37 * batch / speedup, 9.9 * batch / speedup],
        "tokens_per_s": 1e3 * speedup / 9.37,
        "active_before": 6.25,
        "active_after": 6.25 - number,
        "predicted_ms": 2.1 * batch,
        "speedup": speedup,
        "speedup_interval_95": [speedup - 0.11, speedup + 0.12],
        "predicted_speedup": speedup + 0.2,
    }
