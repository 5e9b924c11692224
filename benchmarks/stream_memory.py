"""Peak memory of calibration: the whole model in memory, and one decoder layer at a time.

    python benchmarks/stream_memory.py -o benchmarks/results/stream_memory.json

A random Qwen3-MoE of 12 layers (64 experts, bf16), calibrated in fresh processes.
Peaks are what the kernel reports for the process (VmHWM) less what its imports take, beside the
bytes of one layer's experts. Both tables must be equal, or no figure is given.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path

import psutil
import torch
from random_model import write_random_model

from sere import report
from sere.calibrate import calibrate

LAYERS, E, K, H, MOE_INTERMEDIATE = 12, 64, 8, 512, 512


def main() -> None:
    """Build, measure, compare."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("-o", "--output", default="stream_memory.json")
    parser.add_argument("--samples", type=int, default=64)
    arguments = parser.parse_args()
    layer_mb = E * 3 * H * MOE_INTERMEDIATE * 2 / 1e6
    with tempfile.TemporaryDirectory() as name:
        folder = write_random_model(
            Path(name) / "model",
            layers=LAYERS,
            E=E,
            K=K,
            H=H,
            moe_intermediate=MOE_INTERMEDIATE,
            dtype=torch.bfloat16,
        )
        runs = {
            side: _measured(folder, Path(name) / side, side == "streamed", arguments.samples)
            for side in ("in memory", "streamed")
        }
        tables = [(Path(name) / side).read_bytes() for side in runs]
    if tables[0] != tables[1]:
        raise SystemExit("streamed and in memory give different tables: no figure is given")
    for run in runs.values():
        run["layers_of_experts"] = run["peak_mb"] / layer_mb
    result = {
        "provenance": report.provenance(),
        "model": {"layers": LAYERS, "E": E, "H": H, "moe_intermediate": MOE_INTERMEDIATE},
        "one_layers_experts_mb": layer_mb,
        "runs": runs,
    }
    report.save_json(arguments.output, result)
    rows = [
        [side, *(f"{run[k]:.1f}" for k in ("peak_mb", "layers_of_experts", "seconds"))]
        for side, run in runs.items()
    ]
    print(report.text_table(["", "peak MB", "layers of experts", "seconds"], rows))


def _measured(folder: Path, output: Path, stream: bool, samples: int) -> dict[str, float]:
    """In a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_run, (str(folder), output, stream, samples))


def _run(folder: str, output: Path, stream: bool, samples: int) -> dict[str, float]:
    import transformers

    assert transformers.Qwen3MoeForCausalLM  # its import is not the model's memory
    before = psutil.Process().memory_info().rss
    started = time.perf_counter()
    calibrate(folder, output, data=_text(output), samples=samples, stream=stream, progress=False)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"peak_mb": (peak - before) / 1e6, "seconds": time.perf_counter() - started}


def _text(output: Path) -> Path:
    """The demo's tasks, as a file beside the output: the random model has none of its own."""
    from sere.tasks import examples

    path = output.with_suffix(".txt")
    found = examples(2000, seed=0)
    path.write_text("\n".join(e.prompt + e.answer for e in found))
    return path


if __name__ == "__main__":
    main()
