"""Calibrate a model that is larger than memory, one decoder layer at a time.

What a layer gives out goes through a file, mapped into memory: a machine that runs short of memory
has it on disk already, and a run that was killed goes on from there
(`sere.calibration.unfinished`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sere.calibration.observation import Observer
from sere.calibration.unfinished import Unfinished
from sere.models.moe import MoELayer
from sere.models.shelf import Shelf
from sere.models.side_by_side import side_by_side
from sere.models.skeleton import Skeleton
from sere.similarity.sums import FOLDS

Forwards = list[Callable[[], Any]]


def read_by_layer(
    skeleton: Skeleton,
    forwards: Forwards,
    begin: Callable[[int], None],
    observer: Observer,
    work: Unfinished,
    progress: bool,
) -> None:
    """Run all forward passes through one decoder layer after the other; results go to `work`.

    forwards: one per batch, each calling the skeleton's model.
    begin: announces that batch i takes its step (see `Observer.begin`).
    """
    moe = {unit: _within(unit, skeleton.layers) for unit in skeleton.units}
    done = list(work.finished)

    def step(batch: int, unit: str, go: Callable[[], Any]) -> Any:
        begin(batch)
        return work.output(batch) if unit in done else work.keep(batch, go())

    def after(unit: str) -> None:
        if unit not in done:  # while its weights are there, which maps ask again
            found = {layer.index: observer.finish(layer) for layer in moe[unit]}
            work.finish(unit, found, observer.K)

    side_by_side(
        skeleton,
        forwards,
        step,
        after=after,
        unread=done,
        until=_last(skeleton),
        title="calibrate",
        progress=progress,
    )


def read_until_stable(
    skeleton: Skeleton,
    forwards: Forwards,
    begin: Callable[[int], None],
    observer: Observer,
    share: float,
    work: Unfinished,
    progress: bool,
) -> int:
    """The same with `FOLDS` batches at a time, until every layer would choose this share of its
    replacements again; how many batches that took. Weights are read once for each such group, and
    `work` has what was added up by the last whole one."""
    read = len(work.finished) * FOLDS
    if read:
        observer.take_up(work.sums())
    shelf = Shelf(work.states, skeleton.model.device)
    try:
        while read < len(forwards) and not (read and observer.stability() >= share):

            def step(batch: int, _unit: str, go: Callable[[], Any], read: int = read) -> Any:
                begin(read + batch)
                return shelf.keep(str(batch), go())

            group = forwards[read : read + FOLDS]
            side_by_side(
                skeleton,
                group,
                step,
                until=_last(skeleton),
                title=f"calibrate, batches {read + 1} to {read + len(group)}",
                progress=progress,
            )
            work.add_up(f"batches from {read + 1}", observer.so_far(), observer.K)
            read += FOLDS
    finally:
        shelf.clear()
    return min(read, len(forwards))


def _last(skeleton: Skeleton) -> str:
    return [unit for unit in skeleton.units if _within(unit, skeleton.layers)][-1]


def _within(unit: str, layers: list[MoELayer]) -> list[MoELayer]:
    return [layer for layer in layers if layer.name.startswith(f"{unit}.")]
