"""Quality against active experts on the demo model: all policies, all rivals, null models.

    python benchmarks/pareto.py -o benchmarks/results/pareto.json

Each seed calibrates its own tables and decodes its own held-out tasks; figures are means over seeds
with intervals from their spread. Resumable: a seed that is finished is not run again.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import math
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from scipy.stats import t as student
from torch import Tensor

from sere import demo_model
from sere.calibration.calibrate import calibrate
from sere.evaluation.arms import Arm, arm_of
from sere.evaluation.evaluate import load
from sere.evaluation.passages import load_passages
from sere.evaluation.quality import Judge, figures
from sere.files import check_writable, replaced
from sere.kernels import Plan
from sere.kernels.plan import Substitution
from sere.models.adapters import Changed
from sere.models.moe import MoELayer
from sere.policy import Policy
from sere.results import provenance
from sere.results.journal import Journal
from sere.table import Table

BATCHES = (8, 32)
FIRST_SEED = 300  # of those that no decision was made by
PROMPTS = 1024  # of each seed
LEAST = 1e-9  # nats: where nothing was lost, for a logarithm

Settings = dict[str, Any]
TAUS = (1.9, 0.2, 0.1, 0.07, 0.05, 0.035, 0.025, 0.015, 0.007, 0.003, 0.001)
# The rule as published, without the floor that `sere` puts under the experts of small batches.
OURS, PAPER = "expected error", "paper"
ONE: Settings = {"S": 1, "min_active": 1}
BLIND: Settings = {**ONE, "fill": "similar", "weights": "keep", "by": "share alone"}
FAMILIES: dict[str, list[Settings]] = {
    PAPER: [{**ONE, "S": S} for S in (1, 2, 3)],
    "paper, rho": [{**ONE, "rho": rho} for rho in (0.3, 0.5, 0.63)],
    "paper, quantile of rho": [{**ONE, "rho_quantile": q} for q in (0.25, 0.5, 0.75)],
    "paper, floor of K": [{"S": 1}],
    "random table": [{**ONE, "S": S, "table": "random"} for S in (1, 2)],
    "weights table": [{**ONE, "S": S, "table": "weights"} for S in (1, 2)],
    OURS: [{**ONE, "tau": t} for t in TAUS],
    "expected error, keep weights": [{**ONE, "tau": t, "weights": "keep"} for t in (0.1, 0.02)],
    "expected error, fill similar": [{**ONE, "tau": t, "fill": "similar"} for t in (0.1, 0.02)],
    "expected error, renormalised": [
        {**ONE, "tau": t, "renormalise": True} for t in (1.9, 0.1, 0.05, 0.025)
    ],
    "share alone": [{**BLIND, "tau": t} for t in (0.1, 0.05, 0.035, 0.025, 0.015)],
    "share alone, random table": [
        {**BLIND, "tau": t, "table": "random"} for t in (0.1, 0.05, 0.035, 0.025, 0.015)
    ],
    "expected error, ceiling": [{**ONE, "tau": 0, "max_active": m} for m in (6, 8, 10)],
    "OEA": [{"rival": "oea", "k0": k} for k in (1, 2, 3)],
    "XShare": [{"rival": "xshare", "budget": m} for m in (6, 8, 10, 12, 14)],
    "Lynx": [{"rival": "lynx", "alpha": a, "beta": b} for a, b in ((4, 1), (2, 1), (3, 2), (1, 1))],
    "top-k": [{"rival": "top_k", "k": k} for k in (1, 2, 3)],
    "top-k, keep weights": [{"rival": "top_k", "k": k, "weights": "keep"} for k in (1, 2)],
    "skip": [{"rival": "skip", "beta": b} for b in (0.8, 0.5, 0.3, 0.15)],
    "skip, keep weights": [{"rival": "skip", "beta": b, "weights": "keep"} for b in (0.5, 0.3)],
    "frequency": [{"rival": "frequency", "budget": m} for m in (16, 24)],
}
FIGURES = ("active", "kl", "top1", "perplexity", "exact_match", "rows_per_step")


def one_seed(seed: int, prompts: int, chosen: list[Settings], journal: Path) -> dict[str, Any]:
    """Figures by arm and batch size."""
    torch.set_num_threads(1)  # seeds run side by side: teams of threads would wait for each other
    model, layers = load(str(demo_model.PATH))
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: f"{folder}/{name}" for name in ("frobenius", "random", "weights")}
        for name, path in paths.items():
            calibrate(demo_model.NAME, path, method=name, seed=seed, progress=False)
        table = Table.load(paths["frobenius"])
        arms = [Arm("stock", None, table)]
        for settings in chosen:
            arms.append(_arm({**settings, "name": str(settings)}, paths, table))
    passages = load_passages(
        demo_model.NAME, str(demo_model.PATH), None, samples=prompts, prompt=1, length=1, seed=seed
    )
    key = {"seed": seed, "arms": [arm.name for arm in arms], "prompts": prompts}
    with Journal(journal, key) as pieces:
        sums = Judge(model, layers, passages, pieces, layer_error=False).measure(arms, BATCHES)
    return {
        arm.name: {str(b): {f: figures(sums[arm.name][b])[f][0] for f in FIGURES} for b in BATCHES}
        for arm in arms
    }


class Renormalised(Arm):
    """A policy after which every row's weights are brought back to their sum: never served."""

    def route(
        self, layer: MoELayer, ids: Tensor, weights: Tensor, *rest: Any, **more: Any
    ) -> Changed:
        new = super().route(layer, ids, weights.clone(), *rest, **more)
        whole = weights.sum(1, keepdim=True) / new.weights.sum(1, keepdim=True)
        return new._replace(weights=new.weights * whole)


