"""Forward passes of a model that is larger than memory: all of them wait before each decoder layer.

The model's own forward runs once per pass, all passes side by side as coroutines (greenlets).
Before a decoder layer each of them pauses; when all have, the layer's weights are read, every pass
takes its step in turn, and the weights are forgotten. So each weight is read once, and results are
those of passes in memory, to the bit.
"""

from __future__ import annotations

import contextvars
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
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


class Shelf:
    """What passes hand from layer to layer, in files that are mapped into memory: a machine that
    runs short of memory has it on disk already. On a GPU it stays there."""

    def __init__(self, beside: str | Path, device: torch.device) -> None:
        """beside: the files lie in a folder next to this path, until `clear`."""
        path = Path(beside).resolve()
        self._folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.layers-", dir=path.parent))
        self._device = device
        self._turn = 0

    def keep(self, key: int | str, output: Any) -> Any:
        """The same, from its file; what was kept under this key before is gone from disk as soon as
        nobody holds it."""
        if self._device.type != "cpu":
            return output
        self._turn += 1
        old = list(self._folder.glob(f"{key}.*.pt"))
        path = self._folder / f"{key}.{self._turn}.pt"
        torch.save(output, path)
        mapped = torch.load(path, map_location=self._device, mmap=True, weights_only=True)
        for each in old:
            each.unlink()
        return mapped

    def clear(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
