"""Decode benchmarks that need a GPU, in one command: a list of `sere bench` calls, the most telling
first.

    python benchmarks/bench_decode.py -o benchmarks/results/gpu
    python benchmarks/bench_decode.py --dry-run

Resumable: a call whose result is there is skipped, an interrupted one goes on where it was. Layers
are cut to what fits `--memory` GB in bfloat16. Weights are random, so is what stands in for what:
speed is measured here, quality is not (`sere evaluate`).
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from sere.speed.shapes import SHAPES, Shape
from sere.step_cost.roofline import Sizes

# Rules as `sere tune` finds them; what they keep depends on a table, here a random one.
TUNED = '{"name": "error-aware", "S": 1, "tau": 0.02, "batches": {"96": {"tau": 0.005}}}'
POLICIES = ('{"S": 2}', '{"S": 1}', TUNED)
CONCURRENCY = (1, 4, 8, 16, 32, 64, 128, 256)
FEW = (8, 16, 32, 64)
# Of a card's memory; the rest is for keys, values, activations and graphs.
SHARE = 0.82


@dataclass(frozen=True)
class Step:
    """One call. output_len: 32 as in SERE's paper, 256 as in XShare's and OEA's."""

    shape: str
    batches: Sequence[int]
    output_len: int = 32
    rates: Sequence[str] = ()
    skewed: bool = False

    @property
    def name(self) -> str:
        ends = "-server" if self.rates else f"-{self.output_len}"
        return f"{self.shape}{ends}" + ("-skewed" if self.skewed else "")


STEPS = (
    Step("qwen3-30b-a3b", CONCURRENCY),
    Step("gpt-oss-120b", CONCURRENCY),
    Step("qwen3-30b-a3b", FEW, output_len=256),
    Step("gpt-oss-120b", FEW, output_len=256),
    Step("qwen3-30b-a3b", FEW, skewed=True),
    Step("qwen3-30b-a3b", (64,), rates=("4", "16", "inf")),
    Step("qwen1.5-moe-a2.7b", CONCURRENCY),
    Step("deepseek-v2-lite", CONCURRENCY),
    Step("qwen3-235b-a22b", FEW),
    Step("deepseek-v3", FEW),
)


def layers_that_fit(shape: str, gigabytes: float) -> int | None:
    """How many layers of a shape such a card holds in bfloat16; None is all. 0 if not even one."""
    whole, room = SHAPES[shape], SHARE * gigabytes * 1e9
    if _bytes(whole) <= room:
        return None
    one, two = (_bytes(whole.cut(layers)) for layers in (1, 2))  # all layers are alike
    return max(0, int((room - one) // (two - one)) + 1)


def _bytes(shape: Shape) -> int:
    with TemporaryDirectory() as folder:
        shape.write(folder)
        return 2 * Sizes.of(folder).total


def commands(output: Path, gigabytes: float) -> Iterator[tuple[Step, Path, list[str]]]:
    """Every step that fits: its result, and its command."""
    fitting = {shape: layers_that_fit(shape, gigabytes) for shape in SHAPES}
    for step in STEPS:
        layers = fitting[step.shape]
        if layers == 0:
            print(f"left out: {step.name}, not one layer fits {gigabytes:g} GB", file=sys.stderr)
            continue
        result = output / f"{step.name}.json"
        words = ["bench", step.shape, "-o", str(result), "--output-len", str(step.output_len)]
        words += ["--layers", str(layers)] if layers else []
        words += [word for batch in step.batches for word in ("--batch", str(batch))]
        words += [word for rate in step.rates for word in ("--rate", rate)]
        words += [word for policy in POLICIES for word in ("--policy", policy)]
        words += ["--skew", "0.5"] if step.skewed else []
        yield step, result, words


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing; 0 if nothing failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("gpu"), metavar="FOLDER")
    parser.add_argument("--memory", type=float, default=80, metavar="GB", help="of the card")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run nothing")
    arguments = parser.parse_args(argv)
    failed = []
    for step, result, words in commands(arguments.output, arguments.memory):
        if arguments.dry_run:
            print(shlex.join(["sere", *words]))
        elif result.exists():
            print(f"{result}: done before")
        else:
            arguments.output.mkdir(parents=True, exist_ok=True)
            if subprocess.run([sys.executable, "-m", "sere", *words]).returncode:
                failed.append(step.name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
