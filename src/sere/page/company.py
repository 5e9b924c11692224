"""benchmarks/composition.py and calibration_trust.py: what chance has to do with it.

Whether an answer depends on the others in its batch, and a table on the text it was made from.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from sere.page.parts import GREY, SCALE, Column, Figure, Grid, Section, colour, panels, shares
from sere.page.sources import Source

_SHARES = (
    ("other answer in other company", "differs_by_company"),
    ("other answer than stock alone", "differs_from_alone"),
)


def composition(source: Source, _others: Sequence[Source]) -> Iterable[Section]:
    """How often the answer to a prompt is another one when its batch is."""
    arms = source.content["arms"]
    sizes = list(arms[0]["sizes"])
    worst, size = max(
        ((arm, size) for arm in arms for size in sizes),
        key=lambda pair: pair[0]["sizes"][pair[1]]["differs_by_company"][0],
    )
    share = worst["sizes"][size]["differs_by_company"][0]
    columns = [Column("batch"), Column("policy")]
    columns += [Column(f"{title}, %", ".2f", 100) for title, _ in _SHARES]
    yield Section(
        "What an answer owes to its company",
        source.name,
        f"At most {share:.1%} of the answers change with the rest of the batch ({worst['name']}, "
        f"batch {size}).",
        [_shares(arms, sizes)],
        [
            Grid(
                f"{source.content['prompts']} prompts; after ±: standard error",
                [*columns, Column("right answers, %", ".2f", 100)],
                [
                    [int(size), arm["name"]]
                    + [arm["sizes"][size][name] for _, name in _SHARES]
                    + [arm["sizes"][size]["right"]]
                    for size in sizes
                    for arm in arms
                ],
            )
        ],
    )


def _shares(arms: list[dict[str, Any]], sizes: list[str]) -> Figure:
    titles = [title for title, _ in _SHARES]
    both = panels(titles, 0.05, shared_y=True, height=380)
    for number, arm in enumerate(arms):
        for column, (_, name) in enumerate(_SHARES, start=1):
            values, errors = zip(*(arm["sizes"][size][name] for size in sizes), strict=True)
            both.add_scatter(
                x=sizes,
                y=values,
                error_y={"type": "data", "array": errors, "thickness": 1},
                mode="lines+markers",
                name=arm["name"],
                legendgroup=arm["name"],
                showlegend=column == 1,
                line={"color": colour(number - 1) if number else GREY},
                hovertemplate=f"<b>{arm['name']}</b>, batch %{{x}}<br>%{{y:.2%}}<extra></extra>",
                row=1,
                col=column,
            )
    both.update_xaxes(title="requests decoded together", type="category")
    both.update_yaxes(tickformat=".0%", rangemode="tozero")
    both.update_yaxes(title="share of prompts", col=1)
    return Figure(
        "Answers that depend on the batch",
        "0 % means that a request gets the same answer whatever it is decoded with. Bars: "
        "standard error over prompts.",
        both,
    )


def trust(source: Source, _others: Sequence[Source]) -> Iterable[Section]:
    """On how many replacements two tables agree, by what they were made from."""
    agreement, stability = source.content["agreement"], source.content["stability"]
    methods, pairs = list(agreement), list(next(iter(agreement.values())))
    first = methods[0]
    text, other = (agreement[first][pair]["same_replacement"] for pair in (pairs[0], pairs[1]))
    same = [[agreement[method][pair]["same_replacement"] for method in methods] for pair in pairs]
    figure = shares(same, methods, pairs, row=26, digits=0, zmin=0, colorscale=SCALE)
    figure.update_xaxes(title="measure of similarity")
    columns = [Column("texts")]
    for method in methods:
        columns += [Column(f"{method}: foretold, %", ".1f", 100), Column("seen, %", ".1f", 100)]
    yield Section(
        "How far to trust a table",
        source.name,
        f"{first}: tables of {pairs[0]} agree on {text:.0%} of the replacements, {pairs[1]} on "
        f"{other:.0%}.",
        [
            Figure(
                "Agreement of two tables",
                "Share of replacements (S=1) that both tables would choose, for every pair of "
                "sources of text. What a table agrees with a random one is chance.",
                figure,
            )
        ],
        [
            Grid(
                "Stability by number of texts: foretold by the bootstrap, seen between two draws",
                columns,
                [
                    [texts]
                    + [stability[m][texts][name] for m in methods for name in ("foretold", "seen")]
                    for texts in stability[first]
                ],
            )
        ],
    )
