"""How much a request's output depends on its neighbours, for each policy and for stock vLLM itself.

    python benchmarks/composition.py -o benchmarks/results/composition.json
    python benchmarks/composition.py --pool -o benchmarks/results/composition_pool.json

The same prompts are decoded greedily in the real engine at every batch size, each time in other
company. Of every prompt and two of its batches: is the whole answer the same, and how long does it
stay the same? Stock is not without company either: kernels round differently for other shapes.
`alone` compares with the same prompt decoded by stock in a batch of one. An arm that is independent
has every second request of a batch ask to be so, the others for nothing: each prompt is measured
once as one of those that ask.
"""

from __future__ import annotations

import argparse
import itertools
import os
import tempfile
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from tqdm import tqdm

from sere import demo_model
from sere.calibration.calibrate import calibrate
from sere.demo_model.tasks import examples, is_correct
from sere.engine_runs.generation import _agreeing
from sere.evaluation.quality import mean
from sere.files import check_writable
from sere.policy import Policy
from sere.results import provenance
from sere.results.journal import Journal
from sere.serving.engine import Engine
from sere.tuning.budget import most

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
TOKENS = 48


class Arm(NamedTuple):
    """A policy; and whether the requests that are compared ask to be independent."""

    policy: Policy | None
    independent: bool = False


ARMS = {
    "stock": Arm(None),
    "S=2": Arm(Policy(S=2)),
    "S=1": Arm(Policy(S=1)),
    "S=1, no floor": Arm(Policy(S=1, min_active=1)),
    "tau=0.02": Arm(Policy(S=1, min_active=1, tau=0.02)),
    "tau=0.1": Arm(Policy(S=1, min_active=1, tau=0.1)),
}
_BARE, _FIRST, _TAU = (
    Policy(**own, pool=0.5) for own in ({"S": 0}, {"S": 1}, {"S": 0, "tau": 0.02})
)
POOLS = {
    "stock": Arm(None),
    "pool, S=0": Arm(_BARE),
    "pool, S=0, independent": Arm(_BARE, independent=True),
    "pool, S=1": Arm(_FIRST),
    "pool, tau=0.02": Arm(_TAU),
    "pool, tau=0.02, independent": Arm(_TAU, independent=True),
}

Answers = list[list[int]]


def decoded(
    engine: Engine, prompts: list[str], size: int, seed: int, *, independent: bool = False
) -> Answers:
    """Token ids of every prompt's answer, in batches of `size` of shuffled company; independent:
    of those whose turn it was to ask for that."""
    order = list(range(len(prompts)))
    Random(seed).shuffle(order)
    answers: Answers = [[] for _ in prompts]
    for turn in range(2 if independent and size > 1 else 1):
        for start in range(0, len(order), size):
            part = order[start : start + size]
            asks = [independent and place % 2 == turn for place in range(len(part))]
            batch = engine.generate(
                [prompts[i] for i in part],
                TOKENS,
                tiers=["independent" if one else None for one in asks],
            )
            for i, tokens, asked in zip(part, batch.token_ids, asks, strict=True):
                if asked or not independent:
                    answers[i] = tokens
    return answers


def compared(runs: list[Answers], alone: Answers) -> dict[str, Any]:
    """Shares of prompts, with standard errors over prompts as if each was decoded by itself."""
    pairs = list(itertools.combinations(runs, 2)) or [(runs[0], runs[0])]
    n = len(alone)

    def share(of: Any) -> tuple[float, float]:
        return mean([(sum(of(a[i], b[i]) for a, b in pairs) / len(pairs), 1) for i in range(n)])

    def with_alone(of: Any) -> tuple[float, float]:
        return mean([(sum(of(r[i], alone[i]) for r in runs) / len(runs), 1) for i in range(n)])

    return {
        "differs_by_company": share(lambda a, b: a != b),
        "kept_by_company": share(_agreeing),
        "differs_from_alone": with_alone(lambda a, b: a != b),
    }


