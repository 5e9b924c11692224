"""Quality on real text: all policies, stand-ins and rivals on the text model, for prose and code.

    python benchmarks/text_model.py -o benchmarks/results/text_model.json
    python benchmarks/text_model.py --pool -o out/pool.json     pools alone, on fewer tokens

Each seed draws its own calibration text and its own passages to judge on, of documents that the
model has never seen: of every two one may calibrate, the other judges. Every token of a passage but
its first is a decode step of its batch. Tables of prose are also judged on code, and the other way
round. Resumable, piece by piece. Figures are differences from stock on the same tokens.
"""

from __future__ import annotations

import argparse
import ast
import json
import lzma
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sere.calibration.calibrate import calibrate
from sere.evaluation.arms import Arm, arm_of
from sere.evaluation.decoding import Passage, RouterOutput
from sere.evaluation.evaluate import load
from sere.evaluation.quality import Judge, figures
from sere.evaluation.rivals import Routed
from sere.files import check_writable, replaced
from sere.kernels import freed_weights, reroute
from sere.models.adapters import Changed
from sere.models.loading import load_tokenizer
from sere.models.moe import MoELayer, observed
from sere.policy import Policy
from sere.results import provenance
from sere.results.journal import Journal
from sere.table import Table
from sere.text.corpus import Corpus, encoder

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))
from benchmarks.pareto import over_seeds  # noqa: E402

MODEL = ROOT / "training/text_model/model"
DOMAINS = ("prose", "code")
FIRST_SEED = 400  # of those that no decision was made by
RANK = 32  # of the maps that are fitted; the served 16 and fewer are their first ranks
CHARACTERS = 900  # of a document's pieces
# (batch sizes, passages, their tokens): every token but the first is decoded
SIZES = (((8, 32), 32, 96), ((128, 256), 256, 20))
POOL_SIZES = (((8, 32), 32, 24), ((128, 256), 256, 8))
CALIBRATION = (112, 128)  # texts of each table, tokens of each

Settings = dict[str, Any]
ONE: Settings = {"S": 1, "min_active": 1}
TAUS = (0.04, 0.02, 0.014, 0.01, 0.006)
SCALE: Settings = {"fill": "error", "weights": "scale"}
LINEAR: Settings = {**ONE, "fill": "linear", "rank": 16}
OWN: Settings = {"by": "own", **ONE, "fill": "linear"}
FAMILIES: dict[str, list[Settings]] = {
    "paper": [{**ONE, "S": S} for S in (1, 2, 3)],
    "random table": [{**ONE, "table": "random"}],
    "drop": [{**ONE, "S": S, "fill": "constant", "by": "drop"} for S in (1, 2)],
    "scale": [{**ONE, **SCALE, "S": S} for S in (1, 2)],
    "scale, renormalised": [{**ONE, **SCALE, "S": S, "renormalise": True} for S in (1, 2)],
    "scale, tau": [{**ONE, "tau": t} for t in TAUS],
    "scale, tau, renormalised": [{**ONE, "tau": t, "renormalise": True} for t in (0.02, 0.01)],
    "affine": [{**ONE, "S": S, "fill": "constant", "by": "affine"} for S in (1, 2)],
    "constant": [{**ONE, "S": S, "fill": "constant"} for S in (1, 2)],
    "linear, by rank": [{**LINEAR, "rank": r} for r in (4, 8, 32)],
    "linear": [{**LINEAR, "S": S} for S in (1, 2)],
    "linear, tau": [{**LINEAR, "tau": t} for t in TAUS],
    "own": [{**OWN, "tau": t} for t in (1.9, 0.02, 0.01)],
    "OEA": [{"rival": "oea", "k0": k} for k in (1, 2)],
    "XShare": [{"rival": "xshare", "budget": m} for m in (14, 20, 32)],
    "Lynx": [{"rival": "lynx", "alpha": 1, "beta": 1}],
    "top-k": [{"rival": "top_k", "k": k} for k in (2, 4)],
    "skip": [{"rival": "skip", "beta": 0.4}],
    "frequency": [{"rival": "frequency", "budget": 32}],
}
# At the larger batches, the main ones.
MAIN: list[Settings] = [
    *FAMILIES["paper"][:2],
    *FAMILIES["drop"][:1],
    *FAMILIES["scale"],
    *({**ONE, "tau": t} for t in (0.02, 0.01)),
    *FAMILIES["linear"],
    *({**LINEAR, "tau": t} for t in (0.02, 0.01)),
    *FAMILIES["OEA"],
    {"rival": "xshare", "budget": 32},
]
# A half and three eighths of the experts, and what reads about as much.
POOL: list[Settings] = [
    *({"S": S, "pool": p} for p in (32, 24) for S in (0, 1)),
    *({"S": S, "pool": p, **SCALE} for p in (32, 24) for S in (0, 1)),
    *({"S": 0, "pool": p, "fill": "linear", "rank": 16} for p in (32, 24)),
    *({"S": 0, "pool": p, "tau": 0.02} for p in (32, 24)),
    *({"S": 0, "pool": p, "tau": 0.02, "tier": "independent"} for p in (32, 24)),
    *FAMILIES["paper"][:2],
    *FAMILIES["scale"],
    {**ONE, "tau": 0.02},
    *({"rival": "frequency", "budget": m} for m in (32, 24)),
]
# Judged on the text that they were not calibrated on, too.
FOREIGN = [
    *({**ONE, "S": 1, **fill} for fill in ({}, SCALE)),
    LINEAR,
    {**LINEAR, "tau": 0.014},
    {**ONE, "tau": 0.014},
]
FIGURES = ("active", "read", "kl", "top1", "nll")


