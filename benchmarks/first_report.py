"""What an engine that calibrates itself says of its policy, kept as a result.

    python benchmarks/first_report.py MODEL DATA -o benchmarks/results/first_report.json

Starts of vLLM on an empty cache, one for each policy (none named: the cautious default); see
`sere.serving.first_report`. Every start is a process of its own; the second finds the table.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from sere.results import provenance
from sere.serving.first_report import as_text

POLICIES: tuple[dict[str, Any], ...] = ({}, {"S": 1})
_START = "import json, sys; from vllm import LLM; LLM(**json.loads(sys.argv[1]))"


def main() -> None:
    """Start, collect, show."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("-o", "--output", default="first_report.json")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--graphs", action="store_true", help="compile, and capture graphs")
    arguments = parser.parse_args()
    options = {
        "model": arguments.model,
        "dtype": arguments.dtype,
        "enforce_eager": not arguments.graphs,
        "max_model_len": 256,
        "max_num_seqs": 128,
    }
    with tempfile.TemporaryDirectory() as cache:
        auto = {"data": str(arguments.data.absolute())}
        reports = [
            _reported({**options, "additional_config": {"sere": {"auto": auto, **own}}}, cache)
            for own in POLICIES
        ]
    result = {
        "provenance": provenance.provenance(),
        "model": Path(arguments.model).name,
        "data": arguments.data.name,
        "options": {**options, "model": Path(arguments.model).name},
        "reports": reports,
    }
    provenance.save_json(arguments.output, result)
    for report in reports:
        print(as_text(report))


def _reported(options: dict[str, Any], cache: str) -> dict[str, Any]:
    """The report that a start has left."""
    ran = subprocess.run(
        [sys.executable, "-c", _START, json.dumps(options)],
        env={"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ, "SERE_CACHE": cache},
        capture_output=True,
        text=True,
    )
    kept = list(Path(cache).glob("*.report.json"))
    if ran.returncode or len(kept) != 1:
        raise SystemExit(f"no report: {ran.stdout[-3000:]}{ran.stderr[-3000:]}")
    report = json.loads(kept[0].read_text())
    kept[0].unlink()  # or the next might be this one
    return dict(report)


if __name__ == "__main__":
    main()
