"""What a worker tells about itself: counters of every layer, the policy, the shadow check.

Asked for by `collective_rpc`, hence between two steps: nothing here costs a step anything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from sere.kernels import COUNTERS
from sere.serving.session import Session, session_of


def snapshot(session: Session) -> dict[str, Any]:
    """Builtin types only, as it travels between processes. Waits for the device once.

    policy: settings by name, or None where routing is stock. fallback: why the shadow check
    switched to stock routing, or None. inert: why nothing is re-routed, or None. switches: of the
    policy, since the start. unclassified_steps: how many were left to stock routing, in some layers
    or all, as something failed (see `sere.serving.incidents`). left: steps, and rows in them, of a
    size that the policy leaves to stock routing. E, K: experts of a layer, of a
    token. layers: counters by decoder layer index and name. shadow: the check's figures by layer
    index. observed: rows of prompts that experts were measured on, by layer index.

    While the worker sleeps its buffers are unmapped: it repeats what it told last.
    """
    if session.last_told is None or not session.asleep:
        known = session.table.fingerprint
        session.last_told = {
            "policy": session.policy.to_dict() if session.policy else None,
            "fallback": session.fallback,
            "inert": session.inert,
            "switches": session.switches,
            "unclassified_steps": session.rows.incidents.steps,
            "left": session.live.left,
            "E": known.E,
            "K": known.K,
            "layers": _counters(session),
            "shadow": _shadow(session),
            "observed": session.traffic.observed() if session.traffic else {},
        }
    return session.last_told


def _counters(session: Session) -> dict[int, dict[str, int]]:
    """Counters by decoder layer index and name: one copy from the device for all layers."""
    figures = session.live.counters.tolist()
    return {
        index: dict(zip(COUNTERS, figures[session.live.place(index)], strict=True))
        for index in sorted(session.layers)
    }


def _shadow(session: Session) -> dict[int, dict[str, float]]:
    if session.shadow is None:
        return {}
    return {index: asdict(figures) for index, figures in session.shadow.figures.items()}


def falling_asleep(original: Callable[..., None]) -> Callable[..., None]:
    """Wraps a worker's `sleep`."""

    def sleep(worker: Any, *args: Any, **kwargs: Any) -> None:
        session = session_of(worker.vllm_config)
        if session is not None:
            snapshot(session)
            session.asleep = True
        original(worker, *args, **kwargs)

    return sleep


def waking_up(original: Callable[..., None]) -> Callable[..., None]:
    """Wraps a worker's `wake_up`; the layers' buffers come back with the weights."""

    def wake_up(worker: Any, tags: list[str] | None = None) -> None:
        original(worker, tags)
        session = session_of(worker.vllm_config)
        if session is not None and (tags is None or "weights" in tags):
            session.asleep = False

    return wake_up