# --- arms that are only measured ------------------------------------------------------------------


class Renormalised(Arm):
    """A policy after which every row's weights are brought back to their sum."""

    def route(self, layer: MoELayer, ids: Tensor, weights: Tensor, *rest: Any, **more: Any) -> Any:
        new = super().route(layer, ids, weights, *rest, **more)
        lost = weights.sum(1, keepdim=True) / new.weights.sum(1, keepdim=True)
        return new._replace(weights=new.weights * lost)


class Dropped(Arm):
    """What is not loaded is missing."""

    def route(self, *arguments: Any, **more: Any) -> Changed:
        return Changed(*super().route(*arguments, **more)[:2])


class Own(Arm):
    """On what a policy loads, each token chooses its top K again by its own scores."""

    needs_logits = True

    def route(
        self,
        layer: MoELayer,
        ids: Tensor,
        weights: Tensor,
        said: RouterOutput | None,
        counters: Tensor | None = None,
        hidden: Tensor | None = None,
    ) -> Changed:
        new = super().route(layer, ids, weights, None, counters, hidden)
        assert said is not None
        scores = said.scores(ids, weights)
        ranks = said.ranks(scores, ids, weights)
        batch = Routed(ids, weights, said.logits, scores, ranks, scores[0])
        loaded = torch.zeros(layer.E, dtype=torch.bool)
        loaded[new.ids[new.weights != 0].long()] = True
        used = batch.first(batch.slots, among=loaded)
        values, chosen = (scores * used).topk(ids.shape[1], dim=1)
        values = values * (weights.sum(1, keepdim=True) / values.sum(1, keepdim=True))
        return Changed(torch.where(values > 0, chosen, chosen[:, :1]).to(ids.dtype), values)


@dataclass
class Pairs:
    """Means over the tokens of u of E_v(x), [E, E, H] a layer: what `affine` needs and no table
    holds."""

    means: dict[int, Tensor] = field(default_factory=dict)
    counts: dict[int, Tensor] = field(default_factory=dict)

    def __call__(self, layer: MoELayer, hidden: Tensor, ids: Tensor, weights: Tensor) -> None:
        sent = torch.zeros(len(hidden), layer.E).scatter_(1, ids, 1.0)
        total = self.means.setdefault(layer.index, torch.zeros(layer.E, layer.E, hidden.shape[1]))
        for v in range(layer.E):
            total[:, v] += sent.T @ layer.adapter.output(hidden, v).float()
        self.counts[layer.index] = self.counts.get(layer.index, 0) + sent.sum(0)

    def of(self, index: int) -> Tensor:
        return self.means[index] / self.counts[index].clamp(min=1)[:, None, None]


