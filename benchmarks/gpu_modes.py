"""Engine modes that no CPU runs, each in a process of its own, with re-routing on.

    python benchmarks/gpu_modes.py -o modes.json [--modes ngram,fp8,preemption]

For each: S=K writes what "off" writes; S=1 moves slots; in eager steps no row that reaches the
experts names one twice; an exact request among fast ones writes what it writes with re-routing off.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from typing import Any

from sere.policy import Policy
from sere.results import provenance

TOKENS = 24
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4}
MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "eager": {"enforce_eager": True},
    "ngram": {"speculative_config": NGRAM},
    "fp8": {"quantization": "fp8"},
    "chunked prefill": {"max_num_batched_tokens": 64, "enable_chunked_prefill": True},
    "preemption": {"num_gpu_blocks_override": 24},
}


def main() -> int:
    """0 if every mode passed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("-o", "--output", default="modes.json")
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--timeout", type=int, default=240, help="seconds a mode may take")
    parser.add_argument("--only", help="one mode, in this process")
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps(checked(arguments.only)))
        return 0
    result: dict[str, Any] = {"provenance": provenance.provenance(), "modes": {}}
    for mode in arguments.modes.split(","):
        result["modes"][mode] = found = _in_a_process(mode, arguments.timeout)
        print(f"{mode}: {found}", flush=True)
        provenance.save_json(arguments.output, result)
    return int(not all(found.get("passed") for found in result["modes"].values()))


def _in_a_process(mode: str, timeout: int) -> dict[str, Any]:
    try:
        done = subprocess.run(
            [sys.executable, __file__, "--only", mode],
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        return {"passed": False, "reason": f"not finished in {timeout} s"}
    if done.returncode:
        return {"passed": False, "reason": (done.stdout + done.stderr)[-1500:]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def checked(mode: str) -> dict[str, Any]:
    """What holds in one mode."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from sere.serving.engine import Engine
    from sere.speed.setup import Load, subject

    load = Load((8,), input_len=96, output_len=TOKENS)
    with subject("qwen3-30b-a3b", None, load, layers=2) as served:
        options = {**served.options, **MODES[mode]}
        engine = Engine(served.folder, served.table, batch=8, **options)
        prompts = load.prompts(8, 0, served.vocabulary)

        def tokens(policy: Policy | None) -> list[list[int]]:
            engine.set_policy(policy)
            return engine.generate(prompts, TOKENS, to_the_end=True).token_ids

        off, all_kept = tokens(None), tokens(Policy(S=served.K))
        engine.reset_stats()
        tokens(Policy(S=1))
        moved = sum(layer["slots_rerouted"] for layer in engine.stats().values())
        holds = {
            "S=K writes what off writes": off == all_kept,
            "S=1 moves slots": moved > 0,
            "exact among fast is stock": _exact(engine, prompts, off),
        }
        if options["enforce_eager"]:  # no step of a graph can be recorded
            holds["rows name distinct experts"] = _distinct(engine, prompts)
    return {"passed": all(holds.values()), **holds, "slots moved": moved}


def _distinct(engine: Any, prompts: list[list[int]]) -> bool:
    engine.llm.collective_rpc("sere_record", args=(True,))
    engine.generate(prompts, 4, to_the_end=True)
    (recorded,) = engine.llm.collective_rpc("sere_recording")
    engine.llm.collective_rpc("sere_record", args=(False,))
    rows = [row for steps in recorded.values() for _, _, _, ids, _ in steps for row in ids]
    return bool(rows) and all(len(set(row)) == len(row) for row in rows)


def _exact(engine: Any, prompts: list[list[int]], off: list[list[int]]) -> bool:
    """The first request asks to be exact, all others are fast."""
    from vllm import SamplingParams

    engine.set_policy(Policy(S=1))
    given = [{"prompt_token_ids": ids} for ids in prompts]
    asked = [{"sere": "exact"}] + [None] * (len(prompts) - 1)
    sampling = [
        SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, extra_args=extra)
        for extra in asked
    ]
    done = engine.llm.generate(given, sampling, use_tqdm=False)
    return list(done[0].outputs[0].token_ids) == off[0]


if __name__ == "__main__":
    raise SystemExit(main())
