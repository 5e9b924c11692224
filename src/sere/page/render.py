"""All results of a folder, as one HTML file."""

from __future__ import annotations

import base64
import gzip
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from sere import __version__
from sere.files import check_writable, replaced
from sere.page import advice, answers, company, quality, similarity, speed, start, traffic
from sere.page.parts import Figure, Section
from sere.page.sources import Source, UnknownFile, is_read, passed_over, read

# kind: what is shown of it; the page is in this order.
SECTIONS: Mapping[str, Callable[[Source, Sequence[Source]], Iterable[Section]]] = {
    "bench": speed.sections,
    "server": traffic.benched,
    "served": traffic.served,
    "started": start.started,
    "tuning": advice.tuning,
    "tuned": advice.tuned,
    "evaluation": quality.sections,
    "demo": answers.demo,
    "generation": answers.generation,
    "harness": answers.harness,
    "composition": company.composition,
    "table": similarity.sections,
    "trust": company.trust,
}


def write(folder: str | Path, output: str | Path) -> tuple[list[Source], dict[str, str]]:
    """Write the page of `folder`'s results to `output`.

    Returns the results shown, and by name the files that are none, with the reason.
    Raises `ValueError` if there is nothing to show.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is no folder: name the one that holds the results")
    results = (path for path in folder.iterdir() if path.is_file() and is_read(path))
    check_writable(output, *results, kind="page")
    sources: list[Source] = []
    shown: list[tuple[Source, list[Section]]] = []
    unknown: dict[str, str] = {}
    for path in sorted(folder.iterdir()):
        if passed_over(path) or os.path.realpath(path) == os.path.realpath(output):
            continue
        try:
            sources.append(read(path))
        except UnknownFile as reason:
            unknown[path.name] = str(reason)
    for source in sources:
        try:
            shown.append((source, _sections(source, sources)))
        except UnknownFile as reason:
            unknown[source.name] = str(reason)
    if not shown:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in unknown.items())
        raise ValueError(
            f"{folder}: no results of `sere calibrate`, `tune`, `evaluate`, `bench` or `demo` "
            f"({reasons or 'it is empty'})"
        )
    shown.sort(key=lambda pair: (list(SECTIONS).index(pair[0].kind), -_extent(pair[0])))
    page = _page(folder.resolve().name, shown, unknown)
    with replaced(output) as temporary:
        temporary.write_text(page, "utf-8")
    return [source for source, _ in shown], unknown


def _sections(source: Source, others: Sequence[Source]) -> list[Section]:
    try:
        found = list(SECTIONS[source.kind](source, others))
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise UnknownFile(
            f"looks like a result of kind {source.kind!r}, but is incomplete or of another version "
            f"({type(error).__name__}: {error})"
        ) from error
    return [replace(section, caveats=source.caveats) for section in found]


def _extent(source: Source) -> int:
    """What is measured at most batch sizes comes first."""
    return len(source.content["results"]) if source.kind == "bench" else 0


def _page(title: str, shown: list[tuple[Source, list[Section]]], unknown: Mapping[str, str]) -> str:
    environment = Environment(
        loader=PackageLoader("sere", "page"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    loader = environment.loader
    assert loader is not None

    def verbatim(name: str) -> Markup:
        return Markup(loader.get_source(environment, name)[0])

    sources = [source for source, _ in shown]
    sections = _told_apart([section for _, own in shown for section in own])
    return environment.get_template("page.html").render(
        title=title,
        made=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        version=__version__,
        sources={source.name: source for source in sources},
        sections=sections,
        unknown=unknown,
        data={
            "sources": [_described(source) for source in sources],
            "sections": [_as_data(section) for section in sections],
            "unknown": dict(unknown),
        },
        plotly=_packed(get_plotlyjs()),
        style=verbatim("page.css"),
        script=verbatim("page.js"),
    )


def _packed(script: str) -> str:
    """Three fifths smaller: plotly.js is nearly all of a page. The page's own script unpacks it."""
    return base64.b64encode(gzip.compress(script.encode(), mtime=0)).decode()


def _told_apart(sections: list[Section]) -> list[Section]:
    """With the file's name where two would have one title."""
    titles = [section.title for section in sections]
    return [
        replace(one, title=f"{one.title} ({Path(one.source).stem})")
        if titles.count(one.title) > 1
        else one
        for one in sections
    ]


def _described(source: Source) -> dict[str, Any]:
    return {
        "name": source.name,
        "sha256": source.sha256,
        "kind": source.kind,
        "provenance": source.provenance,
    }


def _as_data(section: Section) -> dict[str, Any]:
    """A section for programs, the page's own script among them."""
    return {
        "title": section.title,
        "source": section.source,
        "sources": section.sources,
        "finding": section.finding,
        "caveats": list(section.caveats),
        "figures": [_drawn(figure) for figure in section.figures],
        "grids": [asdict(grid) for grid in section.grids],
    }


def _drawn(figure: Figure) -> dict[str, Any]:
    return {
        "title": figure.title,
        "caption": figure.caption,
        **figure.spec(),
        "frames": [asdict(frame) for frame in figure.frames],
    }