class Affine(Arm):
    """The best primary, times the best factor, plus the best constant."""

    pairs: Pairs

    def route(self, layer: MoELayer, ids: Tensor, weights: Tensor, *rest: Any, **more: Any) -> Any:
        known = self.table.layers[layer.index]
        plan = self._plan(self.rule, layer, ids)  # type: ignore[arg-type]
        new_ids, new_weights = reroute(ids, weights, plan)
        freed = freed_weights(ids, weights, new_ids)
        means = self.pairs.of(layer.index)
        own = means.diagonal(dim1=0, dim2=1).T
        covariance = known.directed - torch.einsum("uh,uvh->uv", own, means)
        variance = (known.directed_energy - means.square().sum(-1)).clamp(min=1e-9)
        factor = covariance / variance
        left = self.table.maps_for(Policy(fill="constant")).layer(layer.index).affine
        primary = torch.zeros(layer.E, dtype=torch.bool)
        primary[new_ids[new_weights != 0].long()] = True
        best = left.masked_fill(~primary[None, :], torch.inf).argmin(1)
        every = torch.arange(layer.E)
        constant = own - factor[every, best][:, None] * means[every, best]
        asked = torch.zeros(len(ids), layer.E).scatter_add_(1, ids.long(), freed)
        carried = torch.zeros(len(ids), layer.E).scatter_add_(1, new_ids.long(), new_weights)
        carried.scatter_add_(1, best.expand(len(ids), -1), asked * factor[every, best])
        chosen = carried.abs().topk(ids.shape[1], dim=1).indices  # factors may be negative
        beside = len(torch.unique(ids[freed != 0])) * constant_share(layer)
        return Changed(chosen, carried.gather(1, chosen), asked @ constant, beside)


def constant_share(layer: MoELayer) -> float:
    """A vector [H] of constants, in units of an expert's weights, three matrices [H, I]."""
    weights: Any = layer.experts.down_proj  # [E, H, I]
    return 1 / (3 * weights.shape[2])


# --- one seed -------------------------------------------------------------------------------------


@dataclass
class Text:
    """Documents that the model has never seen, in pieces; every other document may calibrate."""

    fit: list[str]
    judge: list[str]

    @classmethod
    def read(cls, path: Path) -> Text:
        with lzma.open(path, "rt", encoding="utf-8") as lines:
            documents = [json.loads(line)["text"] for line in lines]
        halves = (documents[0::2], documents[1::2])
        return cls(*([p for d in half for p in _pieces(d)] for half in halves))


