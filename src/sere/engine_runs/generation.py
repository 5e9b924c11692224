"""`sere evaluate --engine`: what the real vLLM engine writes under each policy, beside stock.

Every batch of prompts is decoded under every policy before the next batch comes, in one engine
whose stock routing is vLLM's own, bit for bit. Free generation is what users see: answers that
stay right, answers that stay the same, and answers that grow longer (a model that loses its thread
talks on).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from tqdm import tqdm

from sere import demo_model
from sere.demo_model.tasks import examples
from sere.evaluation.arms import served_policies
from sere.evaluation.quality import EvaluationError, mean
from sere.files import check_writable, unfinished
from sere.models.hub import located
from sere.policy import Policy
from sere.results import provenance
from sere.results.journal import Journal, contents
from sere.serving.engine import Batch, Engine
from sere.table import Table
from sere.text.corpus import draw_pairs


@dataclass
class Part:
    """One batch under one policy: sums over its prompts.

    right: answers that are exactly what was asked for. lost: those that stock had right and this
    has not. same: exactly what stock wrote. kept: share of stock's answer before the first other
    token. length: tokens. active: active experts, summed over steps (layers x decode steps; under
    `"rows": "all"` prefill's too).
    """

    prompts: int
    right: int
    lost: int
    same: int
    kept: float
    length: int
    active: int
    steps: int

    @classmethod
    def of(
        cls, answers: Sequence[str], batch: Batch, stock: Batch, active: tuple[int, int]
    ) -> Part:
        """active: (active experts summed over layers and steps, how many that were)."""
        right = list(map(_is_right, batch.texts, answers))
        before = map(_is_right, stock.texts, answers)
        pairs = list(zip(batch.token_ids, stock.token_ids, strict=True))
        return cls(
            prompts=len(answers),
            right=sum(right),
            lost=sum(was and not now for was, now in zip(before, right, strict=True)),
            same=sum(mine == theirs for mine, theirs in pairs),
            kept=sum(_agreeing(mine, theirs) for mine, theirs in pairs),
            length=sum(len(mine) for mine, _ in pairs),
            active=active[0],
            steps=active[1],
        )


@dataclass
class Written:
    """What one policy wrote, a part for every batch."""

    name: str
    policy: Policy | None
    parts: list[Part] = field(default_factory=list)

    def beside(self, stock: Written) -> dict[str, Any]:
        """As a result has it: who wrote, and its figures."""
        rule = self.policy.to_dict() if self.policy else None
        return {"name": self.name, "rule": rule, **self.figures(stock)}

    def figures(self, stock: Written) -> dict[str, Any]:
        """Each as (value, standard error over batches), but for `length_drift`."""

        def over(name: str, count: str = "prompts") -> tuple[float, float]:
            return mean([(getattr(p, name), getattr(p, count)) for p in self.parts])

        length, theirs = over("length"), mean([(p.length, p.prompts) for p in stock.parts])
        pairs = zip(self.parts, stock.parts, strict=True)
        return {
            "exact_match": over("right"),
            "answers_lost": mean([(other.right - p.right, p.prompts) for p, other in pairs]),
            "answers_lost_gross": over("lost"),
            "same_as_stock": over("same"),
            "kept": over("kept"),
            "length": length,
            "length_drift": length[0] / theirs[0] - 1,
            "active": over("active", "steps"),
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

    data: {"prompt", "answer"} lines; by default the demo model's held-out tasks. What was
    interrupted resumes after its last whole batch.
    """
    check_writable(output, table_path, data, kind="result")
    table = Table.load(table_path)
    chosen = served_policies(policies, table)
    written = [Written("stock", None), *(Written(*named) for named in chosen.items())]
    pairs = _pairs(model_name, data, samples, seed)
    folder = located(model_name)
    settings = {
        "model": model_name,
        "table": table_path,
        "policies": {name: policy.to_dict() for name, policy in chosen.items()},
        "batch": batch,
        "pairs": hashlib.sha256(json.dumps(pairs).encode()).hexdigest(),
        "max_tokens": max_tokens,
        "dtype": dtype,
        **contents(folder, [table]),
    }
    provenance.check_settings(output, settings)
    engine = _engine(folder, table_path, batch, dtype, chosen.values())
    with Journal(unfinished(output), settings) as journal:
        for number, start in enumerate(tqdm(range(0, len(pairs), batch), "decode", unit="batch")):
            if (known := journal.get(str(number))) is None:
                part = pairs[start : start + batch]
                turned = written[number % len(written) :] + written[: number % len(written)]
                found = _decoded(engine, turned, part, max_tokens, table.fingerprint.K)
                known = {name: asdict(part) for name, part in found.items()}
                journal.add(str(number), known)
            for one in written:
                one.parts.append(Part(**known[one.name]))
        result = {
            "provenance": provenance.provenance(),
            "settings": settings,
            "model": model_name,
            "batch": batch,
            "prompts": len(pairs),
            "E": table.fingerprint.E,
            "arms": [one.beside(written[0]) for one in written],
        }
        result["warnings"] = _too_few(result)
        print(as_text(result))
        provenance.save_json(output, result)
    print(f"\nwritten: {output}")
    return result


def _engine(
    folder: str, table_path: str, batch: int, dtype: str, policies: Iterable[Policy]
) -> Engine:
    """In this process: requests that travel to another reach the engine one by one, so that
    prefill mixes with decoding and who decodes with whom is a matter of timing."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    return Engine(
        folder,
        table_path,
        batch=batch,
        policies=policies,
        dtype=dtype,
        # compiling for a CPU takes a minute and changes nothing
        enforce_eager=not torch.cuda.is_available(),
    )


def _decoded(
    engine: Engine,
    written: Sequence[Written],
    pairs: Sequence[tuple[str, str]],
    max_tokens: int,
    K: int,
) -> dict[str, Part]:
    """One batch of prompts under every policy, by name; stock's experts are counted in a second
    run of it."""
    prompts, answers = [p for p, _ in pairs], [a for _, a in pairs]
    engine.set_policy(None)
    stock = engine.generate(prompts, max_tokens)
    parts = {}
    for one in written:
        engine.set_policy(_counted(one.policy, K))
        engine.reset_stats()
        batch = engine.generate(prompts, max_tokens)
        parts[one.name] = Part.of(answers, batch if one.policy else stock, stock, _active(engine))
    return parts


def _counted(policy: Policy | None, K: int) -> Policy:
    """The same routing, every step of it counted: stock routing counts nothing, S=K does."""
    if policy is None:
        return Policy(S=K)
    off = {"S": K, "layers": {index: {"S": K} for index in policy.layers}}
    own = {rows: off if given is None else given for rows, given in policy.batches.items()}
    return replace(policy, batches=own)


def _pairs(model_name: str, data: str | None, samples: int, seed: int) -> list[tuple[str, str]]:
    if data is not None:
        if pairs := draw_pairs(data, samples, seed):
            return pairs
        raise EvaluationError(f'{data}: generation needs .jsonl lines of {{"prompt", "answer"}}')
    if model_name != demo_model.NAME:
        raise EvaluationError("--data is needed: prompts, and the answers that are right")
    return [(e.prompt, e.answer) for e in examples(samples, seed=seed, split="held_out")]


def _active(engine: Engine) -> tuple[int, int]:
    """(active experts summed over layers and steps, how many that were)."""
    layers = engine.stats().values()
    return sum(c["active_after"] for c in layers), sum(c["steps"] for c in layers)


def as_text(result: dict[str, Any]) -> str:
    """A row for each policy, with standard errors."""

    def share(figure: tuple[float, float]) -> str:
        value, error = (math.nan if part is None else part for part in figure)
        return f"{value:.2%}" + ("" if math.isnan(error) else f" +-{error:.2%}")

    keys = {
        "exact match": "exact_match",
        "answers lost": "answers_lost",
        "lost, gross": "answers_lost_gross",
    }
    if not result["arms"][0]["exact_match"][0]:  # none is right under stock, none to be lost
        keys.clear()
    rows = [
        [
            arm["name"],
            f"{arm['active'][0]:.2f}",
            *(share(arm[key]) for key in keys.values()),
            share(arm["same_as_stock"]),
            f"{arm['length'][0]:.1f} ({arm['length_drift']:+.1%})",
        ]
        for arm in result["arms"]
    ]
    head = f"vLLM, batch {result['batch']}, {result['prompts']} prompts"
    columns = [head, "active experts", *keys]
    columns += ["same as stock", "tokens written (length drift)"]
    table = provenance.text_table(columns, rows)
    return "\n\n".join([table, *_too_few(result)])


def _too_few(result: dict[str, Any]) -> list[str]:
    return provenance.not_full(result["batch"], result["prompts"], "prompts")
