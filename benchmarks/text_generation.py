"""Free generation of the text model in the real engine: when do texts part from stock's, and do
their lengths or repetitions drift?

    python benchmarks/text_generation.py -o benchmarks/results/text_generation.json

Every policy continues the same prompts, of documents that neither the model nor a table has seen,
greedily, in batches that all policies take before the next batch comes. A text that has once parted
is another text, so only the place where it does is counted.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from sere.calibration.calibrate import calibrate
from sere.files import check_writable
from sere.models.loading import load_tokenizer
from sere.policy import Policy
from sere.results import provenance
from sere.serving.engine import Engine
from sere.text.corpus import encoder

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))
from benchmarks.text_model import CALIBRATION, DOMAINS, MODEL, Text, passages  # noqa: E402

BATCH, PROMPT, WRITTEN, SEED, RANK = 32, 48, 256, 500, 16
NGRAM = 4
ONE: dict[str, Any] = {"S": 1, "min_active": 1}
POLICIES: dict[str, dict[str, Any] | None] = {
    "stock": None,
    "paper: S=1": ONE,
    "paper: S=2": {**ONE, "S": 2},
    "scale, tau: tau=0.014": {**ONE, "tau": 0.014},
    "linear: S=1": {**ONE, "fill": "linear"},
    "linear, tau: tau=0.014": {**ONE, "fill": "linear", "tau": 0.014},
}


def repeated(tokens: list[int]) -> float:
    """The share of a text's runs of four tokens that it has written before."""
    runs = [tuple(tokens[i : i + NGRAM]) for i in range(len(tokens) - NGRAM + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def parts_at(mine: list[int], stock: list[int]) -> int | None:
    """The first token that is another; None if none is."""
    pairs = enumerate(zip(mine, stock, strict=False))
    found = next((i for i, (a, b) in pairs if a != b), None)
    return found if found is not None or len(mine) == len(stock) else min(len(mine), len(stock))


def figures(mine: list[list[int]], stock: list[list[int]]) -> dict[str, Any]:
    places = [parts_at(a, b) for a, b in zip(mine, stock, strict=True)]
    quartiles = [WRITTEN if place is None else place for place in places]
    lengths = [len(tokens) for tokens in mine]
    return {
        "same": places.count(None) / len(places),
        "parts_at": statistics.quantiles(quartiles, n=4),  # a text that never parts: at its end
        "length": statistics.mean(lengths),
        "ended": sum(length < WRITTEN for length in lengths) / len(lengths),
        "repeated": statistics.mean(map(repeated, mine)),
    }


def generated(domain: str, prompts: int, folder: Path) -> dict[str, Any]:
    """By policy: figures of its texts, and how many experts were active."""
    text = Text.read(ROOT / f"training/text_model/held_{domain}.jsonl.xz")
    data, table = folder / f"{domain}.jsonl", folder / f"{domain}.table"
    data.write_text("".join(json.dumps({"text": piece}) + "\n" for piece in text.fit))
    samples, length = CALIBRATION
    calibrate(str(MODEL), table, data=data, samples=samples, length=length, seed=SEED, maps=RANK)
    encode = encoder(load_tokenizer(str(MODEL)))
    chosen = [one.tokens for one in passages(text, encode, prompts, PROMPT, SEED)]
    policies = {n: Policy.from_dict(given) if given else None for n, given in POLICIES.items()}
    engine = Engine(
        MODEL, table, batch=BATCH, policies=policies.values(), dtype="float32", enforce_eager=True,
        max_model_len=PROMPT + WRITTEN, max_num_batched_tokens=2048,
    )  # fmt: skip
    written: dict[str, list[list[int]]] = {name: [] for name in POLICIES}
    active: dict[str, list[float]] = {name: [] for name in POLICIES}
    for start in range(0, prompts, BATCH):
        for name, policy in policies.items():
            engine.set_policy(policy)
            engine.reset_stats()
            written[name] += engine.generate(chosen[start : start + BATCH], WRITTEN).token_ids
            counts = engine.stats().values()
            steps = sum(layer["steps"] for layer in counts)
            active[name].append(sum(c["active_after"] for c in counts) / steps if steps else 0)
    engine.close()
    return {
        name: {**figures(own, written["stock"]), "active": statistics.mean(active[name])}
        for name, own in written.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", required=True)
    parser.add_argument("--prompts", type=int, default=64, help=f"a domain; in batches of {BATCH}")
    given = parser.parse_args()
    check_writable(given.output, kind="result")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    with tempfile.TemporaryDirectory() as folder:
        found = {domain: generated(domain, given.prompts, Path(folder)) for domain in DOMAINS}
    result = {
        "provenance": provenance.provenance(),
        "batch": BATCH,
        "prompts": given.prompts,
        "prompt": PROMPT,
        "written": WRITTEN,
        "domains": found,
    }
    provenance.save_json(given.output, result)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
