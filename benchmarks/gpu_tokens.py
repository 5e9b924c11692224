"""Do stock vLLM, an engine with re-routing off, and S=K write the same tokens, process by process?

    python benchmarks/gpu_tokens.py -o tokens.json [--kernels cuda,triton] [--shape qwen3-30b-a3b]

One engine a process, without inductor, whose choice of kernels is timed and may differ between two
processes (on 2026-11-27 that left open why Triton's tokens were not stock's). Each engine writes
every prompt twice: what one process does not repeat, two cannot agree on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from typing import Any

from sere.policy import Policy
from sere.results import provenance

TOKENS = 48


def main() -> int:
    """0 if all agree."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("-o", "--output", default="tokens.json")
    parser.add_argument("--shape", default="qwen3-30b-a3b")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--kernels", default="cuda,triton")
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--only", help="one engine, in this process: stock, or a kernel")
    arguments = parser.parse_args()
    batches = [int(batch) for batch in arguments.batches.split(",")]
    if arguments.only:
        print(json.dumps(written(arguments.only, arguments.shape, arguments.layers, batches)))
        return 0
    kinds = ["stock", *arguments.kernels.split(",")]
    found = {kind: _in_a_process(kind, arguments) for kind in kinds}
    result = {"provenance": provenance.provenance(), "engines": found, **judged(found)}
    provenance.save_json(arguments.output, result)
    print(json.dumps({name: result[name] for name in ("repeats", "equals_stock")}))
    return int(not all(result["repeats"].values()) or not all(result["equals_stock"].values()))


def _in_a_process(kind: str, arguments: argparse.Namespace) -> dict[str, dict[str, str]]:
    flags = ["--shape", arguments.shape, "--layers", str(arguments.layers)]
    flags += ["--batches", arguments.batches, "--only", kind]
    environment = dict(os.environ) if kind == "stock" else {**os.environ, "SERE_KERNEL": kind}
    done = subprocess.run(
        [sys.executable, __file__, *flags], env=environment, stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        raise SystemExit(f"{kind}: the engine's process ended with {done.returncode}")
    print(f"{kind}: done", flush=True)
    found: dict[str, dict[str, str]] = json.loads(done.stdout.splitlines()[-1])
    return found


def written(kind: str, shape: str, layers: int, batches: list[int]) -> dict[str, dict[str, str]]:
    """Hashes of tokens, twice each, by batch size and arm."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from sere.serving.engine import Engine
    from sere.speed.setup import Load, subject

    load = Load(tuple(batches), output_len=TOKENS)
    with subject(shape, None, load, layers=layers) as served:
        options = dict(served.options)
        if not options["enforce_eager"]:
            options["compilation_config"] = {
                "mode": 0,
                "cudagraph_mode": "FULL_DECODE_ONLY",
                "cudagraph_capture_sizes": sorted({*batches, max(batches)}),
            }
        table = None if kind == "stock" else served.table
        engine = Engine(served.folder, table, batch=max(batches), **options)
        arms: dict[str, Any] = {"stock": None}
        if kind != "stock":
            arms = {"off": None, "S=K": Policy(S=served.K), "S=1": Policy(S=1)}
        found: dict[str, dict[str, str]] = {}
        for batch in batches:
            prompts = load.prompts(batch, 0, served.vocabulary)
            for name, policy in arms.items():
                if kind != "stock":
                    engine.set_policy(policy)
                for turn in ("first", "again"):
                    tokens = engine.generate(prompts, TOKENS, to_the_end=True).token_ids
                    digest = hashlib.sha256(repr(tokens).encode()).hexdigest()[:12]
                    found.setdefault(f"{batch} {name}", {})[turn] = digest
    return found


def judged(found: dict[str, dict[str, dict[str, str]]]) -> dict[str, dict[str, bool]]:
    """Whether each engine repeats itself, and whether "off" and S=K write stock's tokens."""
    repeats = {
        f"{kind}: {key}": one["first"] == one["again"]
        for kind, arms in found.items()
        for key, one in arms.items()
    }
    equals = {
        f"{kind}: {key}": one["first"] == found["stock"][f"{key.split()[0]} stock"]["first"]
        for kind, arms in found.items()
        for key, one in arms.items()
        if key.split()[1] in ("off", "S=K")
    }
    return {"repeats": repeats, "equals_stock": equals}


if __name__ == "__main__":
    raise SystemExit(main())
