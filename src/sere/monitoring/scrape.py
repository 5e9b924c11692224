"""What re-routing does in a running server, from its `/metrics` and nothing else.

Figures are of the time between two readings, or, for a single one, since the server started. What
a server does not tell is None, never 0.
"""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass

from sere.files import why
from sere.policy import Policy, PolicyError

# The names that sere exports: sere.serving.metrics. These are vLLM's own; a server that is started
# with --disable-log-stats has none of them, and one of several API servers has no start time.
_TOKENS = "vllm:generation_tokens_total"
_RUNNING = "vllm:num_requests_running"
_STARTED = "process_start_time_seconds"


class ScrapeError(RuntimeError):
    """There is nothing to show: says why."""


@dataclass(frozen=True)
class LayerView:
    """One layer of one engine.

    active_before, active_after: distinct experts a step, as chosen and as read. rerouted, critical:
    shares of the re-routable rows' slots. fast, exact: rows. error, surrendered: of the latest
    shadow check, None if there was none. Shares and means are None where nothing was decoded too.
    """

    engine: int
    layer: int
    active_before: float | None
    active_after: float | None
    rerouted: float | None
    critical: float | None
    fast: float | None
    exact: float | None
    error: float | None
    surrendered: float | None


@dataclass(frozen=True)
class View:
    """What a server does.

    seconds: what the figures cover; None since the server's start. tokens_per_s: generated, None
    without a duration. running: requests. policies, fallbacks: by engine; why routing fell back to
    stock, if it did. idle: engines in which nothing is re-routed. unclassified: by engine, steps
    since the start that were left to stock routing as something failed, where there are any. left:
    by engine, steps in that time of a size that the policy leaves to stock routing, where there are
    any; no other figure counts them. switches: by engine, of the policy in that time, where there
    are any. checked: whether a shadow check has told an error and the weight that moves. stale: the
    engine did not answer, and figures are old. restarted: between the two readings; figures are of
    what came after.
    """

    seconds: float | None
    tokens_per_s: float | None
    running: float | None
    policies: dict[int, str]
    fallbacks: dict[int, str]
    idle: list[int]
    unclassified: dict[int, int]
    left: dict[int, int]
    switches: dict[int, int]
    checked: bool
    stale: bool
    restarted: bool
    layers: list[LayerView]


class Reading:
    """The metrics of a server at one moment; `ScrapeError` for what is no text of metrics."""

    def __init__(self, text: str, at: float) -> None:
        from prometheus_client.parser import text_string_to_metric_families

        self.at = at
        try:
            families = list(text_string_to_metric_families(text))
        except ValueError as error:
            raise ScrapeError(f"metrics that cannot be read ({error})") from error
        self._samples = [sample for family in families for sample in family.samples]

    def by_layer(self, name: str, **labels: str) -> dict[tuple[int, int], float]:
        """Values by engine and layer of the samples with these labels."""
        return {
            (int(sample.labels["engine"]), int(sample.labels["layer"])): sample.value
            for sample in self._samples
            if sample.name == name and labels.items() <= sample.labels.items()
        }

    def by_engine(self, name: str) -> dict[int, float]:
        """Values by engine of the samples of a name."""
        own = (sample for sample in self._samples if sample.name == name)
        return {int(sample.labels["engine"]): sample.value for sample in own}

    def labels(self, name: str) -> list[Mapping[str, str]]:
        return [sample.labels for sample in self._samples if sample.name == name]

    def total(self, name: str) -> float | None:
        """Sum over all samples of a name; None if there is none."""
        values = [sample.value for sample in self._samples if sample.name == name]
        return sum(values) if values else None


