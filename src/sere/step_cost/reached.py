"""How much of the memory's bandwidth decoding reaches: where little, fewer experts save little.

Re-routing saves reading. A step that reads its bytes at a small part of what the device can is
bound by something else (launches, the host, an untuned expert kernel), and stays as long as it was:
a public report has 7 % on another card, and no gain (issue 19).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ENOUGH = 0.3
"""Below this share of the bandwidth, at every batch size where fewer experts would be read."""
_FEWER = 1.1  # what the bytes have to promise for a batch size to be asked


@dataclass(frozen=True)
class Reached:
    """One batch size under stock routing. bandwidth: bytes/s that its steps read; share: of what
    the device was measured to do; promised: the best speed-up that a policy's bytes would allow."""

    batch: int
    bandwidth: float
    share: float
    promised: float


def reached(result: Mapping[str, Any]) -> list[Reached]:
    """From a result of `sere bench`, by batch size. A share above 1: the probe read slower."""
    able = result["roofline"]["bandwidth"]
    found = []
    for each in sorted(result["results"], key=lambda each: int(each["batch"])):
        stock, *others = each["arms"]
        share = stock["predicted_ms"] / stock["tpot_ms"]
        promised = max((arm["predicted_speedup"] for arm in others), default=1.0)
        found.append(Reached(each["batch"], share * able, share, promised))
    return found


def too_little(found: Sequence[Reached]) -> str | None:
    """Why re-routing had better stay off on this machine, or None."""
    asked = [one for one in found if one.promised >= _FEWER]
    if not asked or (best := max(asked, key=lambda one: one.share)).share >= ENOUGH:
        return None
    return (
        f"decoding reads at {best.share:.0%} of this device's bandwidth at best, at batch "
        f"{best.batch}: something else than reading experts takes the time. Do not enable "
        "re-routing here"
    )


def in_words(found: Sequence[Reached]) -> str:
    """One line."""
    shares = ", ".join(f"{one.share:.0%} at {one.batch}" for one in found)
    able = found[0].bandwidth / found[0].share / 1e9
    return f"of {able:.3g} GB/s, stock decoding reaches by batch size: {shares}"


def from_file(path: str | Path) -> list[Reached]:
    """Of a result that `sere bench` wrote. Raises `ValueError` for anything else."""
    try:
        return reached(json.loads(Path(path).read_text()))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; `sere bench MODEL TABLE` writes one") from None
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: not a result of `sere bench` with closed batches ({error})"
        ) from None
