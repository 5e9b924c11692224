"""Searches run side by side, so that what they ask for at one time is measured at once.

A search is plain code that asks a judge. Where a model is read one layer at a time, each search is
a coroutine (greenlet) that pauses at its next measurement; when all do, one reading of the weights
serves them. A search may run others in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar
from weakref import WeakSet

from greenlet import getcurrent, greenlet

Found = TypeVar("Found")
_SEARCHES: WeakSet[greenlet] = WeakSet()  # which are gone on with when their pieces are measured


def obtain(pieces: list[Any], measure: Callable[[list[Any]], None]) -> None:
    """Measure now; or, within `in_rounds`, when all searches beside this one ask, too."""
    here = getcurrent()
    if here in _SEARCHES:
        here.parent.switch(pieces)
    else:
        measure(pieces)


def in_rounds(
    searches: Sequence[Callable[[], Found]], measure: Callable[[list[Any]], None] | None
) -> list[Found]:
    """What the searches return, in order.

    measure: takes the pieces of all that wait, some of them perhaps more than once; None runs the
    searches one after another.
    """
    if measure is None:
        return [search() for search in searches]
    found: dict[int, Found] = {}

    def run(number: int) -> None:
        found[number] = searches[number]()

    running = [greenlet(partial(run, number)) for number in range(len(searches))]
    _SEARCHES.update(running)
    try:
        asked = [(each, each.switch()) for each in running]
        while asked := [(each, pieces) for each, pieces in asked if not each.dead]:
            obtain([piece for _, pieces in asked for piece in pieces], measure)
            asked = [(each, each.switch()) for each, _ in asked]
    finally:  # one has failed: the others are of no interest
        for each in running:
            each.throw()
    return [found[number] for number in range(len(searches))]
