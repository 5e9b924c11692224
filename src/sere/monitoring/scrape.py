"""What re-routing does in a running server, from its `/metrics` and nothing else.

Figures are of the time between two readings, or, for a single one, since the server started.
"""

from __future__ import annotations

import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass

# The names that sere exports: sere.serving.metrics. Tokens are vLLM's own count.
_TOKENS = "vllm:generation_tokens_total"
_RUNNING = "vllm:num_requests_running"


class ScrapeError(RuntimeError):
    """There is nothing to show: says why."""


@dataclass(frozen=True)
class LayerView:
    """One layer of one engine.

    active_before, active_after: distinct experts a step, as chosen and as read. rerouted, critical:
    shares of the re-routable rows' slots. fast, exact: rows. error, surrendered: of the latest
    shadow check, None if there was none. Shares and means are None where nothing was decoded.
    """

    engine: int
    layer: int
    active_before: float | None
    active_after: float | None
    rerouted: float | None
    critical: float | None
    fast: float
    exact: float
    error: float | None
    surrendered: float | None


@dataclass(frozen=True)
class View:
    """What a server does.

    seconds: what the figures cover; None since the server's start. tokens_per_s: generated, None
    without a duration. policies, fallbacks: by engine; why routing fell back to stock, if it did.
    stale: the engine did not answer, and figures are old.
    """

    seconds: float | None
    tokens_per_s: float | None
    running: float
    policies: dict[int, str]
    fallbacks: dict[int, str]
    stale: bool
    layers: list[LayerView]


class Reading:
    """The metrics of a server at one moment."""

    def __init__(self, text: str, at: float) -> None:
        from prometheus_client.parser import text_string_to_metric_families

        self.at = at
        self._samples = [
            sample for family in text_string_to_metric_families(text) for sample in family.samples
        ]

    def by_layer(self, name: str, **labels: str) -> dict[tuple[int, int], float]:
        """Values by engine and layer of the samples with these labels."""
        return {
            (int(sample.labels["engine"]), int(sample.labels["layer"])): sample.value
            for sample in self._samples
            if sample.name == name and labels.items() <= sample.labels.items()
        }

    def labels(self, name: str) -> list[Mapping[str, str]]:
        return [sample.labels for sample in self._samples if sample.name == name]

    def total(self, name: str) -> float:
        """Sum over all samples of a name."""
        return sum(sample.value for sample in self._samples if sample.name == name)


def read(url: str) -> Reading:
    """The metrics of the server at `url`; `ScrapeError` if there are none, or none of sere."""
    address = _address(url)
    try:
        with urllib.request.urlopen(address, timeout=10) as response:
            text = response.read().decode()
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise ScrapeError(
            f"{address} cannot be read ({_reason(error)}): is the server up?"
        ) from error
    if "sere_up" not in text:
        raise ScrapeError(
            f"{address} has no metrics of sere: start vLLM with "
            """--additional-config '{"sere": {...}}' (`sere doctor` tells what hinders it)"""
        )
    return Reading(text, time.monotonic())


def _address(url: str) -> str:
    base = url if "://" in url else f"http://{url}"
    return base.rstrip("/").removesuffix("/metrics").removesuffix("/v1") + "/metrics"


def _reason(error: Exception) -> str:
    return str(error.reason if isinstance(error, urllib.error.URLError) else error)


def view(now: Reading, before: Reading | None = None) -> View:
    """What happened between two readings, or until the only one."""
    seconds = now.at - before.at if before else None
    tokens = now.total(_TOKENS) - (before.total(_TOKENS) if before else 0)
    told = now.labels("sere_policy_info")
    return View(
        seconds,
        tokens / seconds if seconds else None,
        now.total(_RUNNING),
        {int(labels["engine"]): labels["policy"] for labels in told},
        {int(labels["engine"]): labels["reason"] for labels in told if labels["reason"]},
        now.total("sere_up") < 1,
        _layers(now, before),
    )


def _layers(now: Reading, before: Reading | None) -> list[LayerView]:
    def grown(name: str, **labels: str) -> dict[tuple[int, int], float]:
        old = before.by_layer(name, **labels) if before else {}
        values = now.by_layer(name, **labels)
        # A counter that fell was reset in between: all it shows is new.
        return {k: v - old.get(k, 0) if v >= old.get(k, 0) else v for k, v in values.items()}

    steps, slots = grown("sere_steps_total"), grown("sere_slots_total")
    chosen = grown("sere_active_experts_before_total")
    read_ = grown("sere_active_experts_after_total")
    moved, kept = grown("sere_slots_rerouted_total"), grown("sere_slots_critical_total")
    fast = grown("sere_rows_total", row_class="fast")
    exact = grown("sere_rows_total", row_class="exact")
    error = now.by_layer("sere_shadow_error")
    surrendered = now.by_layer("sere_surrendered_weight")
    return [
        LayerView(
            *key,
            _ratio(chosen[key], steps[key]),
            _ratio(read_[key], steps[key]),
            _ratio(moved[key], slots[key]),
            _ratio(kept[key], slots[key]),
            fast[key],
            exact[key],
            error.get(key),
            surrendered.get(key),
        )
        for key in sorted(steps)
    ]


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
