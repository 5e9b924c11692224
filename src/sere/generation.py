"""`sere evaluate --engine`: what the real vLLM engine writes under each policy, beside stock.

Every batch of prompts is decoded under every policy before the next batch comes, in one engine
whose stock routing is bit-identical to vLLM's own. Free generation is what users see: answers that
stay right, answers that stay the same, and answers that grow longer (a model that loses its thread
talks on).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from sere import demo_model, report
from sere.corpus import read_pairs
from sere.files import check_writable
from sere.policy import Policy
from sere.quality import EvaluationError, mean
from sere.serving.engine import Batch, Engine
from sere.table import Table
from sere.tasks import examples


@dataclass
class Written:
    """One policy's answers, summed a batch at a time.

    Of each: (sum, prompts). right: answers that are exactly what was asked for. same: exactly what
    stock wrote. length: tokens. kept: share of stock's answer before the first other token.
    """

    name: str
    policy: Policy | None
    right: list[tuple[float, float]] = field(default_factory=list)
    same: list[tuple[float, float]] = field(default_factory=list)
    length: list[tuple[float, float]] = field(default_factory=list)
    kept: list[tuple[float, float]] = field(default_factory=list)
    active: list[tuple[float, float]] = field(default_factory=list)

    def take(self, answers: Sequence[str], batch: Batch, stock: Batch) -> None:
        """Add one decoded batch."""
        n = len(answers)
        pairs = list(zip(batch.token_ids, stock.token_ids, strict=True))
        self.right.append((sum(map(_is_right, batch.texts, answers)), n))
        self.same.append((sum(mine == theirs for mine, theirs in pairs), n))
        self.length.append((sum(len(mine) for mine, _ in pairs), n))
        self.kept.append((sum(_agreeing(mine, theirs) for mine, theirs in pairs), n))

    def figures(self, stock: Written) -> dict[str, Any]:
        length, theirs = mean(self.length), mean(stock.length)
        pairs = zip(self.right, stock.right, strict=True)
        return {
            "exact_match": mean(self.right),
            "answers_lost": mean([(other - mine, n) for (mine, n), (other, _) in pairs]),
            "same_as_stock": mean(self.same),
            "kept": mean(self.kept),
            "length": length,
            "length_drift": length[0] / theirs[0] - 1,
            "active": mean(self.active),
        }


def _is_right(text: str, answer: str) -> bool:
    return text.split("\n")[0].strip() == answer.strip()


def _agreeing(mine: list[int], stock: list[int]) -> float:
    """Share of stock's tokens before the first that differs."""
    same = 0
    for a, b in zip(mine, stock, strict=False):
        if a != b:
            break
        same += 1
    return same / max(len(stock), 1)


def run(
    model_name: str,
    table_path: str,
    output: str,
    *,
    policies: Sequence[str],
    batch: int,
    data: str | None = None,
    samples: int = 512,
    max_tokens: int = 64,
    seed: int = 0,
    dtype: str = "auto",
) -> dict[str, Any]:
    """Decode, compare, print; writes `output` (JSON).

    data: {"prompt", "answer"} lines; by default the demo model's held-out tasks.
    """
    check_writable(output)
    table = Table.load(table_path)
    written = [Written("stock", None)]
    for text in policies:
        policy = Policy.from_json(text)
        policy.check_against(table.fingerprint.K, table.fingerprint.E)
        written.append(Written(policy.brief(), policy))
    if len({one.name for one in written}) < len(written):
        raise EvaluationError("the same policy is given twice")
    pairs = _pairs(model_name, data, samples, seed)
    path = Path(table_path).absolute()
    eager = not torch.cuda.is_available()  # compiling for a CPU takes a minute and changes nothing
    engine = Engine(
        demo_model.resolve(model_name), path, batch=batch, dtype=dtype, enforce_eager=eager
    )
    parts = [pairs[start : start + batch] for start in range(0, len(pairs), batch)]
    for number, part in enumerate(tqdm(parts, "decode", unit="batch")):
        prompts, answers = [p for p, _ in part], [a for _, a in part]
        engine.set_policy(None)
        stock = engine.generate(prompts, max_tokens)
        written[0].take(answers, stock, stock)
        others = written[1:]
        for one in others[number % len(others) :] + others[: number % len(others)]:
            engine.set_policy(one.policy)
            engine.reset_stats()
            one.take(answers, engine.generate(prompts, max_tokens), stock)
            one.active.append(_active(engine))
    result = {
        "provenance": report.provenance(),
        "model": model_name,
        "batch": batch,
        "prompts": len(pairs),
        "E": table.fingerprint.E,
        "arms": [
            {
                "name": one.name,
                "rule": one.policy.to_dict() if one.policy else None,
                **one.figures(written[0]),
            }
            for one in written
        ],
    }
    report.save_json(output, result)
    print(as_text(result))
    print(f"\nwritten: {output}")
    return result


def _pairs(model_name: str, data: str | None, samples: int, seed: int) -> list[tuple[str, str]]:
    if data is not None:
        if pairs := read_pairs(data):
            return pairs[:samples]
        raise EvaluationError(f'{data}: generation needs .jsonl lines of {{"prompt", "answer"}}')
    if model_name != demo_model.NAME:
        raise EvaluationError("--data is needed: prompts, and the answers that are right")
    return [(e.prompt, e.answer) for e in examples(samples, seed=seed, split="held_out")]


def _active(engine: Engine) -> tuple[float, float]:
    """(active experts summed over layers and steps, how many that were)."""
    layers = engine.stats().values()
    return sum(c["active_after"] for c in layers), sum(c["steps"] for c in layers)


def as_text(result: dict[str, Any]) -> str:
    """A row for each policy, with standard errors."""

    def share(figure: tuple[float, float]) -> str:
        value, error = figure
        return f"{value:.2%}" + ("" if math.isnan(error) else f" +-{error:.2%}")

    rows = [
        [
            arm["name"],
            "-" if math.isnan(arm["active"][0]) else f"{arm['active'][0]:.1f}",
            share(arm["exact_match"]),
            share(arm["answers_lost"]),
            share(arm["same_as_stock"]),
            f"{arm['length'][0]:.1f} ({arm['length_drift']:+.1%})",
        ]
        for arm in result["arms"]
    ]
    head = f"vLLM, batch {result['batch']}, {result['prompts']} prompts"
    columns = [head, "active experts", "exact match", "answers lost"]
    columns += ["same as stock", "tokens written"]
    return report.text_table(columns, rows)
