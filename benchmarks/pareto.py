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
from pathlib import Path
from typing import Any

from sere import demo_model, report
from sere.arms import Arm, arm_of
from sere.calibrate import calibrate
from sere.evaluate import load, load_passages
from sere.files import check_writable, replaced
from sere.journal import Journal
from sere.quality import Judge, figures
from sere.table import Table

BATCHES = (8, 32)
# Two-sided 95 % points of Student's t for few seeds.
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}

Settings = dict[str, Any]
ONE: Settings = {"S": 1, "min_active": 1}
FAMILIES: dict[str, list[Settings]] = {
    "paper (Frobenius)": [{"S": 1}, {"S": 2}, {"S": 3}],
    "paper, quantile of rho": [{"S": 1, "rho_quantile": q} for q in (0.25, 0.5)],
    "random table": [{"S": S, "table": "random"} for S in (1, 2)],
    "weights table": [{"S": S, "table": "weights"} for S in (1, 2)],
    "expected error": [
        {**ONE, "tau": t} for t in (0.3, 0.1, 0.08, 0.065, 0.05, 0.035, 0.02, 0.01, 0.005)
    ],
    "expected error, keep weights": [{**ONE, "tau": t, "weights": "keep"} for t in (0.1, 0.02)],
    "expected error, fill similar": [{**ONE, "tau": t, "fill": "similar"} for t in (0.1, 0.02)],
    "expected error, ceiling": [{**ONE, "tau": 0, "max_active": m} for m in (6, 8, 10)],
    "OEA": [{"rival": "oea", "k0": k} for k in (1, 2)],
    "XShare": [{"rival": "xshare", "budget": m} for m in (6, 8, 10)],
    "Lynx": [{"rival": "lynx", "alpha": a, "beta": b} for a, b in ((4, 1), (2, 1), (3, 2), (1, 1))],
    "top-k": [{"rival": "top_k", "k": k} for k in (1, 2, 3)],
    "skip": [{"rival": "skip", "beta": b} for b in (0.8, 0.5, 0.3)],
    "frequency": [{"rival": "frequency", "budget": m} for m in (16, 24)],
}
OURS = "expected error"
FIGURES = ("active", "kl", "top1", "perplexity", "exact_match")


def one_seed(model: Any, layers: Any, seed: int, prompts: int, journal: Path) -> dict[str, Any]:
    """Figures by arm and batch size."""
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: f"{folder}/{name}" for name in ("frobenius", "random", "weights")}
        for name, path in paths.items():
            calibrate(demo_model.NAME, path, method=name, seed=seed, progress=False)
        table = Table.load(paths["frobenius"])
        arms = [Arm("stock", None, table)]
        for settings in (s for family in FAMILIES.values() for s in family):
            own = {**settings, "name": str(settings)}
            if "table" in own:
                own["table"] = paths[own["table"]]
            arms.append(arm_of(own, table))
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


def over_seeds(values: list[float]) -> tuple[float, float]:
    """Mean and half of the 95 % interval."""
    n = len(values)
    if n < 2:
        return values[0], float("nan")
    return statistics.mean(values), STUDENT[n] * statistics.stdev(values) / n**0.5


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


def ours_at(arms: list[dict[str, Any]], batch: str, active: float) -> float | None:
    """KL of the expected-error front at so many active experts, between its two nearest points on
    a logarithmic scale; None beyond its ends."""
    front = sorted(
        (f["active"][0], math.log(f["kl"][0]))
        for arm in arms
        if arm["family"] == OURS and (f := arm["batches"][batch])
    )
    for (x, low), (y, high) in itertools.pairwise(front):
        if x <= active <= y:
            return math.exp(low + (high - low) * (active - x) / (y - x))
    return None


def as_text(arms: list[dict[str, Any]], batch: str) -> str:
    """Every figure with half of its 95 % interval; last, how many times what the expected-error
    front loses at the same number of active experts."""
    lost = arms[0]["batches"][batch]["exact_match"][0]
    rows = []
    for arm in arms:
        f = arm["batches"][batch]
        wrong = (lost - f["exact_match"][0], f["exact_match"][1])
        cells = [(f["active"], 1, 2), (f["kl"], 1000, 3), (wrong, 100, 2)]
        texts = [f"{scale * v:.{d}f} +-{scale * e:.{d}f}" for (v, e), scale, d in cells]
        ours = ours_at(arms, batch, f["active"][0])
        other = arm["family"] not in (OURS, "stock") and ours
        rows.append([_brief(arm), *texts, f"{f['kl'][0] / ours:.1f}x" if other else ""])
    head = [f"batch {batch}", "active experts", "KL, 0.001 nats", "answers lost, %"]
    return report.text_table([*head, "KL to ours"], rows)


def _brief(arm: dict[str, Any]) -> str:
    if arm["family"] == "stock":
        return "stock"
    settings = ast.literal_eval(arm["name"])
    own = {k: v for k, v in settings.items() if k not in ("rival", "table")}
    if "tau" in own:
        own = {k: v for k, v in own.items() if k not in ("S", "min_active")}
    return " ".join([f"{arm['family']}:", *(f"{k}={v}" for k, v in own.items())])


def plot(arms: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5.5), layout="constrained")
    for axes, batch in zip(figure.subplots(1, len(BATCHES)), map(str, BATCHES), strict=True):
        for name, marker in zip(FAMILIES, "ov^sDPXphd*<>8", strict=True):
            points = sorted(
                (arm["batches"][batch]["active"][0], arm["batches"][batch]["kl"][0])
                for arm in arms
                if arm["family"] == name
            )
            ours = name == OURS
            style = {"linewidth": 2.5, "color": "black"} if ours else {"alpha": 0.7}
            axes.plot(*zip(*points, strict=True), marker=marker, label=name, **style)
        axes.axvline(arms[0]["batches"][batch]["active"][0] / 2, color="grey", linestyle=":")
        axes.set_yscale("log")
        axes.set_title(f"batch {batch} (dotted: half of what stock reads)")
        axes.set_xlabel("active experts per layer and step (of 32)")
        axes.set_ylabel("KL from stock, nats per token")
        axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    with replaced(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", default="pareto.json")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=1024, help="of each seed")
    arguments = parser.parse_args()
    check_writable(arguments.output)
    model, layers = load(str(demo_model.PATH))
    with Journal(f"{arguments.output}.unfinished", {"prompts": arguments.prompts}) as done:
        seeds = []
        for seed in range(100, 100 + arguments.seeds):
            if (found := done.get(str(seed))) is None:
                journal = Path(f"{arguments.output}.{seed}.unfinished")
                found = one_seed(model, layers, seed, arguments.prompts, journal)
                done.add(str(seed), found)
            seeds.append(found)
    arms = summary(seeds)
    provenance = report.provenance()
    report.save_json(arguments.output, {"provenance": provenance, "arms": arms, "seeds": seeds})
    plot(arms, Path(arguments.output).with_suffix(".png"))
    for batch in map(str, BATCHES):
        print(as_text(arms, batch), "\n")


if __name__ == "__main__":
    main()
