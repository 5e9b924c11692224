"""What an engine says once, when it has started: what is re-routed, where and by what; or that
nothing is, and why. The latter is said again by who started it, as the last word before it serves.
"""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from sere import __version__
from sere.kernels import implementation_for
from sere.policy import Policy, in_full, in_words
from sere.serving.expert_kernels import difference
from sere.serving.inert import inert
from sere.serving.session import Session
from sere.serving.symbols import vllm_version
from sere.serving.tiers import FAST
from sere.similarity.enough import untrusted
from sere.table import Table

_LOG = logging.getLogger("vllm.sere")
NOBODYS = (
    "sere: this policy is the default, and nobody has measured it on this model: `sere evaluate` "
    "tells what it costs, `sere tune` stores one within a budget in the table"
)


def description(session: Session, kernels: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """What one worker knows: builtin types only, as it travels between processes.

    kernels: of each of its layers, the expert kernel that serves and the one that stock vLLM would
    have taken.
    """
    pairs = set(kernels)
    settings = session.settings
    return {
        "table": str(settings.table or "made by the engine"),
        "policy": in_words(session.policy),
        "by_rows": _by_rows(session.policy),
        "nobodys": _is_nobodys(session),
        "too_little": _too_little(session),
        "inert": session.inert,
        "rows": _rows(session),
        "layers": sorted(session.layers),
        "kernels": sorted({serving for serving, _ in pairs}),
        "stock_kernels": sorted({stock for _, stock in pairs}),
        "maps": session.answers and session.answers.size,
        "operator": implementation_for(session.rows.buffer.device),
        "device": _name(session.rows.buffer.device),
    }


def say(workers: Sequence[dict[str, Any]], kept: Path | None = None) -> None:
    """Log it, once an engine; workers: the descriptions of its workers. kept: the file of the table
    that the engine has made, or found of an earlier start."""
    own = f"sere {__version__} on vLLM {vllm_version()}"
    first = workers[0]
    layers = _ranges({index for worker in workers for index in worker["layers"]})
    kernels, of_stock = (
        sorted({kernel for worker in workers for kernel in worker[name]})
        for name in ("kernels", "stock_kernels")
    )
    what = (
        f"table {kept or Path(first['table']).name}, layers {layers}, rows: {first['rows']}, "
        f"expert kernel {', '.join(kernels)}, operator {first['operator']}"
    )
    if maps := max(worker.get("maps") or 0 for worker in workers):
        what += f", linear maps of {maps / 1e6:.1f} MB on each device"
    if reason := first["inert"]:
        _LOG.warning("%s: stock, NOTHING IS RE-ROUTED: %s (%s)", own, reason, what)
    else:
        _LOG.info("%s: %s, %s", own, first["policy"], what)
        if by_rows := first["by_rows"]:
            _LOG.info("sere: by the rows that a step decodes: %s", "; ".join(by_rows))
        if first["nobodys"]:
            _LOG.info(NOBODYS)
    if reason := first["too_little"]:
        _LOG.warning("sere: the table is not to be trusted: %s", reason)
    if other := difference(kernels, of_stock):
        _LOG.warning("sere: %s", other)


def say_last(snapshots: Iterable[Any]) -> None:
    """Log it again if nothing is re-routed; snapshots: as workers tell them (see `telemetry`)."""
    reasons = {snapshot["inert"] for snapshot in snapshots} - {None}
    for reason in sorted(reasons):
        _LOG.warning("sere: NOTHING IS RE-ROUTED: %s", reason)


def _rows(session: Session) -> str:
    """Which rows are re-routed, if any are."""
    policy, default = session.settings.policy, session.settings.default
    others = inert(session.policy, session.table, alone=session.alone)
    if others and not session.inert:
        return f'{policy.rows}, of requests that are "independent" (of others none: {others})'
    asking = "" if default <= FAST else f", of requests that ask for less than {default}"
    return policy.rows + asking


def _by_rows(policy: Policy | None) -> list[str]:
    """Its settings by batch size, where they differ."""
    if policy is None or not policy.batches:
        return []
    return [line for line in in_full(policy) if not line.startswith(" ")]


def _is_nobodys(session: Session) -> bool:
    """Whether neither the user nor `sere tune` chose the policy beside a table."""
    settings, table = session.settings, session.table
    return settings.table is not None and not settings.named and getattr(table, "policy", 0) is None


def _too_little(session: Session) -> str | None:
    """What is to be said of a table that the user named; of its own an engine says it before."""
    if session.settings.table is None or not isinstance(session.table, Table):
        return None
    return untrusted(session.table.layers)


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()}, {os.cpu_count()} processors"


def _ranges(numbers: Iterable[int]) -> str:
    """{0, 1, 2, 5} -> "0-2 5"."""
    places = enumerate(sorted(numbers))
    runs = [[n for _, n in run] for _, run in groupby(places, lambda pair: pair[1] - pair[0])]
    return " ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
