"""Does vLLM's expert kernel want other block sizes once slots are re-routed?

    python benchmarks/gpu_configs.py -o configs.json [--seconds 240] [--folder configs]

vLLM picks them by the number of tokens; after re-routing the same tokens fall on a quarter of the
experts. A layer of the Qwen3-30B-A3B shape in bf16, eight of them in one CUDA graph; stock and
re-routed slots, each under vLLM's default and under every configuration. Needs a GPU.

--folder: for stock and for each policy a folder that vLLM reads (VLLM_TUNED_CONFIG_FOLDER), with
the best of each batch size. Stock then has its own best in a comparison, so that no speed-up is
owed to an untuned stock.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from sere.kernels import Plan, reroute
from sere.policy import Policy
from sere.results import provenance

E, K, WIDTH, HIDDEN, LAYERS = 128, 8, 768, 2048, 8
SIZES, POLICIES = (2, 4, 8, 16, 32, 64, 128), (8, 2, 1)  # T; S (8 is stock)
PROMPTS = (256, 512, 1024, 2048, 4096, 8192)  # T of steps that are not measured
WORTH = 0.01
STEPS = Path(__file__).parent / "results" / "bench_h100_qwen3.json"


def main() -> None:
    """Measure until the time is up, the default first."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("-o", "--output", default="configs.json")
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--folder", type=Path, help="write files for vLLM there")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    device = "cuda"
    cases = {(T, S): slots(T, S, device) for T, S in itertools.product(SIZES, POLICIES)}
    active = {
        key: statistics.mean(len(ids.unique()) for _, ids in own) for key, own in cases.items()
    }
    rows = list(_measured(cases, arguments.seconds))
    result = {
        "provenance": provenance.provenance(),
        "active": {f"T={T} S={S}": a for (T, S), a in active.items()},
        "rows": rows,
    }
    provenance.save_json(arguments.output, result)
    print(as_text(result))
    for file in write_files(result, arguments.folder) if arguments.folder else ():
        print(f"written: {file}")


def slots(T: int, S: int, device: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(weights, ids) of every layer, [T, K] each, from a random router."""
    found = []
    for _ in range(LAYERS):
        weights, ids = torch.randn(T, E, device=device).softmax(1).topk(K)
        weights = weights / weights.sum(1, keepdim=True)
        plan = Plan.build(torch.rand(E, E), Policy(S=S), K=K).to(device)
        ids, weights = reroute(ids.to(torch.int32), weights, plan)
        found.append((weights, ids))
    return found


def configurations() -> Iterator[dict[str, int] | None]:
    """vLLM's default, then others for few rows an expert."""
    yield None
    for k, n, warps, stages in itertools.product((128, 64, 256), (64, 32, 128), (4, 8), (4, 3)):
        if (k, n) != (256, 128):  # more shared memory than there is
            yield {
                "BLOCK_SIZE_M": 16,
                "BLOCK_SIZE_N": n,
                "BLOCK_SIZE_K": k,
                "GROUP_SIZE_M": 1,
                "SPLIT_K": 1,
                "num_warps": warps,
                "num_stages": stages,
            }


def _measured(cases: dict[tuple[int, int], Any], seconds: float) -> Iterator[dict[str, Any]]:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.fused_moe import override_config
    from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts

    def weights(*shape: int) -> list[torch.Tensor]:
        return [
            0.02 * torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(LAYERS)
        ]

    up, down = weights(E, 2 * WIDTH, HIDDEN), weights(E, HIDDEN, WIDTH)
    inputs = {T: weights(T, HIDDEN) for T in SIZES}

    def microseconds(T: int, S: int) -> float:
        def run() -> None:
            for layer, (w, ids) in enumerate(cases[T, S]):
                fused_experts(inputs[T][layer], up[layer], down[layer], w, ids)

        return _in_a_graph(run) / LAYERS

    began = time.monotonic()
    with set_current_vllm_config(VllmConfig()):
        for config in configurations():
            if time.monotonic() - began > seconds:
                return
            try:
                if config is None:
                    found = {f"T={T} S={S}": microseconds(T, S) for T, S in cases}
                else:
                    with override_config(config):
                        found = {f"T={T} S={S}": microseconds(T, S) for T, S in cases}
            except Exception as error:
                yield {"config": config, "failed": str(error)[:200]}
                continue
            yield {"config": config, "us": found}


def best(result: dict[str, Any], S: int) -> dict[int, dict[str, int]]:
    """By batch size, the configuration that is fastest for slots re-routed by S; none where vLLM's
    default is, or loses less than `WORTH`."""
    rows = [row for row in result["rows"] if "us" in row]
    chosen = {}
    for T in SIZES:
        case = f"T={T} S={S}"
        fastest = min(rows, key=lambda row: row["us"][case])
        if fastest["config"] and fastest["us"][case] < (1 - WORTH) * rows[0]["us"][case]:
            chosen[T] = fastest["config"]
    return chosen


def write_files(result: dict[str, Any], folder: Path) -> Iterator[Path]:
    """A folder for vLLM by policy. vLLM takes the nearest batch size of a file, whatever the
    distance: hence its own defaults up to whole prompts."""
    from vllm.model_executor.layers.fused_moe.fused_moe import (
        get_config_file_name,
        get_default_config,
    )

    for S in POLICIES:
        chosen = best(result, S)
        configs = {
            T: chosen.get(T) or get_default_config(T, E, WIDTH, HIDDEN, K, None)
            for T in (1, *SIZES, *PROMPTS)
        }
        file = folder / ("stock" if S == K else f"S={S}") / get_config_file_name(E, WIDTH, None)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(configs, indent=1) + "\n")
        yield file


def _in_a_graph(run: Any, replays: int = 12) -> float:
    """Microseconds of `run`, the median of replays."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    for _ in range(replays):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * begin.elapsed_time(end))
    return statistics.median(times[2:])


def as_text(result: dict[str, Any]) -> str:
    """The best beside vLLM's default, and reading the active experts once at 2.95 TB/s. What the
    gain is of a whole step of 48 layers, as measured on an H100: from 5 % on it pays."""
    steps = {
        f"T={each['batch']} S={S}": 1e3 * arm["tpot_ms"]
        for each in json.loads(STEPS.read_text())["results"]
        for S, arm in zip((K, 1, 2), each["arms"], strict=False)
    }
    rows = [row for row in result["rows"] if "us" in row]
    lines = []
    for case, default in rows[0]["us"].items():
        fastest = min(rows, key=lambda row: row["us"][case])
        bound = result["active"][case] * 3 * WIDTH * HIDDEN * 2 / 2.95e6
        gain = f"{default / fastest['us'][case] - 1:+.1%}"
        of_step = (
            f"{48 * (default - fastest['us'][case]) / steps[case]:.1%}" if case in steps else "-"
        )
        least = fastest["us"][case]
        lines.append([case, f"{default:.1f}", f"{least:.1f}", gain, of_step, f"{bound:.1f}"])
    head = ["us a layer", "default", "best", "gain", "of a step", "bytes alone"]
    return provenance.text_table(head, lines)


if __name__ == "__main__":
    main()
