"""Workers' snapshots as Prometheus metrics. Every name that sere exports stands in this file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from sere.checks import told

Snapshot = Mapping[str, Any]
"""What `sere.serving.telemetry.snapshot` gives."""

# Counter of the operator -> name without "_total", labels besides engine and layer, help.
_COUNTERS: dict[str, tuple[str, dict[str, str], str]] = {
    "steps": ("sere_steps", {}, "Steps with at least one re-routable row"),
    "active_before": (
        "sere_active_experts_before",
        {},
        "Distinct experts that the router chose, summed over sere_steps",
    ),
    "active_after": (
        "sere_active_experts_after",
        {},
        "Distinct experts that were read, summed over sere_steps",
    ),
    "slots_rerouted": ("sere_slots_rerouted", {}, "Slots moved to another expert"),
    "slots_critical": ("sere_slots_critical", {}, "Slots kept because no expert could stand in"),
    "rows_fast": ("sere_rows", {"row_class": "fast"}, "Rows by class"),
    "rows_exact": ("sere_rows", {"row_class": "exact"}, "Rows by class"),
    "rows_void": ("sere_rows", {"row_class": "void"}, "Rows by class"),
    "rows_independent": ("sere_rows", {"row_class": "independent"}, "Rows by class"),
}
_SWITCHES = ("sere_policy_switches", "Switches of the policy, by an operator or the shadow check")
_SLOTS = ("sere_slots", "Slots of re-routable rows: what sere_slots_rerouted is a share of")
_OBSERVED = ("sere_observed_rows", "Rows of prompts that this engine has measured experts on")
_UNCLASSIFIED = (
    "sere_unclassified_steps",
    "Steps left to stock routing, in some layers or all, as something failed: see the log",
)
_LEFT = (
    (
        "sere_left_steps",
        "Steps of a size that the policy leaves to stock routing, counted here alone",
    ),
    ("sere_left_rows", "Re-routable rows of sere_left_steps, which no other figure counts"),
)
# Told by the scheduler (`sere.serving.prefix_cache`), where there is a cache of prefixes.
_PREFIX = "prefix_tokens_prefilled_again"
_ABOUT_PREFIX = "Tokens of fast answers that came back in a prompt and were computed once more"
# Figure of `sere.serving.shadow.Figures` -> name, help; of layers that were checked.
_SHADOW_COUNTERS = {
    "checks": ("sere_shadow_checks", "Shadow checks of this layer"),
    "exceeded": ("sere_shadow_exceeded", "Shadow checks that found more than the bound"),
    "error_sum": ("sere_shadow_error_sum", "Relative errors, summed over sere_shadow_checks"),
    "surrendered_sum": (
        "sere_surrendered_weight_sum",
        "Share of routing weight whose slots moved, summed over sere_shadow_checks",
    ),
}
_SHADOW_GAUGES = {
    "error": ("sere_shadow_error", "Relative error of the layer's output at its latest check"),
    "surrendered": (
        "sere_surrendered_weight",
        "Share of routing weight whose slots moved at the latest check",
    ),
}
_STATES = {
    "sere_enabled": "1 while anything can be re-routed, 0 while nothing is",
    "sere_policy_on": "1 while a policy is on, be it one that moves nothing (see sere_enabled)",
    "sere_fallback": "1 after the shadow check has switched to stock routing",
    "sere_experts": "Experts of a layer",
    "sere_experts_per_token": "Experts per token",
}


def families(engines: Mapping[int, Iterable[Snapshot]], *, up: bool) -> list[Metric]:
    """Metric families of all engines.

    engines: by engine (data-parallel) index the snapshots of its workers, in rank order. Of
        several workers that report a layer the first counts: tensor-parallel ranks agree.
    up: whether these are fresh; otherwise the engine did not answer in time and they are old.
    """
    found = _Families()
    found.gauge("sere_up", "1 if the engine answered this scrape, 0 if figures are old", up)
    for engine, workers in sorted(engines.items()):
        snapshots = list(workers)
        if snapshots:
            _states(found, {"engine": str(engine)}, snapshots)
        seen: set[int] = set()
        for snapshot in snapshots:
            for index in snapshot["layers"].keys() - seen:
                _layer(found, {"engine": str(engine), "layer": str(index)}, index, snapshot)
            seen |= snapshot["layers"].keys()
    return list(found)


def _states(found: _Families, labels: dict[str, str], snapshots: list[Snapshot]) -> None:
    first = snapshots[0]
    policy = first["policy"]
    # Pipeline stages check, and fall back, on their own.
    fallback = next((s["fallback"] for s in snapshots if s["fallback"]), None)
    enabled = any(snapshot["inert"] is None for snapshot in snapshots)
    values = (enabled, policy is not None, fallback is not None, first["E"], first["K"])
    for (name, about), value in zip(_STATES.items(), values, strict=True):
        found.gauge(name, about, value, labels)
    found.counter(*_SWITCHES, first["switches"], labels)
    steps = max(snapshot["unclassified_steps"] for snapshot in snapshots)
    found.counter(*_UNCLASSIFIED, steps, labels)
    for about_left, count in zip(_LEFT, first["left"], strict=True):
        found.counter(*about_left, count, labels)
    if _PREFIX in first:
        found.counter(f"sere_{_PREFIX}", _ABOUT_PREFIX, first[_PREFIX], labels)
    settings = told(policy or {})
    about = "The policy that is on, as JSON, and why there is none"
    info = {"policy": json.dumps(settings) if settings else "stock", "reason": fallback or ""}
    found.gauge("sere_policy_info", about, 1, {**labels, **info})


def _layer(found: _Families, labels: dict[str, str], index: int, snapshot: Snapshot) -> None:
    counters = snapshot["layers"][index]
    for counter, value in counters.items():
        name, more, about = _COUNTERS.get(counter, (f"sere_{counter}", {}, counter))
        found.counter(name, about, value, {**labels, **more})
    rows = counters["rows_fast"] + counters.get("rows_independent", 0)
    found.counter(*_SLOTS, rows * snapshot["K"], labels)
    if (observed := snapshot.get("observed", {}).get(index)) is not None:
        found.counter(*_OBSERVED, observed, labels)
    checked = snapshot["shadow"].get(index)
    if checked and checked["checks"]:
        for figure, (name, about) in _SHADOW_COUNTERS.items():
            found.counter(name, about, checked[figure], labels)
        for figure, (name, about) in _SHADOW_GAUGES.items():
            found.gauge(name, about, checked[figure], labels)


class _Families:
    """Metric families by name, each with the labels of its first sample."""

    def __init__(self) -> None:
        self._known: dict[str, Any] = {}

    def counter(self, name: str, about: str, value: float, labels: dict[str, str]) -> None:
        self._add(CounterMetricFamily, name, about, value, labels)

    def gauge(
        self, name: str, about: str, value: float, labels: dict[str, str] | None = None
    ) -> None:
        self._add(GaugeMetricFamily, name, about, value, labels or {})

    def _add(self, kind: Any, name: str, about: str, value: float, labels: dict[str, str]) -> None:
        family = self._known.setdefault(name, kind(name, about, labels=list(labels)))
        family.add_metric(list(labels.values()), value)

    def __iter__(self) -> Iterator[Metric]:
        return iter(self._known.values())
