"""Peak memory of calibration: the whole model in memory, and one decoder layer at a time.

    python benchmarks/stream_memory.py -o benchmarks/results/stream_memory.json

A random Qwen3-MoE of 12 layers (64 experts, float32), calibrated in fresh processes.
Peaks are of the process's own memory (RssAnon, read every 5 ms) less what its imports take, beside
the bytes of one layer's experts; pages of mapped files, which the kernel drops when it must,
are in "resident" (VmHWM). Both tables must be equal, or no figure is given.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import tempfile
import threading
import time
from pathlib import Path

import torch
from random_model import write_random_model

from sere.calibration.calibrate import calibrate
from sere.results import provenance

LAYERS, E, K, H, MOE_INTERMEDIATE = 12, 64, 8, 512, 512
_COLUMNS = ("peak_mb", "layers_of_experts", "resident_mb", "seconds")


def main() -> None:
    """Build, measure, compare."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("-o", "--output", default="stream_memory.json")
    parser.add_argument("--samples", type=int, default=16)
    arguments = parser.parse_args()
    layer_mb = E * 3 * H * MOE_INTERMEDIATE * 4 / 1e6
    with tempfile.TemporaryDirectory() as name:
        folder = write_random_model(
            Path(name) / "model",
            layers=LAYERS,
            E=E,
            K=K,
            H=H,
            moe_intermediate=MOE_INTERMEDIATE,
            dtype=torch.float32,
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
        "provenance": provenance.provenance(),
        "model": {"layers": LAYERS, "E": E, "H": H, "moe_intermediate": MOE_INTERMEDIATE},
        "one_layers_experts_mb": layer_mb,
        "runs": runs,
    }
    provenance.save_json(arguments.output, result)
    rows = [[side, *(f"{run[k]:.1f}" for k in _COLUMNS)] for side, run in runs.items()]
    print(
        provenance.text_table(["", "peak MB", "layers of experts", "resident MB", "seconds"], rows)
    )


def _measured(folder: Path, output: Path, stream: bool, samples: int) -> dict[str, float]:
    """In a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_run, (str(folder), output, stream, samples))


def _run(folder: str, output: Path, stream: bool, samples: int) -> dict[str, float]:
    import transformers

    assert transformers.Qwen3MoeForCausalLM  # its import is not the model's memory
    before, highest, done = _status_mb("RssAnon"), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            highest[0] = max(highest[0], _status_mb("RssAnon"))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    started = time.perf_counter()
    calibrate(folder, output, data=_text(output), samples=samples, stream=stream, progress=False)
    seconds = time.perf_counter() - started
    done.set()
    watcher.join()
    return {
        "peak_mb": highest[0] - before,
        "resident_mb": _status_mb("VmHWM") - before,
        "seconds": seconds,
    }


def _status_mb(name: str) -> float:
    found = re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024 / 1e6


def _text(output: Path) -> Path:
    """The demo's tasks, as a file beside the output: the random model has none of its own."""
    from sere.demo_model.tasks import examples

    path = output.with_name("text.txt")
    found = examples(2000, seed=0)
    path.write_text("\n\n".join(e.prompt + e.answer for e in found))
    return path


if __name__ == "__main__":
    main()
