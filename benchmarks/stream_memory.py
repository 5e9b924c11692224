"""Peak memory of calibration, and of evaluation: the whole model in memory, and layer by layer.

    python benchmarks/stream_memory.py -o benchmarks/results/stream_memory.json
    python benchmarks/stream_memory.py --evaluate -o benchmarks/results/stream_memory_evaluate.json

A random Qwen3-MoE of 12 layers (64 experts, float32), calibrated or evaluated in fresh processes.
Peaks are of the process's own memory (RssAnon, read every 5 ms) less what its imports take, beside
the bytes of one layer's experts; pages of mapped files, which the kernel drops when it must,
are in "resident" (VmHWM). Both tables, or all figures, must be equal, or no peak is given.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from random_model import write_random_model

from sere.calibration.calibrate import calibrate
from sere.evaluation import evaluate
from sere.results import provenance

LAYERS, E, K, H, MOE_INTERMEDIATE = 12, 64, 8, 512, 512
_COLUMNS = ("peak_mb", "layers_of_experts", "resident_mb", "seconds")


def main() -> None:
    """Build, measure, compare."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("-o", "--output", default="stream_memory.json")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--evaluate", action="store_true", help="three policies, batches 1 and 8")
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
        table = Path(name) / "table" if arguments.evaluate else None
        if table:
            _measured(folder, table, True, arguments.samples)
        runs = {
            side: _measured(folder, Path(name) / side, side == "streamed", arguments.samples, table)
            for side in ("in memory", "streamed")
        }
        found = [_found(Path(name) / side) for side in runs]
    if found[0] != found[1]:
        raise SystemExit("streamed and in memory differ in what they find: no peak is given")
    for run in runs.values():
        if table:  # the steps of several policies: no time of any use
            del run["seconds"]
        run["layers_of_experts"] = run["peak_mb"] / layer_mb
    result = {
        "provenance": provenance.provenance(),
        "model": {"layers": LAYERS, "E": E, "H": H, "moe_intermediate": MOE_INTERMEDIATE},
        "one_layers_experts_mb": layer_mb,
        "runs": runs,
    }
    provenance.save_json(arguments.output, result)
    columns = [name for name in _COLUMNS if name in runs["streamed"]]
    rows = [[side, *(f"{run[name]:.1f}" for name in columns)] for side, run in runs.items()]
    print(provenance.text_table(["", *columns], rows))


def _found(output: Path) -> Any:
    data = output.read_bytes()
    return json.loads(data)["arms"] if data.startswith(b"{") else data


def _measured(
    folder: Path, output: Path, stream: bool, samples: int, table: Path | None = None
) -> dict[str, float]:
    """In a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_run, (str(folder), output, stream, samples, table))


def _run(
    folder: str, output: Path, stream: bool, samples: int, table: Path | None
) -> dict[str, float]:
    import transformers

    assert transformers.Qwen3MoeForCausalLM  # its import is not the model's memory
    before, highest, done = _status_mb("RssAnon"), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            highest[0] = max(highest[0], _status_mb("RssAnon"))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    started = time.perf_counter()
    text = _text(output)
    if table is None:
        calibrate(folder, output, data=text, samples=samples, stream=stream, progress=False)
    else:
        evaluate.run(
            folder,
            str(table),
            str(output),
            policies=['{"S": 1}', '{"S": 2}', '{"S": 1, "tau": 0.05}'],
            batches=[1, 8],
            data=str(text),
            samples=4 * samples,
            prompt=8,
            length=16,
            stream=stream,
        )
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
