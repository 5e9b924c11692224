"""What an engine's start takes that calibrates itself: without sere, the first start, the second.

    python benchmarks/start_up.py -o benchmarks/results/start_up.json

The bundled model on vLLM's CPU engine, eager, on texts of its own: half as many again as are
calibrated on, so that the first start has some to try its policy on (its report). Three starts a
round, each a process of its own, in a new order: "stock" without sere, "first" with "auto" and an
empty cache, "second" with the cache that this left. Medians over rounds, and of the differences to
the stock start of the same round, in seconds of the clock and of the CPU (all of the process's, so
that whoever else is busy on the machine counts less); and the report's own seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from sere import demo_model
from sere.demo_model.tasks import examples
from sere.results import provenance

STARTS = ("stock", "first", "second")
_TASKS = 8  # of the bundled model, in a text
_START = "import json, sys; from vllm import LLM; LLM(**json.loads(sys.argv[1]))"


def main() -> None:
    """Start, time, compare."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("-o", "--output", default="start_up.json")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=400, help="texts")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        rounds = [
            _round(Path(name, str(i)), i, arguments.samples) for i in range(arguments.rounds + 1)
        ][1:]  # the first fills the disk's cache
    result = {
        "provenance": provenance.provenance(),
        "settings": {"rounds": arguments.rounds, "samples": arguments.samples},
        "starts": {start: _summary(rounds, start) for start in STARTS},
        "report": statistics.median(found["first"]["report"] for found in rounds),
        "rounds": rounds,
    }
    provenance.save_json(arguments.output, result)
    columns = ("clock", "cpu", "clock_more", "cpu_more")
    rows = [
        [start, *(f"{result['starts'][start][column]:.2f}" for column in columns)]
        for start in STARTS
    ]
    print(provenance.text_table(["start", *columns], rows))


def _round(folder: Path, number: int, samples: int) -> dict[str, dict[str, float]]:
    """Seconds of each start; the second follows the first, with the stock one anywhere."""
    folder.mkdir()
    text = folder / "text.jsonl"
    drawn = [e.prompt + e.answer for e in examples(samples * 3 // 2 * _TASKS, seed=0)]
    texts = ("\n".join(drawn[at : at + _TASKS]) for at in range(0, len(drawn), _TASKS))
    text.write_text("".join(json.dumps({"text": own}) + "\n" for own in texts))
    order = ["first", "second"]
    order.insert(number % 3, "stock")
    found = {}
    for start in order:
        auto = {"data": str(text), "samples": samples}
        own = None if start == "stock" else {"sere": {"auto": auto}}
        found[start] = _timed(own, folder / "cache")
        kept = list((folder / "cache").glob("*.table"))
        if own and len(kept) != 1:
            raise SystemExit(f"the {start} start left {len(kept)} tables")
        if start == "first":
            report = json.loads(kept[0].with_suffix(".report.json").read_text())
            found[start]["report"] = report["seconds"]
    return found


def _timed(own: dict[str, Any] | None, cache: Path) -> dict[str, float]:
    options = {
        "model": str(demo_model.PATH),
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 256,
        "additional_config": own or {},
    }
    settings = {"SERE_CACHE": str(cache), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    settings |= {"VLLM_CPU_KVCACHE_SPACE": "1"}
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    ran = subprocess.run(
        [sys.executable, "-c", _START, json.dumps(options)],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if ran.returncode:
        raise SystemExit(ran.stderr[-3000:])
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"clock": time.perf_counter() - began, "cpu": cpu}


def _summary(rounds: list[dict[str, dict[str, float]]], start: str) -> dict[str, float]:
    summary: dict[str, float] = {}
    for unit in ("clock", "cpu"):
        summary[unit] = statistics.median(found[start][unit] for found in rounds)
        more = sorted(found[start][unit] - found["stock"][unit] for found in rounds)
        summary[f"{unit}_more"] = statistics.median(more)
        summary[f"{unit}_least"], summary[f"{unit}_most"] = more[0], more[-1]
    return summary


if __name__ == "__main__":
    main()
