"""Evaluate a model that is larger than memory: every arm's pass waits before each decoder layer.

One layer's weights are read, and all arms' passes over all passages take their step in it. What
they hand on lies in files that are mapped into memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from sere.evaluation.decoding import running
from sere.evaluation.passes import Pass
from sere.models.outlay import at_work, outlay, room_beside
from sere.models.side_by_side import Shelf, side_by_side
from sere.models.skeleton import Skeleton

# Of the disk's free room (or the GPU's) that hidden states may take; more passes wait their turn.
_SHARE = 0.5


_SAID: WeakSet[Skeleton] = WeakSet()


@dataclass(frozen=True)
class Waiting:
    """A pass, and what is done with its logits and prompts (see `Reading.run`) in the end."""

    own: Pass
    done: Callable[[Tensor, Tensor], None]


def run_by_layer(
    skeleton: Skeleton, groups: Sequence[list[Waiting]], beside: str | Path, title: str
) -> None:
    """Run all passes, those of a group in order. Groups whose hidden states do not fit on the disk
    together are run one after another, and the weights are read again for them.

    beside: hidden states lie in a folder next to this path while they are needed.
    """
    sizes = [state_bytes(skeleton, group) for group in groups]
    parts = list(parted(sizes, room(skeleton, beside)))
    _say(skeleton, groups, max((sum(sizes[i] for i in part) for part in parts), default=0), beside)
    for number, part in enumerate(parts):
        own = [groups[i] for i in part]
        said = title if len(parts) == 1 else f"{title}, part {number + 1} of {len(parts)}"
        shelf = Shelf(beside, skeleton.model.device)
        try:
            with torch.no_grad(), _inputs_shared(skeleton, own, shelf):
                _run(skeleton, [waiting for group in own for waiting in group], shelf, said)
        finally:
            shelf.clear()


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

    def step(number: int, unit: str, go: Callable[[], Any]) -> Any:
        own = passes[number].own
        with own.routed(moe[unit]) if moe[unit] else nullcontext():
            output = go()
        return shelf.keep(number, output)

    side_by_side(skeleton, [forward(each) for each in passes], step, title=title, progress=True)


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
    if skeleton.model.device.type == "cpu":
        return int(_SHARE * room_beside(beside)[1])
    return int(_SHARE * torch.cuda.mem_get_info(skeleton.model.device)[0])


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
