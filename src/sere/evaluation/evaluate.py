"""`sere evaluate`: quality and active experts of any policies, at any batch sizes, beside stock.

Every arm sees the same passages in the same batches; what it is compared with is the stock routing
of the same run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sere.evaluation.arms import Arm, parse_arm, spelt_out
from sere.evaluation.decoding import Passage
from sere.evaluation.passages import load_passages, passages_hash, say_if_seen, searched_on
from sere.evaluation.quality import Judge, Sums, figures
from sere.files import unfinished
from sere.models.loading import exceeds_memory, load_model
from sere.models.moe import MoELayer, moe_layers
from sere.models.outline import fetched
from sere.models.skeleton import load_skeleton
from sere.policy import Policy
from sere.results import pictures, provenance
from sere.results.journal import Journal, contents
from sere.results.names import check_names
from sere.results.provenance import said
from sere.table import Table

_FEW = 8  # batches
BySize = dict[int, list[Sums]]


def run(
    model_name: str,
    table_path: str,
    output: str,
    *,
    policies: Sequence[str],
    batches: Sequence[int],
    data: str | None = None,
    samples: int = 512,
    prompt: int = 64,
    length: int = 64,
    seed: int = 0,
    layer_error: bool = True,
    stream: bool | None = None,
) -> dict[str, Any]:
    """`sere evaluate`: prints a table; writes `output` (JSON) and, beside it, a plot.

    stream: hold one decoder layer in memory at a time; None: if it has to be. Figures are the same.
    """
    pictures.check_result(output, table_path, data)
    table = Table.load(table_path)
    policies = spelt_out(policies, table)
    arms = [Arm("stock", None, table), *(parse_arm(text, table) for text in policies)]
    check_names([arm.name for arm in arms])
    folder = fetched(model_name)
    for own in {arm.table.fingerprint: arm.table for arm in arms}.values():
        own.check_made_for(folder)
    model, layers = load(folder, stream)
    told = [*said(*_inert(arms)), *say_if_seen(table, data)]
    drawn = {"samples": samples, "prompt": prompt, "length": length, "seed": seed}
    passages = load_passages(model_name, folder, data, **drawn)
    told += said(*_tuned_on(arms, passages))
    settings = {
        "model": model_name,
        "table": table_path,
        "policies": policies,
        "batches": list(batches),
        "passages": passages_hash(passages),
        "layer_error": layer_error,
        **contents(folder, [arm.table for arm in arms]),
    }
    provenance.check_settings(output, settings)
    with Journal(unfinished(output), settings) as journal:
        judge = Judge(model, layers, passages, journal, layer_error)
        sums = judge.measure(arms, batches)
        told += judge.say_if_unread(next(iter(sums["stock"].values())))
        result = {
            "provenance": provenance.provenance(),
            "settings": settings,
            "E": table.fingerprint.E,
            "K": table.fingerprint.K,
            "passages": len(passages),
            "arms": [_of_arm(arm, sums[arm.name], sums["stock"]) for arm in arms],
        }
        result["warnings"] = [*told, *_too_few(result)]
        print(as_text(result))
        provenance.save_json(output, result)
    plot(result, pictures.beside(output))
    print(f"\nwritten: {output}, {pictures.beside(output)}")
    return result


def _tuned_on(arms: Sequence[Arm], passages: Sequence[Passage]) -> list[str]:
    """A policy looks best on the passages that it was chosen on."""
    tuned = (arm.table for arm in arms if arm.rule and arm.rule == arm.table.policy)
    counts = [searched_on(t, passages) for t in {id(table): table for table in tuned}.values()]
    return [
        f"{again} of the {len(passages)} passages are among those that `sere tune` searched on: "
        "the table's policy looks better there than elsewhere; give other text, or another --seed"
        for again in counts
        if again
    ]


def _inert(arms: Sequence[Arm]) -> list[str]:
    found = []
    for arm in arms:
        if not isinstance(policy := arm.rule, Policy):
            continue
        moves = arm.table.can_move_own if arm.independent else arm.table.can_move
        if not moves(policy):
            found.append(
                f"{arm.name}: with this table no slot can move under it (S = K, or a threshold "
                "beyond all of its figures?): it will be as stock is"
            )
    return found


def _of_arm(arm: Arm, sums: BySize, stock: BySize) -> dict[str, Any]:
    rule = arm.rule.to_dict() if arm.rule else None
    found = {str(batch): figures(parts, stock[batch]) for batch, parts in sums.items()}
    return {"name": arm.name, "rule": rule, "batches": found}


def load(folder: str, stream: bool | None = False) -> tuple[Any, list[MoELayer]]:
    """A model to evaluate, and its MoE layers.

    stream: a `Skeleton` instead, whose layers are read one at a time; None: if memory is short.
    """
    wide = not torch.cuda.is_available()  # CPUs emulate bf16, slowly and with its rounding
    if stream or (stream is None and exceeds_memory(folder, widened=wide)):
        skeleton = load_skeleton(folder)
        if wide:
            skeleton.float()
        return skeleton, skeleton.layers
    model: Any = load_model(folder)
    if wide:
        model = model.float()
    return model, moe_layers(model)


def as_text(result: dict[str, Any]) -> str:
    """Tables for each batch size, with standard errors: quality, then what the arms do to the
    layers' outputs; and how far prompts are off, where they are."""
    parts = []
    for batch in result["arms"][0]["batches"]:
        found = {arm["name"]: arm["batches"][batch] for arm in result["arms"]}
        parts += [_quality_table(batch, found, result["passages"]), *_error_table(batch, found)]
        if difference := max(f["prompt_difference"] for f in found.values()):
            parts.append(
                f"batch {batch}: prompts' logits differ from stock by up to {difference:.1g}, by "
                "rounding: this architecture cannot run their rows apart from decoded ones"
            )
    return "\n\n".join([*parts, *_too_few(result)])


