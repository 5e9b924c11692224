"""`sere demo`: the whole story on a laptop. Calibrates the bundled model, serves it with the real
vLLM engine, decodes held-out prompts under several policies and shows gain and cost side by side.

Every batch of prompts is decoded under every policy before the next batch comes, in one engine, so
that speeds are compared under the same conditions.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from sere import demo_model
from sere.calibration.calibrate import calibrate
from sere.demo_model.tasks import FAMILIES, Example, examples, is_correct
from sere.policy import Policy
from sere.results import pictures, provenance
from sere.serving.engine import Batch, Engine
from sere.table import Table

_MAX_TOKENS = 48
_MAX_LENGTH = 128
_SAMPLES = 400


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


def run(
    output: str | Path,
    *,
    prompts: int = 640,
    batch: int = 32,
    method: str = "frobenius",
    seed: int = 0,
) -> None:
    """The main job: prints one table; writes demo.json, demo.png and the table into `output`."""
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    pictures.check_result(folder / "demo.json")
    table_path = folder / "demo.safetensors"
    table = calibrate(demo_model.NAME, table_path, method=method, samples=_SAMPLES, seed=seed)
    arms = [Arm(name, policy) for name, policy in _policies(table)]
    engine = _engine(table_path, batch)
    held_out = examples(prompts, seed=seed, split="held_out")
    parts = [held_out[start : start + batch] for start in range(0, prompts, batch)]
    K = table.fingerprint.K
    for arm in arms:  # warm-up, not counted
        _decode(engine, arm, parts[0], K)
    for i, part in enumerate(tqdm(parts, "decode", unit="batch")):
        for arm in arms[i % len(arms) :] + arms[: i % len(arms)]:
            arm.take(part, *_decode(engine, arm, part, K))
    result = _result(arms, table, batch)
    print(as_text(result))
    provenance.save_json(folder / "demo.json", result)
    plot(result, folder / "demo.png")
    print(f"\nwritten: {folder}/demo.json, {folder}/demo.png, {table_path}")


def _policies(table: Table) -> list[tuple[str, Policy | None]]:
    """Stock, the paper's two S, and S=1 with thresholds that a quarter and half of the experts
    do not reach with their nearest neighbour: rho on a scale that fits this table."""
    nearest = torch.cat(
        [
            layer.similarity.clone().fill_diagonal_(-1).max(1).values
            for layer in table.layers.values()
        ]
    )
    arms: list[tuple[str, Policy | None]] = [("stock", None)]
    arms += [(f"S={S}", Policy(S=S)) for S in (2, 1)]
    for quantile in (0.25, 0.5):
        rho = round(torch.quantile(nearest, quantile).item(), 2)
        arms.append((f"S=1 rho={rho}", Policy(S=1, rho=rho)))
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


def _result(arms: list[Arm], table: Table, batch: int) -> dict[str, Any]:
    """Everything measured, for programs; `as_text` and `plot` read nothing else."""
    K = table.fingerprint.K
    return {
        "provenance": provenance.provenance(),
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
                "speed_ratio_to_stock": _speed_ratio(arm, arms[0]),
                "decode_tokens_per_s_by_batch": arm.tokens_per_s,
            }
            for arm in arms
        ],
    }


def _speed_ratio(arm: Arm, stock: Arm) -> float:
    """Median over batches of decode tokens/s against stock on the same batch."""
    pairs = zip(arm.tokens_per_s, stock.tokens_per_s, strict=True)
    return statistics.median(mine / theirs for mine, theirs in pairs)


def as_text(result: dict[str, Any]) -> str:
    """The table for people: a column per policy."""
    arms = result["arms"]

    def row(name: str, cell: Callable[[dict[str, Any]], str]) -> list[str]:
        return [name, *map(cell, arms)]

    families = [
        row(family, lambda arm, f=family: f"{arm['exact_match_by_family'][f]:.1%}")  # type: ignore[misc]
        for family in arms[0]["exact_match_by_family"]
    ]
    layers = [
        row(
            f"active experts, layer {index}",
            lambda arm, i=index: "{:.1f} -> {:.1f}".format(*arm["active_by_layer"][i]),  # type: ignore[misc]
        )
        for index in arms[0]["active_by_layer"]
    ]
    head = f"exact match ({result['prompts']} prompts, batch {result['batch']})"
    return provenance.text_table(
        row(head, lambda arm: arm["name"]),
        [
            *families,
            row("all families", lambda arm: f"{arm['exact_match']:.1%}"),
            [],
            *layers,
            [],
            row("slots re-routed", lambda arm: f"{arm['rerouted_fraction']:.1%}"),
            row("slots kept as critical", lambda arm: f"{arm['critical_fraction']:.1%}"),
            row("decode tokens/s (median)", lambda arm: f"{arm['decode_tokens_per_s']:.0f}"),
            row("  to stock (median of pairs)", lambda arm: f"{arm['speed_ratio_to_stock']:.2f}x"),
        ],
    )


def plot(result: dict[str, Any], path: Path) -> None:
    """Left: quality against active experts. Right: decode speed against stock."""
    from matplotlib.figure import Figure

    arms = result["arms"]
    figure = Figure(figsize=(10, 4), layout="constrained")
    quality, speed = figure.subplots(1, 2)
    for arm in arms:
        active = statistics.mean(after for _, after in arm["active_by_layer"].values())
        point = (active, 100 * arm["exact_match"])
        quality.scatter(*point, s=40)
        quality.annotate(arm["name"], point, xytext=(5, 5), textcoords="offset points")
    quality.set_xlabel(f"active experts per layer and decode step (of {result['E']})")
    quality.set_ylabel("exact match, %")
    quality.margins(0.2)
    quality.grid(alpha=0.3)
    speed.barh([arm["name"] for arm in arms], [arm["speed_ratio_to_stock"] for arm in arms])
    speed.axvline(1, color="black", linewidth=0.8)
    speed.invert_yaxis()
    speed.set_xlabel("decode tokens/s, ratio to stock (median over batches)")
    pictures.save(figure, path, dpi=120)