class ShareAlone(Arm):
    """All replacements lose the same, so that a policy with `tau` keeps the experts whose tokens
    give them weight, whatever could stand in: what the expected errors have to beat."""

    def _plan(self, policy: Policy, layer: MoELayer, ids: Tensor) -> Plan:
        if (known := self._plans.get((layer.index, 0))) is None:
            similarity = self.table.layers[layer.index].similarity
            same = Substitution(torch.ones_like(similarity), torch.ones_like(similarity))
            K = self.table.fingerprint.K
            known = Plan.build(similarity, policy, K=K, substitution=same).to(ids.device)
            self._plans[layer.index, 0] = known
        return known


def _arm(settings: Settings, paths: dict[str, str], table: Table) -> Arm:
    if "table" in settings:
        settings["table"] = paths[settings["table"]]
    renormalise, blind = settings.pop("renormalise", False), settings.pop("by", None)
    kind = Renormalised if renormalise else ShareAlone if blind else Arm
    arm = arm_of(settings, table)
    return kind(arm.name, arm.rule, arm.table)


def over_seeds(values: list[float]) -> tuple[float, float]:
    """Mean and half of the 95 % interval."""
    n = len(values)
    if n < 2:
        return values[0], float("nan")
    return statistics.mean(values), student.ppf(0.975, n - 1) * statistics.stdev(values) / n**0.5


