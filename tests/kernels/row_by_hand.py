"""Rules 6 to 9 for one row in plain loops, from the text and from nothing else of `sere`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class Row:
    """What becomes of a row: ids and weights (as given, if not FAST), places of slots that moved,
    and of those that stayed as there were too few experts."""

    ids: list[int]
    weights: list[Any]
    moved: set[int]
    stayed: set[int]


def row_by_hand(
    t: int,
    ids: list[int],
    weights: list[Any],  # numpy float32 or float64: sums are of that type
    E: int,
    active: set[int],
    target: dict[int, int],  # of every expert that is chosen and not active
    scale: dict[int, Any],  # of the same
    *,
    fast: bool,
) -> Row:
    """A FAST (or else a VOID) row, where re-routing works; t: its place in the call."""
    own = [k for k in range(len(ids)) if 0 <= ids[k] < E]
    counting = [k for k in own if fast and weights[k] != 0]
    leaving = [k for k in own if ids[k] not in active]

    def ahead(j: int, k: int) -> bool:
        if (j in counting) != (k in counting):
            return j in counting
        if j in counting and weights[j] != weights[k]:
            return bool(weights[j] > weights[k])
        return j < k

    surplus = len(own) - len(active)
    stayed = {k for k in leaving if sum(ahead(j, k) for j in leaving if j != k) < surplus}
    moved = set(leaving) - stayed
    new = Row(list(ids), list(weights), moved, stayed)
    if not moved:
        return new

    goes, freed = dict[int, list[int]](), list[int]()
    for k in own:
        if k in stayed:
            continue
        if k in moved and k not in counting:
            freed.append(k)
            continue
        expert = target[ids[k]] if k in moved else ids[k]
        if expert in goes:
            freed.append(k)
        goes.setdefault(expert, []).append(k)
    for expert, slots in goes.items():
        carried = [weights[k] * scale[ids[k]] if k in moved else weights[k] for k in slots]
        total = carried[0]
        for more in carried[1:]:
            total = total + more
        new.ids[slots[0]] = expert
        if fast:
            new.weights[slots[0]] = total
    order = sorted(active)
    start = t % len(order)
    spare = [e for e in order[start:] + order[:start] if e not in goes]
    for k in sorted(freed):
        new.ids[k] = spare.pop(0)
        if fast:
            new.weights[k] = type(weights[k])(0)
    return new