def _pieces(document: str) -> list[str]:
    starts = range(0, len(document) - CHARACTERS // 2, CHARACTERS)
    return [document[start : start + CHARACTERS] for start in starts]


def passages(text: Text, encode: Any, count: int, length: int, seed: int) -> list[Passage]:
    corpus = Corpus.from_texts(
        text.judge, encode, source="held out", samples=3 * count, length=length, seed=seed,
        allow_fewer=True,
    )  # fmt: skip
    whole = [tokens for tokens in corpus.sequences if len(tokens) == length][:count]
    assert len(whole) == count, f"{len(whole)} passages of {length} tokens, {count} are wanted"
    return [Passage(tokens, 1) for tokens in whole]


def tables(folder: Path, seed: int, domain: str, text: Text) -> dict[str, Path]:
    """The seed's tables of one domain, calibrated if they are not there."""
    data, samples = folder / f"{domain}-{seed}.jsonl", CALIBRATION[0]
    data.write_text("".join(json.dumps({"text": piece}) + "\n" for piece in text.fit))
    paths = {"": folder / f"{domain}-{seed}.table", "random": folder / f"random-{seed}.table"}
    if not paths[""].exists():
        calibrate(
            str(MODEL), paths[""], data=data, samples=samples, length=CALIBRATION[1], seed=seed,
            maps=RANK,
        )  # fmt: skip
    if not paths["random"].exists():
        calibrate(str(MODEL), paths["random"], method="random", seed=seed)
    return paths


def pairs(layers: list[MoELayer], model: Any, table: Table, data: Path, encode: Any) -> Pairs:
    """Over the very sequences that the table saw."""
    known = table.provenance
    texts = [json.loads(line)["text"] for line in data.read_text().splitlines()]
    corpus = Corpus.from_texts(
        texts, encode, source="", samples=known["sequences"], length=known["length"],
        seed=known["seed"],
    )  # fmt: skip
    assert corpus.hash == known["corpus_hash"]
    found = Pairs()
    with torch.inference_mode(), observed(layers, found):
        for tokens in corpus.sequences:
            model(torch.tensor([tokens]), use_cache=False)
    return found


def arm(settings: Settings, paths: dict[str, Path], table: Table, known: Pairs | None) -> Arm:
    own = dict(settings)
    by, renormalise = own.pop("by", None), own.pop("renormalise", False)
    if "table" in own:
        own["table"] = str(paths[own["table"]])
    kinds = {"drop": Dropped, "own": Own, "affine": Affine}
    kind = Renormalised if renormalise else kinds.get(by, Arm)
    made = arm_of({**own, "name": str(settings)}, table)
    found = kind(made.name, made.rule, made.table, made.independent)
    if isinstance(found, Affine):
        assert known is not None
        found.pairs = known
    return found


def one_seed(
    seed: int, folder: Path, texts: dict[str, Text], done: Journal, *, pool: bool = False
) -> dict[str, Any]:
    """By domain and "batch/from": figures by arm. from: the domain of the table."""
    model, layers = load(str(MODEL))
    encode = encoder(load_tokenizer(str(MODEL)))
    found: dict[str, Any] = {domain: {} for domain in DOMAINS}
    made = {domain: tables(folder, seed, domain, texts[domain]) for domain in DOMAINS}
    for domain in DOMAINS:
        for origin in (domain, *(other for other in DOMAINS if other != domain)):
            table = Table.load(made[origin][""])
            known: Pairs | None = None
            for batches, count, length in POOL_SIZES if pool else SIZES:
                chosen = _chosen(batches, foreign=origin != domain)
                if pool:
                    chosen = POOL if origin == domain else []
                piece = f"{seed}/{domain}/{origin}/{batches[0]}"
                if (result := done.get(piece)) is None:
                    if known is None and any(s.get("by") == "affine" for s in chosen):
                        data = folder / f"{domain}-{seed}.jsonl"
                        known = pairs(layers, model, table, data, encode)
                    arms = [Arm("stock", None, table)]
                    arms += [arm(settings, made[origin], table, known) for settings in chosen]
                    judged = passages(texts[domain], encode, count, length, seed)
                    result = measure(model, layers, judged, arms, batches, folder / f"{seed}.part")
                    done.add(piece, result)
                for batch, figured in result.items():
                    found[domain][f"{batch}/{origin}"] = figured
    return found


def _chosen(batches: tuple[int, ...], *, foreign: bool) -> list[Settings]:
    if foreign:
        return FOREIGN if batches[0] == SIZES[0][0][0] else []
    every = [settings for members in FAMILIES.values() for settings in members]
    return every if batches[0] == SIZES[0][0][0] else MAIN


def measure(
    model: Any,
    layers: list[MoELayer],
    judged: list[Passage],
    arms: list[Arm],
    batches: tuple[int, ...],
    part: Path,
) -> dict[str, Any]:
    if len(arms) == 1:
        return {}
    key = {"arms": [a.name for a in arms], "batches": list(batches), "of": judged[0].tokens}
    with Journal(part, key) as journal:
        sums = Judge(model, layers, judged, journal, layer_error=False).measure(arms, batches)
    return {
        str(batch): {
            a.name: {
                **{f: figures(sums[a.name][batch])[f][0] for f in FIGURES if f != "nll"},
                "nll": sum(s.nll for s in sums[a.name][batch])
                / sum(s.tokens for s in sums[a.name][batch]),
            }
            for a in arms
        }
        for batch in batches
    }


# --- figures --------------------------------------------------------------------------------------


def summary(seeds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for every arm, domain, batch size and origin of the table: figures with intervals over
    seeds; `loss` is paired, nats over stock."""
    family = {str(s): "pool" for s in POOL}
    family |= {str(s): name for name, members in FAMILIES.items() for s in members}
    rows = []
    for domain in DOMAINS:
        for place, arms in seeds[0][domain].items():
            batch, origin = place.split("/")
            for name in arms:
                here = [seed[domain][place] for seed in seeds]
                paired = [h[name]["nll"] - h["stock"]["nll"] for h in here]
                rows.append(
                    {
                        "domain": domain,
                        "calibrated_on": origin,
                        "batch": int(batch),
                        "name": name,
                        "family": family.get(name, "stock"),
                        "loss": over_seeds(paired),
                        **{f: over_seeds([h[name][f] for h in here]) for f in FIGURES},
                    }
                )
    return rows


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Loss over stock against what is read, an expert being 1 and a map its share."""
    from matplotlib.figure import Figure

    sizes = sorted({row["batch"] for row in rows})
    shown = {
        "paper": ("black", "s"),
        "drop": ("tab:gray", "v"),
        "scale": ("tab:orange", "o"),
        "scale, tau": ("tab:orange", "."),
        "affine": ("tab:brown", "d"),
        "linear": ("tab:blue", "o"),
        "linear, tau": ("tab:blue", "."),
        "OEA": ("tab:green", "^"),
        "XShare": ("tab:red", "x"),
        "top-k": ("tab:purple", "+"),
    }
    figure = Figure(figsize=(4.2 * len(sizes), 7.5), layout="constrained")
    grid = figure.subplots(len(DOMAINS), len(sizes), squeeze=False)
    for line, domain in zip(grid, DOMAINS, strict=True):
        for axes, batch in zip(line, sizes, strict=True):
            here = [
                row
                for row in rows
                if (row["domain"], row["calibrated_on"], row["batch"]) == (domain, domain, batch)
            ]
            for name, (colour, marker) in shown.items():
                points = sorted(
                    (row["read"][0], max(row["loss"][0], 1e-4))
                    for row in here
                    if row["family"] == name
                )
                if points:
                    axes.plot(
                        *zip(*points, strict=True), marker=marker, color=colour, label=name, lw=1
                    )
            stock = next(row["read"][0] for row in here if row["name"] == "stock")
            axes.axvline(stock, color="grey", linestyle=":")
            axes.set(yscale="log", title=f"{domain}, batch {batch} (dotted: stock)")
            axes.set_xlabel("read a layer and step, in experts' bytes")
            axes.set_ylabel("nats a token over stock")
            axes.grid(alpha=0.3)
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside right center")
    with replaced(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


def as_text(rows: list[dict[str, Any]], batch: int, domain: str) -> str:
    """Every arm at one batch size, with half of the 95 % interval over seeds."""
    lines = []
    for row in rows:
        if (row["batch"], row["domain"]) == (batch, domain):
            foreign = (
                "" if row["calibrated_on"] == domain else f" (table of {row['calibrated_on']})"
            )
            cells = [(row["active"], 1, 1), (row["read"], 1, 1), (row["loss"], 1000, 1)]
            cells += [(row["kl"], 1000, 1), (row["top1"], 100, 1)]
            lines.append(
                [
                    brief(row) + foreign,
                    *(f"{s * v:.{d}f} +-{s * e:.{d}f}" for (v, e), s, d in cells),
                ]
            )
    head = [f"{domain}, batch {batch}", "active", "read", "loss", "KL", "top-1, %"]
    return provenance.text_table(head, lines)


def brief(row: dict[str, Any]) -> str:
    """Family and numbers: "linear, tau: tau=0.02 rank=16"."""
    if row["name"] == "stock":
        return "stock"
    own = ast.literal_eval(row["name"])
    left_out = ("rival", "table", "min_active", "renormalise", "by", "fill", "weights")
    numbers = {k: v for k, v in own.items() if k not in left_out}
    if "tau" in numbers:
        numbers.pop("S")
    return f"{row['family']}: {' '.join(f'{k}={v}' for k, v in numbers.items())}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", default="text_model.json")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pool", action="store_true", help="pools alone, on fewer tokens")
    parser.add_argument("--work", default="out/text_model", help="where tables are kept")
    arguments = parser.parse_args()
    check_writable(arguments.output)
    torch.set_num_threads(1)
    folder = Path(arguments.work)
    folder.mkdir(parents=True, exist_ok=True)
    texts = {d: Text.read(MODEL.parent / f"held_{d}.jsonl.xz") for d in DOMAINS}
    numbers = range(FIRST_SEED, FIRST_SEED + arguments.seeds)
    pool, sizes = arguments.pool, POOL_SIZES if arguments.pool else SIZES
    with Journal(f"{arguments.output}.unfinished", {"sizes": str(sizes)}) as done:
        seeds = [one_seed(seed, folder, texts, done, pool=pool) for seed in numbers]
    rows = summary(seeds)
    result = {
        "provenance": provenance.provenance(),
        "sizes": {"passages": [list(s) for s in sizes], "calibration": list(CALIBRATION)},
        "seeds": len(seeds),
        "rows": rows,
    }
    provenance.save_json(arguments.output, result)
    if not pool:
        plot(rows, Path(arguments.output).with_suffix(".png"))
    for batch in sorted({row["batch"] for row in rows}):
        for domain in DOMAINS:
            print(as_text(rows, batch, domain), "\n")


if __name__ == "__main__":
    main()