def as_text(result: dict[str, Any]) -> str:
    """A row for each policy, a column for each batch size."""
    sizes = list(result["arms"][0]["sizes"])
    bound = most(0) / result["prompts"]
    parts = []
    for title, figure in (
        ("other answer in other company, %", "differs_by_company"),
        ("of an answer, before the first other token, %", "kept_by_company"),
        ("other answer than stock alone, %", "differs_from_alone"),
        ("right answers, %", "right"),
    ):
        rows = []
        for arm in result["arms"]:
            cells = [_cell(arm["sizes"][size][figure], figure, size, bound) for size in sizes]
            rows.append([arm["name"], *cells])
        parts.append(provenance.text_table([title, *(f"batch {s}" for s in sizes)], rows))
    return "\n\n".join(parts)


def _cell(share: tuple[float, float], figure: str, size: str, bound: float) -> str:
    """Per cent with a standard error; where nothing differed, what it may be at most."""
    if figure.endswith("by_company") and size == "1":
        return "-"  # a batch of one has no company
    value, error = share
    if not value and figure.startswith("differs"):
        return f"0 (<{100 * bound:.1f})"
    digits = 2 if figure == "kept_by_company" else 1
    return f"{100 * value:.{digits}f} +-{100 * error:.{digits}f}"


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", default="composition.json")
    parser.add_argument(
        "--prompts",
        type=int,
        default=512,
        help="a multiple of 256, or batches of 256 are not full",
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pool", action="store_true", help="policies with a pool instead")
    parser.add_argument("--dtype", default="float32", help="bfloat16 shows stock's own rounding")
    arguments = parser.parse_args()
    check_writable(arguments.output)
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    tasks = examples(arguments.prompts, seed=11, split="held_out")
    prompts = [task.prompt for task in tasks]
    chosen = POOLS if arguments.pool else ARMS
    settings = {
        "prompts": arguments.prompts,
        "rounds": arguments.rounds,
        "dtype": arguments.dtype,
        "arms": list(chosen),
    }
    with (
        tempfile.TemporaryDirectory() as folder,
        Journal(f"{arguments.output}.unfinished", settings) as journal,
    ):
        table = Path(folder) / "sere.table"
        calibrate(demo_model.NAME, table, progress=False)
        engine = Engine(
            demo_model.PATH,
            table,
            batch=max(SIZES),
            policies=[arm.policy for arm in chosen.values()],
            dtype=arguments.dtype,
            enforce_eager=True,
            max_model_len=128,
        )
        engine.set_policy(None)
        alone = decoded(engine, prompts, 1, 0)
        arms: dict[str, dict[str, Any]] = {name: {} for name in chosen}
        for size, name in tqdm(list(itertools.product(SIZES, chosen))):
            if (found := journal.get(f"{size} {name}")) is None:
                policy, independent = chosen[name]
                engine.set_policy(policy)
                rounds = 1 if size == 1 else arguments.rounds
                runs = [
                    decoded(engine, prompts, size, seed, independent=independent)
                    for seed in range(rounds)
                ]
                found = compared(runs, alone)
                text = [[engine.llm.get_tokenizer().decode(ids) for ids in run] for run in runs]
                found["right"] = mean(
                    [
                        (sum(is_correct(task, run[i]) for run in text) / len(text), 1)
                        for i, task in enumerate(tasks)
                    ]
                )
                journal.add(f"{size} {name}", found)
            arms[name][str(size)] = found
    result = {
        "provenance": provenance.provenance(),
        **settings,
        "arms": [
            {
                "name": name,
                "rule": arm.policy.to_dict() if arm.policy else None,
                "independent": arm.independent,
                "sizes": arms[name],
            }
            for name, arm in chosen.items()
        ],
    }
    provenance.save_json(arguments.output, result)
    print(as_text(result))


if __name__ == "__main__":
    main()
