"""Calibrate a model that is larger than memory: every batch waits before each decoder layer.

The model's own forward runs once per batch of text, all batches side by side as coroutines
(greenlets). Before a decoder layer each of them pauses; when all have, the layer's weights are
read, every batch takes its step in turn, and the weights are forgotten. So each weight is read
once, the batches are the very ones of a run in memory, and results are equal to the bit.

What a layer gives out goes through a file, mapped into memory: a machine that runs short of memory
has it on disk already, and a run that was killed goes on from there
(`sere.calibration.unfinished`).
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from greenlet import getcurrent, greenlet
from tqdm import tqdm

from sere.calibration.observation import Observer
from sere.calibration.unfinished import Unfinished
from sere.models.moe import MoELayer
from sere.models.skeleton import Skeleton


def read_by_layer(
    skeleton: Skeleton,
    forwards: list[Callable[[], Any]],
    begin: Callable[[int], None],
    observer: Observer,
    work: Unfinished,
    progress: bool,
) -> None:
    """Run all forward passes through one decoder layer after the other; results go to `work`.

    forwards: one per batch, each calling the skeleton's model.
    begin: announces that batch i takes its step (see `Observer.begin`).
    """
    passes = [_paused_pass(forward) for forward in forwards]
    moe = {unit: _within(unit, skeleton.layers) for unit in skeleton.units}
    last = [unit for unit, layers in moe.items() if layers][-1]
    with _pauses(skeleton, work, last):
        arrived = [each.switch() for each in passes]
        bar = tqdm(total=len(skeleton.units), desc="calibrate", unit="layer", disable=not progress)
        while (unit := arrived[0]) is not None:
            if set(arrived) != {unit}:
                raise RuntimeError(f"batches take different layers: {sorted(set(arrived))}")
            with nullcontext() if unit in work.finished else skeleton.filled(unit):
                for i, each in enumerate(passes):
                    begin(i)
                    arrived[i] = each.switch(i)
                if unit not in work.finished:  # while its weights are there, which maps ask again
                    found = {layer.index: observer.finish(layer) for layer in moe[unit]}
                    work.finish(unit, found, observer.K)
            bar.update()
        bar.close()
        for each in passes:
            each.throw()  # what follows the last MoE layer is of no interest


def _paused_pass(forward: Callable[[], Any]) -> greenlet:
    made = greenlet(forward)
    made.gr_context = contextvars.copy_context()
    return made


@contextmanager
def _pauses(skeleton: Skeleton, work: Unfinished, last: str) -> Iterator[None]:
    """Make every decoder layer hand over to the scheduler before it runs, the last also after."""
    scheduler = getcurrent()

    def pausing(name: str, inner: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*arguments: Any, **named: Any) -> Any:
            batch = scheduler.switch(name)
            if name in work.finished:
                output = work.output(batch)
            else:
                output = work.keep(batch, inner(*arguments, **named))
            if name == last:
                scheduler.switch(None)
            return output

        return forward

    for name, unit in skeleton.units.items():
        unit.forward = pausing(name, unit.forward)
    try:
        yield
    finally:
        for unit in skeleton.units.values():
            del unit.forward


def _within(unit: str, layers: list[MoELayer]) -> list[MoELayer]:
    return [layer for layer in layers if layer.name.startswith(f"{unit}.")]
