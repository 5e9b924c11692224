"""Which files of a folder are results, told by what is in them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from sere.files import unreadable, why
from sere.results.provenance import finite
from sere.table import FILE_NAME, Table, TableError


class UnknownFile(ValueError):
    """A file that is no result, and why."""


@dataclass(frozen=True)
class Source:
    """One result.

    name: of its file. sha256: of the file's bytes. kind: a key of `KINDS`, or "table".
    content: the JSON document, NaN and infinity as None; or the `Table`.
    """

    name: str
    sha256: str
    kind: str
    content: Any

    @property
    def caveats(self) -> list[str]:
        """What the verb said that is to be known with its figures; of a demo, of its speed."""
        if isinstance(self.content, Table):
            return []
        parts = (self.content, self.content.get("speed"), self.content.get("tuning"))
        own = [part.get("warnings") for part in parts if isinstance(part, dict)]
        return [str(line) for lines in own if isinstance(lines, list) for line in lines]

    @property
    def provenance(self) -> dict[str, Any]:
        """Command, date, machine, versions and commit, as far as they were written down."""
        if isinstance(self.content, Table):
            return _of_table(self.content.provenance)
        if self.kind == "served":
            return _of_vllm(self.content)
        if self.kind == "started" and "when" in self.content:
            return _of_start(self.content)
        found = self.content.get("provenance")
        return found if isinstance(found, dict) else {}


def _arms_have(*names: str) -> Callable[[Mapping[str, Any]], bool]:
    def check(content: Mapping[str, Any]) -> bool:
        arms = content.get("arms")
        return (
            isinstance(arms, list)
            and bool(arms)
            and all(isinstance(arm, dict) and set(names) <= set(arm) for arm in arms)
        )

    return check


def _has(*names: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda content: set(names) <= set(content)


def _is_load(content: Mapping[str, Any]) -> bool:
    """What `vllm bench serve --save-result` writes of a model that generates."""
    times = [content.get(f"median_{name}_ms") for name in ("tpot", "ttft")]
    figures = [*times, content.get("output_throughput"), content.get("completed")]
    return {"request_rate", "model_id"} <= set(content) and all(
        isinstance(figure, int | float) for figure in figures
    )


def _is_report(content: Mapping[str, Any]) -> bool:
    """What an engine measured of its policy as it started, or some of these."""
    reports = content.get("reports", [content])
    needed = {"policy", "sizes", "text", "verdict"}
    return (
        isinstance(reports, list)
        and bool(reports)
        and all(isinstance(report, dict) and needed <= set(report) for report in reports)
    )


# kind: how it is told from the others. No document fits two.
KINDS: dict[str, Callable[[Mapping[str, Any]], bool]] = {
    "bench": _has("results", "roofline", "load"),
    "tuning": _has("by_batch", "held_out", "policy"),
    "evaluation": _arms_have("name", "batches"),
    "demo": _arms_have("name", "exact_match_by_family", "active_by_layer"),
    "generation": _arms_have("name", "same_as_stock", "length_drift"),
    "harness": _arms_have("name", "metrics", "decodes"),
    "server": _has("server", "load", "requests"),
    "served": _is_load,
    "tuned": _has("tuning", "engine"),
    "composition": _arms_have("name", "sizes"),
    "trust": _has("agreement", "stability"),
    "started": _is_report,
}
_PICTURES = (".png", ".svg", ".pdf", ".html")
UNFINISHED = ".unfinished"


def passed_over(path: Path) -> bool:
    """Whether it is hidden, or a picture or page such as stands beside a result."""
    return path.suffix in _PICTURES or path.name.startswith(".")


def is_read(path: Path) -> bool:
    """Whether it may be a result, by its name."""
    return path.suffix == ".json" or _is_table(path)


def _is_table(path: Path) -> bool:
    return path.suffix in (".safetensors", ".table") or path.name == FILE_NAME


def read(path: Path) -> Source:
    """One file; `UnknownFile` says in a line why it is no result."""
    if _is_table(path):
        return _table(path)
    if path.suffix == ".json":
        return _document(path)
    if path.suffix == UNFINISHED:
        raise UnknownFile("unfinished: the command that made it goes on where it was")
    raise UnknownFile("neither JSON nor a table")


def _table(path: Path) -> Source:
    try:
        table = Table.load(path)
    except TableError as error:
        raise UnknownFile(str(error).removeprefix(f"{path}: ")) from error
    return Source(path.name, _sha256(path), "table", table)


def _document(path: Path) -> Source:
    if fault := unreadable(path, "no regular file"):  # such as a pipe, which would be waited for
        raise UnknownFile(fault.removeprefix(f"{path}: "))
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UnknownFile(f"cannot be read as JSON ({why(error)})") from error
    kinds = [k for k, fits in KINDS.items() if isinstance(content, dict) and fits(content)]
    if not kinds:
        raise UnknownFile("JSON, but not a result that this page has a figure for")
    return Source(path.name, _sha256(path), kinds[0], finite(content))


def _of_table(found: dict[str, Any]) -> dict[str, Any]:
    """A table says from which text it was made, in place of a command."""
    text = (
        f"sere calibrate {found.get('model')}: {found.get('sequences')} sequences, "
        f"{found.get('tokens')} tokens of {found.get('corpus')}, seed {found.get('seed')}"
    )
    return {**found, "command": text} if "corpus" in found else found


def _of_start(found: dict[str, Any]) -> dict[str, Any]:
    """An engine's own report was asked for by no command of ours."""
    of = found.get("of") or {}
    devices = ", ".join(sorted({worker["device"] for worker in of.get("workers", [])}))
    made = {"command": "an engine's first start", "date": found["when"], "machine": devices}
    return {**made, "versions": of.get("versions", {})}


def _of_vllm(found: dict[str, Any]) -> dict[str, Any]:
    """`vllm bench serve` writes down when, not where."""
    try:
        date = datetime.strptime(found["date"], "%Y%m%d-%H%M%S").isoformat()
    except (KeyError, TypeError, ValueError):
        return {}
    return {"date": date, "command": "vllm bench serve"}


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