def summary(seeds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By arm: figures with intervals."""
    family_of = {str(s): name for name, family in FAMILIES.items() for s in family}
    return [
        {
            "name": name,
            "family": family_of.get(name, "stock"),
            "batches": {
                str(b): {f: over_seeds([s[name][str(b)][f] for s in seeds]) for f in FIGURES}
                for b in BATCHES
            },
        }
        for name in seeds[0]
    ]


def front(found: dict[str, Any], batch: str) -> list[tuple[float, float]]:
    """(active experts, logarithm of the KL) of the expected-error rule, for one seed's figures."""
    points = (found[str(settings)][batch] for settings in FAMILIES[OURS])
    return sorted((f["active"], math.log(max(f["kl"], LEAST))) for f in points)


def between(points: list[tuple[float, float]], x: float) -> float | None:
    """The line through sorted points, at x; None beyond its ends, but for a hundredth of x."""
    x = min(max(x, points[0][0]), points[-1][0]) if _near_an_end(points, x) else x
    for (left, low), (right, high) in itertools.pairwise(points):
        if left <= x <= right:
            return low + (high - low) * (x - left) / (right - left)
    return None


def _near_an_end(points: list[tuple[float, float]], x: float) -> bool:
    return points[0][0] * 0.99 <= x <= points[-1][0] * 1.01


def to_ours(
    seeds: list[dict[str, Any]], name: str, batch: str
) -> tuple[float, float, float] | None:
    """How many times the KL of the expected-error rule's front an arm has at as many active
    experts: geometric mean over seeds and the ends of its 95 % interval. Each seed is compared with
    its own front, along a logarithmic scale. None where an arm is beyond the front's ends."""
    logs = []
    for found in seeds:
        f = found[name][batch]
        ours = between(front(found, batch), f["active"])
        if ours is None or f["kl"] < LEAST:
            return None
        logs.append(math.log(f["kl"]) - ours)
    middle, half = over_seeds(logs)
    return math.exp(middle), math.exp(middle - half), math.exp(middle + half)


def as_text(result: dict[str, Any], batch: str) -> str:
    """Every figure with half of its 95 % interval; last, how many times what the expected-error
    front loses at the same number of active experts, with the interval. Then the goals."""
    arms, seeds = result["arms"], result["seeds"]
    rows = []
    for arm in arms:
        f = arm["batches"][batch]
        wrong = over_seeds([_lost(found, arm["name"], batch) for found in seeds])
        cells = [(f["active"], 1, 2), (f["kl"], 1000, 3), (wrong, 100, 2)]
        texts = [f"{scale * v:.{d}f} +-{scale * e:.{d}f}" for (v, e), scale, d in cells]
        rival = arm["family"] not in (OURS, "stock")
        ours = to_ours(seeds, arm["name"], batch) if rival else None
        rows.append(
            [_brief(arm), *texts, "{:.1f}x ({:.1f} to {:.1f})".format(*ours) if ours else ""]
        )
    rows_a_step = arms[0]["batches"][batch]["rows_per_step"][0]
    head = [
        f"batch {batch} ({rows_a_step:.1f} rows a step)",
        "active experts",
        "KL, 0.001 nats",
        "answers lost, %",
    ]
    table = provenance.text_table([*head, "KL to ours"], rows)
    return "\n".join([table, *goals(result, batch)])


def goals(result: dict[str, Any], batch: str) -> list[str]:
    """What was to be reached, in words and numbers."""
    ours, paper, bent = _lost_at_half(result["seeds"], batch)
    texts = [_percent(lost) for lost in (ours, paper, bent)]
    margins = [
        _percent([a - b / 2 for a, b in zip(ours, other, strict=True)]) for other in (paper, bent)
    ]
    compared = [
        (_brief(arm), found)
        for arm in result["arms"]
        if arm["family"] not in (OURS, "stock")
        and (found := to_ours(result["seeds"], arm["name"], batch))
    ]
    ahead = [name for name, (middle, _, _) in compared if middle < 1]
    surely = [name for name, (_, _, high) in compared if high < 1]
    behind = sum(low > 1 for _, (_, low, _) in compared)
    return [
        "",
        f"At half of stock's experts, answers lost, %: {texts[0]}; by the paper's rule {texts[1]} "
        f"(along a straight line; along a logarithmic one {texts[2]})",
        f"Ours less half of the paper's: {margins[0]} (along the logarithmic one {margins[1]})",
        f"Of {len(compared)} others {behind} have more KL than ours, beyond the interval",
        f"Less: {'; '.join(ahead) or 'none'}",
        f"Less, beyond the interval: {'; '.join(surely) or 'none'}",
    ]


def _lost(found: dict[str, Any], name: str, batch: str) -> float:
    """Share of answers that stock has right and an arm has not, net, for one seed's figures."""
    right: float = found["stock"][batch]["exact_match"]
    return right - found[name][batch]["exact_match"]


def _percent(values: list[float]) -> str:
    return "{:.2f} +-{:.2f}".format(*(100 * x for x in over_seeds(values)))


def _lost_at_half(
    seeds: list[dict[str, Any]], batch: str
) -> tuple[list[float], list[float], list[float]]:
    """By seed, the share of answers lost at half of stock's experts: of the expected-error rule,
    and of the paper's along a straight and along a logarithmic line. The paper's two points are far
    apart and losses fall steeply between them, which a straight line makes too much of."""

    def lost(found: dict[str, Any], family: str, *, logarithmic: bool = False) -> float:
        stock = found["stock"][batch]
        names = [str(settings) for settings in FAMILIES[family]]
        line = sorted((found[n][batch]["active"], _lost(found, n, batch)) for n in names)
        if logarithmic:
            line = [(x, math.log(max(y, 0.5 / PROMPTS))) for x, y in line]
        at_half = between(line, stock["active"] / 2)
        assert at_half is not None, f"{family}: no points on both sides of half of stock's experts"
        return math.exp(at_half) if logarithmic else at_half

    return (
        [lost(s, OURS) for s in seeds],
        [lost(s, PAPER) for s in seeds],
        [lost(s, PAPER, logarithmic=True) for s in seeds],
    )


def _brief(arm: dict[str, Any]) -> str:
    if arm["family"] == "stock":
        return "stock"
    settings = ast.literal_eval(arm["name"])
    own = {
        k: v
        for k, v in settings.items()
        if k not in ("rival", "table", "min_active", "renormalise", "by")
    }
    if "tau" in own:
        own.pop("S")
    if "by" in settings:
        del own["fill"], own["weights"]
    return " ".join([f"{arm['family']}:", *(f"{k}={v}" for k, v in own.items())])


def plot(arms: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 5.5), layout="constrained")
    for axes, batch in zip(figure.subplots(1, len(BATCHES)), map(str, BATCHES), strict=True):
        for name, marker in zip(FAMILIES, "ov^sDPXphd*<>8.+x1234", strict=True):
            points = sorted(
                (arm["batches"][batch]["active"][0], arm["batches"][batch]["kl"][0])
                for arm in arms
                if arm["family"] == name
            )
            if not points:
                continue
            ours = name == OURS
            style = {"linewidth": 2.5, "color": "black"} if ours else {"alpha": 0.7}
            axes.plot(*zip(*points, strict=True), marker=marker, label=name, **style)
        axes.axvline(arms[0]["batches"][batch]["active"][0] / 2, color="grey", linestyle=":")
        axes.set_yscale("log")
        axes.set_title(f"batch {batch} (dotted: half of what stock reads)")
        axes.set_xlabel("active experts per layer and step (of 32)")
        axes.set_ylabel("KL from stock, nats per token")
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", fontsize=8)
    with replaced(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", default="pareto.json")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=PROMPTS, help="of each seed")
    parser.add_argument(
        "--family",
        dest="families",
        action="append",
        choices=FAMILIES,
        help=f"may be repeated; {PAPER!r} and {OURS!r} always run (default: all)",
    )
    parser.add_argument("--jobs", type=int, default=1, help="seeds at a time; a core is enough")
    arguments = parser.parse_args()
    check_writable(arguments.output)
    names = {PAPER, OURS, *(arguments.families or FAMILIES)}
    chosen = [settings for name in FAMILIES if name in names for settings in FAMILIES[name]]
    numbers = range(FIRST_SEED, FIRST_SEED + arguments.seeds)
    key = {"prompts": arguments.prompts, "arms": chosen}
    pool = ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn"))
    with Journal(f"{arguments.output}.unfinished", key) as done, pool:
        running = {
            pool.submit(
                *(one_seed, seed, arguments.prompts, chosen),
                Path(f"{arguments.output}.{seed}.unfinished"),
            ): seed
            for seed in numbers
            if done.get(str(seed)) is None
        }
        for finished in as_completed(running):
            done.add(str(running[finished]), finished.result())
        seeds = [done.get(str(seed)) for seed in numbers]
    arms = summary(seeds)
    result = {"provenance": provenance.provenance(), "arms": arms, "seeds": seeds}
    provenance.save_json(arguments.output, result)
    plot(arms, Path(arguments.output).with_suffix(".png"))
    for batch in map(str, BATCHES):
        print(as_text(result, batch), "\n")


if __name__ == "__main__":
    main()
