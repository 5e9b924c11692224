"""What the bundled model answers in the real vLLM engine under several policies.

Every batch of prompts is decoded under every policy before the next batch comes, in one engine, so
that speeds are compared under the same conditions.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sere import demo_model
from sere.demo_model.tasks import FAMILIES, Example, examples, is_correct
from sere.policy import Policy
from sere.serving.engine import Batch, Engine
from sere.speed.result import interval
from sere.table import Table

_MAX_TOKENS = 48
_MAX_LENGTH = 128


@dataclass
class Arm:
    """One policy and what was measured under it."""

    name: str
    policy: Policy | None
    correct: dict[str, list[bool]] = field(default_factory=lambda: {f: [] for f in FAMILIES})
    counters: dict[int, dict[str, int]] = field(default_factory=dict)
    tokens_per_s: list[float] = field(default_factory=list)

    def take(self, prompts: list[Example], batch: Batch, stats: dict[int, dict[str, int]]) -> None:
        """Add one decoded batch."""
        for example, text in zip(prompts, batch.texts, strict=True):
            self.correct[example.family].append(is_correct(example, text))
        for index, counters in stats.items():
            total = self.counters.setdefault(index, dict.fromkeys(counters, 0))
            for name, value in counters.items():
                total[name] += value
        self.tokens_per_s.append(batch.decoded / batch.decode_s)

    def active(self, index: int) -> tuple[float, float]:
        """Mean active experts of a layer per decode step, before and after re-routing."""
        counters = self.counters[index]
        steps = max(counters["steps"], 1)
        return counters["active_before"] / steps, counters["active_after"] / steps

    def share(self, counter: str, K: int) -> float:
        """Share of the decode rows' slots that were re-routed (or critical)."""
        slots = sum(c["rows_fast"] for c in self.counters.values()) * K
        return sum(c[counter] for c in self.counters.values()) / max(slots, 1)

    def exact_match(self, family: str | None = None) -> float:
        """Share of right answers, of one family or of all."""
        right = [x for f, xs in self.correct.items() if family in (None, f) for x in xs]
        return sum(right) / max(len(right), 1)


def decode(
    policies: Sequence[tuple[str, Policy | None]],
    table: Path,
    *,
    prompts: int,
    batch: int,
    seed: int,
) -> list[Arm]:
    """Held-out prompts under every policy, stock first."""
    arms = [Arm(name, policy) for name, policy in policies]
    engine = _engine(table, batch)
    K = Table.load(table).fingerprint.K
    held_out = examples(prompts, seed=seed, split="held_out")
    parts = [held_out[start : start + batch] for start in range(0, prompts, batch)]
    for arm in arms:  # warm-up, not counted
        _decode(engine, arm, parts[0], K)
    for i, part in enumerate(tqdm(parts, "decode", unit="batch")):
        for arm in arms[i % len(arms) :] + arms[: i % len(arms)]:
            arm.take(part, *_decode(engine, arm, part, K))
    return arms


def _engine(table: Path, batch: int) -> Engine:
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # one process
    return Engine(
        demo_model.PATH,
        table,
        batch=batch,
        dtype="float32",  # CPUs without bf16 units emulate it
        enforce_eager=True,
        max_model_len=_MAX_LENGTH,
    )


def _decode(
    engine: Engine, arm: Arm, part: list[Example], K: int
) -> tuple[Batch, dict[int, dict[str, int]]]:
    """Decode one batch. Stock routing counts nothing, at no cost: its experts are counted in a
    second run with S=K, which must give the same tokens (the gate for all speeds)."""
    prompts = [example.prompt for example in part]
    engine.set_policy(arm.policy or Policy(S=K))
    engine.reset_stats()
    decoded = engine.generate(prompts, _MAX_TOKENS)
    stats = engine.stats()
    if arm.policy is None:
        engine.set_policy(None)
        stock = engine.generate(prompts, _MAX_TOKENS)
        if stock.token_ids != decoded.token_ids:
            raise RuntimeError(
                "S=K differs from stock routing: no speed is reported; please report"
            )
        decoded = stock
    return decoded, stats


def result(arms: list[Arm], table: Table, batch: int) -> dict[str, Any]:
    """Everything measured, for programs; `story` reads nothing else."""
    K = table.fingerprint.K
    return {
        "table": {"method": table.method, **table.provenance},
        "batch": batch,
        "prompts": sum(map(len, arms[0].correct.values())),
        "E": table.fingerprint.E,
        "K": K,
        "arms": [
            {
                "name": arm.name,
                "policy": arm.policy.to_dict() if arm.policy else None,
                "exact_match": arm.exact_match(),
                "exact_match_by_family": {family: arm.exact_match(family) for family in FAMILIES},
                "active_by_layer": {str(index): arm.active(index) for index in arm.counters},
                "rerouted_fraction": arm.share("slots_rerouted", K),
                "critical_fraction": arm.share("slots_critical", K),
                "decode_tokens_per_s": statistics.median(arm.tokens_per_s),
                "answers_lost": _lost(arm, arms[0]),
                "speed_ratio_to_stock": statistics.median(_ratios(arm, arms[0])),
                "speed_ratio_interval_95": interval(_ratios(arm, arms[0])),
                "decode_tokens_per_s_by_batch": arm.tokens_per_s,
            }
            for arm in arms
        ],
    }


def _ratios(arm: Arm, stock: Arm) -> list[float]:
    """Decode tokens/s against stock on the same batch, by batch."""
    pairs = zip(arm.tokens_per_s, stock.tokens_per_s, strict=True)
    return [mine / theirs for mine, theirs in pairs]


def _lost(arm: Arm, stock: Arm) -> dict[str, Any]:
    """Answers that were right under stock and are not under this policy; the share's 95 % interval
    is Clopper and Pearson's."""
    from scipy.stats import binomtest

    pairs = [
        pair
        for family in FAMILIES
        for pair in zip(stock.correct[family], arm.correct[family], strict=True)
    ]
    right = sum(before for before, _ in pairs)
    lost = sum(before and not after for before, after in pairs)
    if not right:
        return {"count": 0, "of": 0, "interval_95": [0.0, 1.0]}
    found = binomtest(lost, right).proportion_ci(method="exact")
    return {"count": lost, "of": right, "interval_95": [float(found.low), float(found.high)]}
