"""Evaluate a model that is larger than memory: every arm's pass waits before each decoder layer.

One layer's weights are read, and all arms' passes over all passages take their step in it. What
they hand on lies in files that are mapped into memory, from which a run that was killed goes on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from sere.calibration.reading import versions
from sere.evaluation.decoding import running
from sere.evaluation.passes import Pass
from sere.files import is_passing
from sere.models.outlay import at_work, outlay, room_beside
from sere.models.shelf import Shelf
from sere.models.side_by_side import side_by_side
from sere.models.skeleton import Skeleton
from sere.results.journal import Journal

# Of the disk's free room (or the GPU's) that hidden states may take; more passes wait their turn.
_SHARE = 0.5


_SAID: WeakSet[Skeleton] = WeakSet()


@dataclass(frozen=True)
class Waiting:
    """A pass, and what is done with its logits and prompts (see `Reading.run`) in the end.

    name: what a later run knows it by.
    """

    name: str
    own: Pass
    done: Callable[[Tensor, Tensor], None]


def run_by_layer(
    skeleton: Skeleton, groups: Sequence[list[Waiting]], journal: Journal, title: str
) -> None:
    """Run all passes, those of a group in order. Groups whose hidden states do not fit on the disk
    together are run one after another, and the weights are read again for them.

    journal: of the work that this is a part of. Hidden states lie in a folder beside it while they
    are needed, and when it is interrupted.
    """
    sizes = [state_bytes(skeleton, group) for group in groups]
    shelf = Shelf(journal.states, skeleton.model.device, _identity(skeleton, journal))
    parts = _parts(groups, sizes, shelf, room(skeleton, journal.path))
    states = max((sum(sizes[i] for i in part) for part in parts), default=0)
    _say(skeleton, groups, states, journal.path)
    try:
        for number, part in enumerate(parts):
            own = [groups[i] for i in part]
            said = title if len(parts) == 1 else f"{title}, part {number + 1} of {len(parts)}"
            with torch.no_grad(), _inputs_shared(skeleton, own, shelf):
                _run(skeleton, [waiting for group in own for waiting in group], shelf, said)
    except BaseException as error:  # what fails would do so again, what is interrupted goes on
        if isinstance(error, Exception) or is_passing(journal.path):
            shelf.clear()
        raise
    shelf.clear()


def _identity(skeleton: Skeleton, journal: Journal) -> str:
    """What hidden states depend on, beside their pass."""
    device = skeleton.model.device.type
    about = [journal.settings, versions(), device, skeleton.widened]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()


def _parts(
    groups: Sequence[list[Waiting]], sizes: Sequence[int], shelf: Shelf, most: int
) -> list[list[int]]:
    """Indices of the groups that run together, see `parted`; first what an interrupted run had
    under way, for which there is room."""
    begun = [i for i, each in enumerate(groups) if shelf.holds([w.name for w in each])]
    rest = [i for i in range(len(groups)) if i not in begun]
    parts = [[rest[j] for j in part] for part in parted([sizes[i] for i in rest], most)]
    return [begun, *parts] if begun else parts


def _say(
    skeleton: Skeleton, groups: Sequence[list[Waiting]], states: int, path: str | Path
) -> None:
    """Once: what comes later on the same passages is alike."""
    if not groups or skeleton in _SAID:
        return
    _SAID.add(skeleton)
    rows = [waiting.own.reading.ids.numel() for group in groups for waiting in group]
    K = max(waiting.own.K for group in groups for waiting in group)
    logits = 4 * max(len(group[0].own.reading.made) for group in groups)
    logits *= skeleton.model.config.get_text_config().vocab_size
    beside = 3 * logits + at_work(skeleton, max(rows), K)
    found = outlay(skeleton, sum(rows), states, asked=3 * K, beside=beside)
    found.say(path, "for each set of policies")


def _run(skeleton: Skeleton, passes: list[Waiting], shelf: Shelf, title: str) -> None:
    moe = {
        unit: [layer for layer in skeleton.layers if layer.name.startswith(f"{unit}.")]
        for unit in skeleton.units
    }

    def forward(waiting: Waiting) -> Callable[[], None]:
        return lambda: waiting.done(*waiting.own.reading.run(skeleton.model))

    known = shelf.taken_up([each.name for each in passes])
    through = [known.get(each.name, (0, None))[0] for each in passes]
    place = {unit: number for number, unit in enumerate(skeleton.units)}
    for each in passes:
        if each.name in known:
            each.own.resume(known[each.name][1])

    def step(number: int, unit: str, go: Callable[[], Any]) -> Any:
        own, name = passes[number].own, passes[number].name
        if place[unit] < through[number]:
            return shelf.output(name)
        with own.routed(moe[unit]) if moe[unit] else nullcontext():
            output = go()
        return shelf.keep(name, output, place[unit] + 1, own.state())

    side_by_side(
        skeleton,
        [forward(each) for each in passes],
        step,
        unread=list(skeleton.units)[: min(through, default=0)],
        title=title,
        progress=True,
    )


@contextmanager
def _inputs_shared(
    skeleton: Skeleton, groups: Sequence[list[Waiting]], shelf: Shelf
) -> Iterator[None]:
    """Embed the passages of a group once, for they are the same for all of its passes."""
    group_of = {id(w.own.reading): i for i, group in enumerate(groups) for w in group}
    embedded: dict[int, Any] = {}

    def shared(_module: Any, _arguments: Any, output: Any) -> Any:
        number = group_of[id(running())]
        if number not in embedded:
            embedded[number] = shelf.keep(f"inputs-{number}", output)
        return embedded[number]

    handle = skeleton.model.get_input_embeddings().register_forward_hook(shared)
    try:
        yield
    finally:
        handle.remove()


def state_bytes(skeleton: Skeleton, group: Sequence[Waiting]) -> int:
    """What the hidden states of a group's passes take, and their inputs."""
    config = skeleton.model.config.get_text_config()
    size: int = config.hidden_size * skeleton.model.dtype.itemsize
    return sum(waiting.own.reading.ids.numel() for waiting in [group[0], *group]) * size


def room(skeleton: Skeleton, beside: str | Path) -> int:
    """Bytes of hidden states that may lie around."""
    free = room_beside(beside)[1]
    if skeleton.model.device.type != "cpu":  # there, and on the disk for a later run
        free = min(free, torch.cuda.mem_get_info(skeleton.model.device)[0])
    return int(_SHARE * free)


def parted(sizes: Sequence[int], most: int) -> Iterator[list[int]]:
    """Indices of `sizes` in order, in as few lists as hold at most so much each."""
    part: list[int] = []
    for i, size in enumerate(sizes):
        if part and sum(sizes[j] for j in part) + size > most:
            yield part
            part = []
        part.append(i)
    if part:
        yield part