def read(url: str) -> Reading:
    """The metrics of the server at `url`; `ScrapeError` if there are none, or none of sere."""
    address = _address(url)
    try:
        with urllib.request.urlopen(address, timeout=10) as response:
            text = response.read().decode()
    except urllib.error.HTTPError as error:
        raise ScrapeError(
            f"{address} answers HTTP {error.code} ({error.reason}): is that the address of vLLM's "
            "server, and does nothing stand in between?"
        ) from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise ScrapeError(
            f"{address} cannot be read ({_reason(error)}): is the server up?"
        ) from error
    if "sere_up" not in text:
        raise ScrapeError(
            f"{address} has no metrics of sere: start vLLM with "
            """--additional-config '{"sere": {...}}' (`sere doctor` tells what hinders it)"""
        )
    try:
        return Reading(text, time.monotonic())
    except ScrapeError as error:
        raise ScrapeError(f"{address} answers {error}") from error


def _address(url: str) -> str:
    base = url if "://" in url else f"http://{url}"
    return base.rstrip("/").removesuffix("/metrics").removesuffix("/v1") + "/metrics"


def _reason(error: Exception) -> str:
    inner = error.reason if isinstance(error, urllib.error.URLError) else error
    return (inner if isinstance(inner, str) else why(inner)) or type(inner).__name__


def policy_in_words(policy: str) -> str:
    """A policy as `sere_policy_info` has it, for people; as it is where another version told it."""
    try:
        return Policy.from_dict(json.loads(policy)).brief()
    except (PolicyError, ValueError):
        return policy


def view(now: Reading, before: Reading | None = None) -> View:
    """What happened between two readings, or until the only one."""
    seconds = now.at - before.at if before else None
    restarted = before is not None and _restarted(now, before)
    tokens = now.total(_TOKENS)
    if tokens is not None and before is not None:
        tokens = _grown(tokens, before.total(_TOKENS), restarted)
    told = now.labels("sere_policy_info")
    return View(
        seconds,
        _ratio(tokens, seconds),
        now.total(_RUNNING),
        {int(labels["engine"]): labels["policy"] for labels in told},
        {int(labels["engine"]): labels["reason"] for labels in told if labels["reason"]},
        [engine for engine, enabled in now.by_engine("sere_enabled").items() if not enabled],
        {e: int(n) for e, n in now.by_engine("sere_unclassified_steps_total").items() if n},
        _events("sere_left_steps_total", now, before, restarted),
        _events("sere_policy_switches_total", now, before, restarted),
        now.total("sere_shadow_error") is not None,
        now.total("sere_up") == 0,
        restarted,
        _layers(now, before, restarted),
    )


def _events(name: str, now: Reading, before: Reading | None, restarted: bool) -> dict[int, int]:
    """By engine how many there were, where there were any."""
    old = before.by_engine(name) if before else {}
    grown = {e: _grown(n, old.get(e), restarted) for e, n in now.by_engine(name).items()}
    return {engine: int(count) for engine, count in grown.items() if count}


def _restarted(now: Reading, before: Reading) -> bool:
    """Whether these are not the figures of the process that was read before.

    Zeroed counters of sere alone (`sere_reset`) are no restart.
    """
    started = before.total(_STARTED), now.total(_STARTED)
    tokens = before.total(_TOKENS), now.total(_TOKENS)
    return (None not in started and started[0] != started[1]) or _fell(*tokens)


def _fell(before: float | None, now: float | None) -> bool:
    return before is not None and now is not None and now < before


def _grown(now: float, before: float | None, restarted: bool) -> float:
    """How much a counter grew; one that fell was reset in between, and all it shows is new."""
    return now if before is None or restarted or now < before else now - before


def _layers(now: Reading, before: Reading | None, restarted: bool) -> list[LayerView]:
    def grown(name: str, **labels: str) -> dict[tuple[int, int], float]:
        old = before.by_layer(name, **labels) if before else {}
        values = now.by_layer(name, **labels)
        return {key: _grown(value, old.get(key), restarted) for key, value in values.items()}

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
            _ratio(chosen.get(key), steps[key]),
            _ratio(read_.get(key), steps[key]),
            _ratio(moved.get(key), slots.get(key)),
            _ratio(kept.get(key), slots.get(key)),
            fast.get(key),
            exact.get(key),
            error.get(key),
            surrendered.get(key),
        )
        for key in sorted(steps)
    ]


def _ratio(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None
