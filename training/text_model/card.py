"""The text model's card in figures: learning curve, and how often each expert is chosen by domain.

    python training/text_model/card.py PROSE.table CODE.table

The tables are `sere calibrate training/text_model/model --data ...` of each domain's held-out text.
Writes card.json and card.png beside this file, and prints the load by layer.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from matplotlib.figure import Figure

from sere.results.provenance import text_table
from sere.table import Table

HERE = Path(__file__).parent


def main() -> None:
    tables = dict(zip(("prose", "code"), map(Table.load, sys.argv[1:3]), strict=True))
    load = {
        domain: {
            str(i): [round(x, 5) for x in layer.load.tolist()] for i, layer in t.layers.items()
        }
        for domain, t in tables.items()
    }
    tokens = {domain: t.provenance["tokens"] for domain, t in tables.items()}
    card = {"tokens": tokens, "load_by_domain_layer_and_expert": load}
    (HERE / "card.json").write_text(json.dumps(card, indent=1) + "\n")
    rows = []
    for layer in load["prose"]:
        prose, code = (sorted(load[domain][layer], reverse=True) for domain in load)
        E = len(prose)
        shared = sum(map(min, load["prose"][layer], load["code"][layer]))
        ends = [f"{E * x:.2f}" for x in (prose[0], prose[-1], code[0], code[-1])]
        rows.append([layer, *ends, f"{shared:.0%}"])
    head = ["layer", "prose: fullest", "emptiest", "code: fullest", "emptiest", "in common"]
    print(text_table(head, rows))
    draw(load)


def draw(load: dict[str, dict[str, list[float]]]) -> None:
    log = json.loads((HERE / "model/training.json").read_text())["log"]
    figure = Figure(figsize=(13, 4), layout="constrained")
    curve, *pictures = figure.subplots(1, 3, width_ratios=(1, 1, 1))
    curve.plot([seen / 1e6 for _, seen, *_ in log], [loss for _, _, loss, *_ in log], lw=1)
    curve.set(xlabel="million tokens", ylabel="nats a token (one batch)", title="learning curve")
    curve.grid(alpha=0.3)
    for axes, (domain, layers) in zip(pictures, load.items(), strict=True):
        image = [[len(row) * x for x in row] for row in layers.values()]
        shown = axes.imshow(image, aspect="auto", vmin=0, vmax=4)
        axes.set(title=f"load on {domain}", xlabel="expert", ylabel="layer")
    figure.colorbar(shown, ax=pictures, label="times an even share")
    figure.savefig(HERE / "card.png", dpi=90)


if __name__ == "__main__":
    main()
