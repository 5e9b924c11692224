"""What the plug-in costs where it can win nothing: decode steps of stock vLLM against off and S=K.

    python benchmarks/bench_overhead.py -o benchmarks/results/overhead.json
    python benchmarks/bench_overhead.py --random -o benchmarks/results/overhead_random.json

The demo model (or a random one of 8 layers, 64 experts, 8 chosen, H=512) in vLLM's CPU engine:
three engines in one process, one with the plug-in and two stock, which tells what equal engines
differ by. Four arms take turns, every batch as wide and as long as the others. Off is the policy
None: the operator is skipped. S=K does all the work (votes and counters too) and moves nothing;
tokens must be equal, or no figure is given.
A larger model's step takes longer, the operator hardly: the demo model is the worst case.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path

from random_model import write_random_model
from tqdm import tqdm

from sere import demo_model
from sere.calibration.calibrate import calibrate
from sere.demo_model.tasks import examples
from sere.policy import Policy
from sere.results import provenance
from sere.serving.engine import Engine
from sere.speed.result import interval

TOKENS = 64


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("-o", "--output", default="overhead.json")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--random", action="store_true", help="a larger model of random weights")
    arguments = parser.parse_args()
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    prompts = [e.prompt for e in examples(arguments.batch, seed=0, split="held_out")]
    with tempfile.TemporaryDirectory() as folder:
        model, text = demo_model.PATH, Path(folder) / "text.jsonl"
        if arguments.random:
            sizes = {"layers": 8, "E": 64, "K": 8, "H": 512, "moe_intermediate": 256}
            model = write_random_model(Path(folder) / "model", **sizes)
        text.write_text("".join(json.dumps({"text": prompt}) + "\n" for prompt in prompts))
        table = Path(folder) / "sere.table"
        K = calibrate(model, table, data=text, samples=32, progress=False).fingerprint.K
        options = {"dtype": "float32", "enforce_eager": True, "max_model_len": 128}
        stock, again = (Engine(model, None, batch=arguments.batch, **options) for _ in range(2))
        engine = Engine(model, table, batch=arguments.batch, **options)
        arms: dict[str, tuple[Engine, Policy | None]] = {
            "stock": (stock, None),
            "stock again": (again, None),
            "off": (engine, None),
            "S=K": (engine, Policy(S=K)),
        }
        steps: dict[str, list[float]] = {name: [] for name in arms}
        order = list(arms)
        for turn in tqdm(range(arguments.rounds + 2)):
            tokens = []
            order = order[1:] + order[:1] if turn % 2 else order[::-1]
            for name in order:
                served, policy = arms[name]
                if served is engine:
                    engine.set_policy(policy)
                batch = served.generate(prompts, TOKENS, to_the_end=True)
                tokens.append(batch.token_ids)
                if turn >= 2:
                    steps[name].append(batch.decode_s / (TOKENS - 1) * 1e3)
            if tokens[1:] != tokens[:-1]:
                raise SystemExit("off or S=K changes tokens: no figure is given")
    overhead = {}
    for name in ("stock again", "off", "S=K"):
        ratios = [a / b for a, b in zip(steps[name], steps["stock"], strict=True)]
        low, high = interval(ratios)
        median = statistics.median(ratios) - 1
        overhead[name] = {"median": median, "interval_95": [low - 1, high - 1]}
    result = {
        "provenance": provenance.provenance(),
        "model": "random" if arguments.random else demo_model.NAME,
        "batch": arguments.batch,
        "rounds": arguments.rounds,
        "ms_a_step": {name: statistics.median(values) for name, values in steps.items()},
        "overhead": overhead,
    }
    provenance.save_json(arguments.output, result)
    print(result["ms_a_step"])
    for name, cost in overhead.items():
        low, high = cost["interval_95"]
        print(f"{name}: {cost['median']:+.2%} (95 %: {low:+.2%}, {high:+.2%})")


if __name__ == "__main__":
    main()
