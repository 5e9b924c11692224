"""What passes hand from layer to layer, in files that are mapped into memory: a machine that runs
short of memory has it on disk already, and a run that is killed goes on from there.

A pass has one file. It is replaced, in one step, whenever the pass is through a layer.
"""

from __future__ import annotations

import hashlib
import pickle
import re
import sys
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from sere.files import unwritten

_OURS = re.compile(r"[0-9a-f]{16}\.(?:pt|tmp)")
_FOREIGN = (OSError, ValueError, KeyError, TypeError, RuntimeError, pickle.UnpicklingError)


def is_whole(path: Path) -> bool:
    """Whether what `torch.save` wrote is there as it was written, by its checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, NotImplementedError):
        return False


def save(value: Any, path: Path) -> None:
    """As `torch.save`. Raises `OSError`, which says of a full disk that it is full."""
    try:
        with path.open("wb") as file:  # given a path, torch would not tell
            torch.save(value, file)
    except (OSError, RuntimeError) as error:
        raise unwritten(path, error) from error


class Shelf:
    """A folder of such files, in which nothing else is touched."""

    def __init__(self, folder: str | Path, device: torch.device, of: str = "") -> None:
        """of: what tells all that the outputs depend on from anything else."""
        self._folder, self._device, self._of = Path(folder), device, of
        try:
            self._folder.mkdir(exist_ok=True)
        except FileExistsError:
            raise FileExistsError(
                f"{folder} is a file, where hidden states would lie: move it away, or choose "
                "another output"
            ) from None

    def keep(self, name: str, output: Any, done: int | None = None, state: Any = None) -> Any:
        """What a layer gives out to this pass, from its file; the file before it is gone from disk
        as soon as nobody holds it.

        done: how many layers the pass is through; None if no later run will ask, so that on a GPU
        there need be no file. state: what it has added up by then, plain values.
        """
        if done is None and self._device.type != "cpu":
            return output
        path = self._path(name)
        held = {"of": self._of, "name": name, "done": done, "state": state, "output": output}
        save(held, temporary := path.with_suffix(".tmp"))
        temporary.replace(path)
        return output if self._device.type != "cpu" else self.output(name)

    def output(self, name: str) -> Any:
        """What was kept last."""
        return self._load(name)["output"]

    def holds(self, names: Sequence[str]) -> bool:
        """Whether there is a file of any of these passes."""
        return any(self._path(name).exists() for name in names)

    def taken_up(self, names: Sequence[str]) -> dict[str, tuple[int, Any]]:
        """Of an earlier run's passes, by name: how many layers they are through, and their state.

        What is damaged, or of other work, is dropped, with a word on stderr.
        """
        left = {path for path in self._files() if path.suffix == ".pt"}
        known = {name: found for name in names if (found := self._whole(name))}
        kept = {self._path(name) for name in known}
        damaged = len({self._path(name) for name in names} & (left - kept))
        for path in self._files():
            if path not in kept:
                path.unlink()
        if left and not known:
            print(
                f"{self._folder}: the hidden states in it are of other work, or damaged: they are "
                "dropped, and the reading begins anew",
                file=sys.stderr,
            )
        elif known:
            through = min(known[name][0] if name in known else 0 for name in names)
            lost = f"; {damaged} passes, whose files are damaged, begin anew" if damaged else ""
            print(
                f"{self._folder}: an interrupted reading goes on behind layer {through}{lost}",
                file=sys.stderr,
            )
        return known

    def clear(self) -> None:
        """Remove what lies here, and the folder if nothing else is in it."""
        for path in self._files():
            path.unlink(missing_ok=True)
        with suppress(OSError):
            self._folder.rmdir()

    def _files(self) -> list[Path]:
        return [path for path in self._folder.glob("*") if _OURS.fullmatch(path.name)]

    def _path(self, name: str) -> Path:
        return self._folder / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.pt"

    def _whole(self, name: str) -> tuple[int, Any] | None:
        """How far this pass was, if its file is as it was written."""
        if not is_whole(self._path(name)):
            return None
        try:
            held = self._load(name)
            mine = (held["of"], held["name"]) == (self._of, name)
            return (int(held["done"]), held["state"]) if mine else None
        except _FOREIGN:
            return None

    def _load(self, name: str) -> dict[str, Any]:
        mapped = self._device.type == "cpu"
        held: dict[str, Any] = torch.load(
            self._path(name), map_location=self._device, mmap=mapped, weights_only=True
        )
        return held