def _too_few(result: dict[str, Any]) -> list[str]:
    """What is to be said of sizes for which there were too few passages."""
    found = []
    for batch in map(int, result["arms"][0]["batches"]):
        found += provenance.not_full(batch, result["passages"], "passages")
        if 1 < (batches := result["passages"] // batch) < _FEW:
            found.append(
                f"batch {batch}: of {batches} batches +- is hardly known, and may be far too "
                "small: raise --samples"
            )
    return found


def _cell(figure: Sequence[float | None], digits: int, factor: float = 1) -> str:
    """The error is None in a result that was read again."""
    value, error = (math.nan if x is None else factor * x for x in figure)
    return f"{value:.{digits}f}" + ("" if math.isnan(error) else f" +-{error:.{digits}f}")


def _beside_stock(f: dict[str, Any], name: str, digits: int, factor: float = 1) -> str:
    """The value, with the error of its difference from stock: what arms are compared by."""
    return _cell((f[name][0], f[f"{name}_over_stock"][1] or math.nan), digits, factor)


def _quality_table(batch: str, found: dict[str, dict[str, Any]], passages: int) -> str:
    """Answers only where stock gets some right: on plain text there are none, and none to lose."""
    right = round(next(iter(found.values()))["exact_match"][0] * passages)
    answered = right > 0
    rows = [
        [
            name,
            _cell(f["active"], 2),
            _cell(f["kl"], 3, 1000),
            _cell(f["top1"], 2, 100),
            _beside_stock(f, "perplexity", 4),
            *([_beside_stock(f, "exact_match", 2, 100)] if answered else []),
            *([_cell(f["answers_lost_gross"], 2, 100)] if answered else []),
        ]
        for name, f in found.items()
    ]
    head = [f"batch {batch}", "active experts", "KL, 0.001 nats", "top-1, %", "perplexity *"]
    head += ["exact match, % *", "lost, gross, %"] if answered else []
    table = provenance.text_table(head, rows)
    note = "* +- is the error of the difference from stock, batch by batch"
    if answered:  # 0 +-0 is no certainty: the rule of three, exactly
        most = 1 - 0.05 ** (1 / right)
        note += f"; where none of {right} answers is lost, up to {most:.1%} may be (95 %)"
    return f"{table}\n{note}"


def _error_table(batch: str, found: dict[str, dict[str, Any]]) -> list[str]:
    """Energy of the difference to stock's output of a layer, as a share of that output's."""
    rows = []
    for name, f in found.items():
        errors = f["output_error_by_layer"]
        if any(error for error, _ in errors.values()):
            layer, worst = max(errors.items(), key=lambda item: item[1][0])
            mean = sum(error for error, _ in errors.values()) / len(errors)
            rows.append([name, f"{100 * mean:.2f}", f"{_cell(worst, 2, 100)} (layer {layer})"])
    head = [f"batch {batch}: experts' output error, % of energy", "mean of layers", "worst layer"]
    return [provenance.text_table(head, rows)] if rows else []


def plot(result: dict[str, Any], path: Path) -> None:
    """KL against active experts, one panel a batch size."""
    from matplotlib.figure import Figure

    batches = list(result["arms"][0]["batches"])
    figure = Figure(figsize=(5.5 * len(batches), 4.5), layout="constrained")
    for axes, batch in zip(
        figure.subplots(1, len(batches), squeeze=False)[0], batches, strict=True
    ):
        for arm in result["arms"][1:]:
            f = arm["batches"][batch]
            point = (f["active"][0], max(f["kl"][0], 1e-7))
            axes.scatter(*point, s=20)
            axes.annotate(arm["name"], point, fontsize=7, xytext=(4, 3), textcoords="offset points")
        axes.set_yscale("log")
        axes.set_title(
            f"batch {batch}: stock reads {result['arms'][0]['batches'][batch]['active'][0]:.1f}"
        )
        axes.set_xlabel(f"active experts per layer and step (of {result['E']})")
        axes.set_ylabel("KL from stock, nats per token")
        axes.grid(alpha=0.3)
    pictures.save(figure, path, dpi=120)
