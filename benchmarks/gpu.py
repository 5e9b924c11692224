"""Everything that needs a GPU, in one command: correctness before speed, what decides before what
explores.

    python benchmarks/gpu.py -o benchmarks/results/gpu            # all; what is done is skipped
    python benchmarks/gpu.py -o FOLDER --steps checks,tokens      # some
    python benchmarks/gpu.py --dry-run                            # what it would run, and how long

Every step is a process with a time limit of its own, its output in FOLDER/STEP.log, its result in
FOLDER/STEP.json. A step that fails, or runs out of time, does not stop those after it; speed is not
measured where `checks` failed.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
POOLS = ["--policy", '{"S": 0, "pool": 0.5}', "--policy", '{"S": 0, "pool": 0.375}']
QWEN = ["qwen3-30b-a3b", "--policy", '{"S": 1}', "--policy", '{"S": 2}', "--policy", '{"S": 8}']


@dataclass(frozen=True)
class Step:
    """script: beside this file, or a verb of `sere`. minutes: the limit. speed: only after the
    checks have passed. configs: the folder of those that `gpu_configs.py` wrote that vLLM is to
    read. folder: it writes several results, into one. In arguments {folder} is that of all."""

    name: str
    minutes: float
    script: str
    arguments: Sequence[str] = ()
    speed: bool = False
    configs: str | None = None
    folder: bool = False

    def command(self, output: Path) -> list[str]:
        """Its result goes to `output`."""
        if self.script.endswith(".py"):
            start = [sys.executable, str(HERE / self.script)]
        else:
            start = [sys.executable, "-m", "sere", self.script]
        own = [word.replace("{folder}", str(output.parent)) for word in self.arguments]
        return [*start, *own, "-o", str(output.with_suffix("") if self.folder else output)]

    def environment(self, output: Path) -> dict[str, str]:
        """What it changes of this process's."""
        if self.configs is None:
            return {}
        return {"VLLM_TUNED_CONFIG_FOLDER": str(output.parent / "configs" / self.configs)}


def _batches(*sizes: int) -> list[str]:
    return [word for size in sizes for word in ("--batch", str(size))]


TUNED = _batches(8, 16, 32, 64)
STEPS = (
    Step("checks", 6, "gpu_checks.py"),
    Step("tokens", 5, "gpu_tokens.py"),
    Step("variants", 5, "bench_variants.py", speed=True),
    Step("operator", 4, "bench_reroute.py", ["--device", "cuda"], speed=True),
    Step("engine", 9, "bench", [*QWEN, *_batches(1, 2, 4, 8, 16, 32, 64, 128, 256)], speed=True),
    Step("linear", 6, "bench", ["qwen3-30b-a3b", "--policy", '{"S": 1}', "--policy",
                                '{"S": 1, "fill": "linear", "rank": 16}', *_batches(1, 8, 32, 128)],
         speed=True),
    Step("pool", 6, "bench", [QWEN[0], *POOLS, *_batches(32, 64, 128, 256)], speed=True),
    Step("configs", 5, "gpu_configs.py", ["--folder", "{folder}/configs"], speed=True),
    Step("engine-best-for-stock", 5, "bench", [*QWEN, *TUNED], speed=True, configs="stock"),
    Step("engine-best-for-S=1", 5, "bench", [*QWEN, *TUNED], speed=True, configs="S=1"),
    Step("serving", 6, "gpu_server.py"),
    Step("profile", 5, "gpu_profile.py", speed=True),
    Step("modes", 12, "gpu_modes.py"),
    Step("mxfp4", 4, "gpu_mxfp4.py"),
    # Five pairs of processes; killed on the way, it goes on where it was.
    Step("stock", 18, "bench", [*QWEN[:3], *QWEN[-2:], "--layers", "16", "--against", "stock",
                                "--rounds", "5", *_batches(1, 8, 32)], speed=True),
    Step("server", 9, "bench", [*QWEN[:3], "--layers", "16", "--rate", "16", *_batches(64)],
         speed=True),
    Step("shapes", 90, "bench_decode.py", speed=True, folder=True),  # other models; resumable
    Step("calibrate", 5, "gpu_calibrate.py"),
    Step("first-report", 5, "first_report.py",
         ["src/sere/demo_model", "src/sere/text/bundled.jsonl", "--dtype", "bfloat16", "--graphs"]),
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing; 0 if nothing failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    names = [step.name for step in STEPS]
    parser.add_argument("-o", "--output", type=Path, default=Path("gpu"), metavar="FOLDER")
    parser.add_argument("--steps", default=",".join(names), help=f"of {', '.join(names)}")
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args(argv)
    wanted = arguments.steps.split(",")
    if unknown := set(wanted) - set(names):
        parser.error(f"{', '.join(unknown)}: expected some of {', '.join(names)}")
    failed = []
    for step in [step for step in STEPS if step.name in wanted]:
        result = arguments.output / f"{step.name}.json"
        if arguments.dry_run:
            variables = [f"{k}={shlex.quote(v)}" for k, v in step.environment(result).items()]
            words = " ".join([*variables, shlex.join(step.command(result))])
            print(f"at most {step.minutes:g} min: {words}")
        elif step.speed and "checks" in failed:
            print(f"{step.name}: left out, as the checks failed", flush=True)
        elif not _run(step, result):
            failed.append(step.name)
    return int(bool(failed))


def _run(step: Step, result: Path) -> bool:
    """Whether it passed; by what was recorded, where that is there already."""
    record = result.with_suffix(".status")
    if record.exists() and json.loads(record.read_text())["status"] == 0:
        print(f"{step.name}: done before", flush=True)
        return True
    result.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    print(f"{step.name}: at most {step.minutes:g} min ...", end=" ", flush=True)
    with result.with_suffix(".log").open("wb") as log:
        try:
            status = subprocess.run(
                step.command(result),
                stdout=log,
                stderr=log,
                timeout=60 * step.minutes,
                env={**os.environ, **step.environment(result)},
            ).returncode
        except subprocess.TimeoutExpired:
            status = 124
    seconds = time.monotonic() - began
    record.write_text(json.dumps({"status": status, "seconds": round(seconds, 1)}) + "\n")
    said = {0: "passed", 124: "out of time"}.get(status, f"failed with {status}")
    print(f"{said} after {seconds:.0f} s (see {log.name})", flush=True)
    return status == 0


if __name__ == "__main__":
    raise SystemExit(main())
