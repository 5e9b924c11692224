"""A calibration under way, on disk: what a run that is killed leaves to the next one.

Beside the table-to-be lies a folder with the statistics of every finished decoder layer and the
outputs of the last one; or, where text is read until it is enough, with all that was added up by
the last finished group of batches. A layer or group counts as finished when `progress.json` says
so, which is renamed into place after all else has been written.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from sere.files import lock, replaced
from sere.maps import LayerMaps
from sere.models.shelf import is_whole, save
from sere.table import LayerStatistics

_LOCK = "lock"
_OURS = re.compile(
    r"lock|progress\.json|\.progress\.json\..*\.tmp|outputs-\d+|(layer|maps|sums)-\d+\.pt|states"
)


class UnfinishedError(ValueError):
    """A folder of another run, or not one of ours."""


class Unfinished:
    """The folder of a run; it is made when there is something to keep.

    finished: names of the decoder layers, or groups of batches, that need not be run again.
    states: a folder for what is under way.
    K: experts per token, as seen so far.
    """

    def __init__(
        self, folder: str | Path, settings: dict[str, Any], device: torch.device | str = "cpu"
    ) -> None:
        """Take up what is there; settings: all that the result depends on, JSON-able.

        Raises `UnfinishedError` if it is the work of other settings or none of ours, and `OSError`
        if another run is at work on it.
        """
        self._folder = Path(folder)
        self.states = self._folder / "states"
        self._check_ours()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._held = (self._folder / _LOCK).open("wb")
        lock(self._held, self._folder)
        self._device = torch.device(device)
        self._settings = json.loads(json.dumps(settings))
        self.finished: list[str] = []
        self.K = 0
        if (self._folder / "progress.json").exists():
            self._resume()
        for leftover in self._folder.glob("outputs-*"):
            if leftover != self._outputs(len(self.finished)):
                shutil.rmtree(leftover)

    def _check_ours(self) -> None:
        """It is removed at the end, with all that is in it."""
        if not self._folder.exists():
            return
        found = [path.name for path in self._folder.iterdir()] if self._folder.is_dir() else ["."]
        if strangers := [name for name in found if not _OURS.fullmatch(name)]:
            raise UnfinishedError(
                f"{self._folder} is no unfinished calibration of sere's (it holds {strangers[0]}): "
                "choose another output, or remove it"
            )

    def _resume(self) -> None:
        try:
            state = json.loads((self._folder / "progress.json").read_text())
            theirs, self.finished, self.K = state["settings"], state["finished"], state["K"]
        except (ValueError, KeyError, TypeError) as error:
            raise UnfinishedError(
                f"{self._folder}: not an unfinished calibration ({error}); remove the folder"
            ) from error
        for name, mine in self._settings.items():
            if theirs.get(name) != mine:
                raise UnfinishedError(
                    f"{self._folder} holds an unfinished calibration of other settings ({name}: "
                    f"{theirs.get(name)!r} there, {mine!r} now); finish that one, or remove the "
                    "folder to start anew"
                )
        kept = [self._folder / name for name in state.get("files", ())]
        kept += self._outputs(len(self.finished)).glob("*.pt")
        if damaged := [path for path in kept if not is_whole(path)]:
            print(
                f"{damaged[0]} is damaged or missing: this calibration begins anew", file=sys.stderr
            )
            self.finished, self.K = [], 0

    def keep(self, batch: int, output: Any) -> Any:
        """Write what the layer under way gives out for a batch; return it, mapped from disk."""
        folder = self._outputs(len(self.finished) + 1)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{batch}.pt"
        save(output, path)
        return self._load(path)

    def output(self, batch: int) -> Any:
        """What the last finished decoder layer gave out for a batch."""
        return self._load(self._outputs(len(self.finished)) / f"{batch}.pt")

    def _load(self, path: Path) -> Any:
        mapped = self._device.type == "cpu"
        return torch.load(path, map_location=self._device, mmap=mapped, weights_only=True)

    def finish(
        self, unit: str, found: dict[int, tuple[LayerStatistics, LayerMaps | None]], K: int
    ) -> None:
        """Record that all batches are through a decoder layer, and what was found in it."""
        for index, (layer, maps) in found.items():
            save(asdict(layer), self._folder / f"layer-{index}.pt")
            if maps is not None:
                save(vars(maps), self._folder / f"maps-{index}.pt")
        self._note(unit, K, sorted(path.name for path in self._folder.glob("*.pt")))
        shutil.rmtree(self._outputs(len(self.finished) - 1), ignore_errors=True)

    def add_up(self, group: str, sums: Any, K: int) -> None:
        """Record that a group of batches is through all layers, and all that was added up so far:
        plain values."""
        before = self._sums()
        path = self._folder / f"sums-{len(self.finished) + 1}.pt"
        save(sums, path)
        self._note(group, K, [path.name])
        before.unlink(missing_ok=True)

    def sums(self) -> Any:
        """What was added up with the last finished group."""
        return torch.load(self._sums(), weights_only=True)

    def _sums(self) -> Path:
        return self._folder / f"sums-{len(self.finished)}.pt"

    def _note(self, unit: str, K: int, files: list[str]) -> None:
        self.finished.append(unit)
        self.K = K
        state = {"settings": self._settings, "finished": self.finished, "K": K, "files": files}
        with replaced(self._folder / "progress.json") as temporary:
            temporary.write_text(json.dumps(state))

    def statistics(self, index: int) -> LayerStatistics:
        """Of a MoE layer in a finished decoder layer."""
        path = self._folder / f"layer-{index}.pt"
        return LayerStatistics(**torch.load(path, weights_only=True))

    def maps(self, index: int) -> LayerMaps:
        """Of a MoE layer in a finished decoder layer, if they were asked for."""
        path = self._folder / f"maps-{index}.pt"
        return LayerMaps(**torch.load(path, weights_only=True, mmap=True))

    def remove(self) -> None:
        """The table is written: nothing of this is needed any more."""
        shutil.rmtree(self._folder)
        self._held.close()

    def _outputs(self, number: int) -> Path:
        return self._folder / f"outputs-{number}"
