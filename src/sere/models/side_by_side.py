"""Forward passes of a model that is larger than memory: all of them wait before each decoder layer.

The model's own forward runs once per pass, all passes side by side as coroutines (greenlets).
Before a decoder layer each of them pauses; when all have, the layer's weights are read, every pass
takes its step in turn, and the weights are forgotten. So each weight is read once, and results are
those of passes in memory, to the bit.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from greenlet import getcurrent, greenlet
from tqdm import tqdm

from sere.models.skeleton import Skeleton

Step = Callable[[int, str, Callable[[], Any]], Any]


def side_by_side(
    skeleton: Skeleton,
    forwards: Sequence[Callable[[], Any]],
    step: Step,
    *,
    after: Callable[[str], None] = lambda unit: None,
    unread: Sequence[str] = (),
    until: str | None = None,
    title: str,
    progress: bool,
) -> None:
    """Run all forward passes through one decoder layer after the other.

    forwards: one per pass, each calling the skeleton's model; what it returns is dropped.
    step: called with a pass's number, a decoder layer and a function that computes what the layer
        gives out; returns what it is to give out.
    after: called when all passes are through a layer, while its weights are still there.
    unread: layers whose weights no step asks for.
    until: the layer after which passes end; None lets them come to theirs.
    """
    passes = [_paused(forward) for forward in forwards]
    bar = tqdm(total=len(skeleton.units), desc=title, unit="layer", disable=not progress)
    with _pauses(skeleton, step, until), bar:
        try:
            arrived = [each.switch() for each in passes]
            while not passes[0].dead and (unit := arrived[0]) is not None:
                if set(arrived) != {unit}:
                    raise RuntimeError(f"passes take different layers: {sorted(set(arrived))}")
                with nullcontext() if unit in unread else skeleton.filled(unit):
                    for i, each in enumerate(passes):
                        arrived[i] = each.switch(i)
                    after(unit)
                bar.update()
        finally:  # what follows is of no interest, but the contexts that they are in
            for each in passes:
                each.throw()


def _paused(forward: Callable[[], Any]) -> greenlet:
    made = greenlet(forward)
    made.gr_context = contextvars.copy_context()
    return made


@contextmanager
def _pauses(skeleton: Skeleton, step: Step, until: str | None) -> Iterator[None]:
    """Make every decoder layer hand over to the scheduler before it runs, one also after."""
    scheduler = getcurrent()

    def pausing(name: str, inner: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*arguments: Any, **named: Any) -> Any:
            number = scheduler.switch(name)
            output = step(number, name, lambda: inner(*arguments, **named))
            if name == until:
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
