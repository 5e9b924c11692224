"""What a checkpoint's files hold, read from their headers: no weight is loaded for it.

A file that is not what it should be is refused here, in one sentence, before hours of work.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INDEX = "model.safetensors.index.json"
_WHOLE = "model.safetensors"
# Files of weights that lie beside a model's and are none of its own.
_BESIDE = re.compile(r"consolidated|adapter|optimizer")
_SHARD = re.compile(r"-(\d+)-of-(\d+)\.safetensors$")
# What downloaders keep beside a file while they write it.
_UNDER_WAY = (".aria2", ".incomplete", ".part", ".crdownload")
_POINTER = b"version https://git-lfs"
_LARGEST_HEADER = 100_000_000  # as safetensors has it
_AGAIN = "download it again"


class CheckpointError(ValueError):
    """A checkpoint that is not whole: names the file, the fault and what to do next."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its dtype as safetensors calls it, and where its bytes are."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int

    def read(self, offset: int, size: int) -> bytes:
        """Some of its bytes."""
        with self.path.open("rb") as file:
            file.seek(self.start + offset)
            return file.read(size)


def stored_tensors(folder: str | Path) -> dict[str, Stored]:
    """Every tensor of the model in `folder` by name: those that its index names, or all in its
    files where it has none. Empty without safetensors.

    Raises `CheckpointError` for files that are cut off, empty, missing or no safetensors.
    """
    folder = Path(folder)
    if (folder / INDEX).is_file():
        return _indexed(folder)
    found: dict[str, Stored] = {}
    for path in _unindexed(folder):
        found |= tensors_in(path)
    return found


def tensors_in(path: Path) -> dict[str, Stored]:
    """Of one file; none of a table, which is a safetensors file too."""
    header, start = _header(path)
    if "sere" in (header.pop("__metadata__", None) or {}):
        return {}
    try:
        found = {
            name: Stored(path, entry["dtype"], tuple(entry["shape"]), start + first, end - first)
            for name, entry in header.items()
            for first, end in [entry["data_offsets"]]
        }
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is no safetensors file ({error!r}): {_AGAIN}") from None
    needed = max((each.start + each.size for each in found.values()), default=start)
    if (size := path.stat().st_size) != needed:
        raise CheckpointError(
            f"{path} has {size:,} bytes where its header promises {needed:,}: the download or copy "
            f"did not finish; {_AGAIN}"
        )
    return found


def document(path: Path) -> dict[str, Any]:
    """A JSON object from one of the model's files. Raises `CheckpointError` for anything else."""
    try:
        data = path.read_bytes()
        _check_pointer(path, data)
        found = json.loads(data)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: not JSON ({'it is empty' if not data else error}); {_AGAIN}"
        ) from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: not a JSON object; {_AGAIN}")
    return found


def _indexed(folder: Path) -> dict[str, Stored]:
    places = document(folder / INDEX).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError(f"{folder / INDEX} has no weight_map of file names: {_AGAIN}")
    files = sorted(set(places.values()))
    if gone := [name for name in files if not (folder / name).is_file()]:
        raise CheckpointError(
            f"{folder}: {len(gone)} of the {len(files)} files that its index names are not there "
            f"({', '.join(gone[:3])}): the download did not finish; run it again"
        )
    held = {name: tensors_in(folder / name) for name in files}
    if lost := [name for name, place in places.items() if name not in held[place]]:
        raise CheckpointError(
            f"{folder / INDEX} says that {lost[0]} is in {places[lost[0]]}, where it is not "
            f"({len(lost)} such): index and files are of different downloads; {_AGAIN}"
        )
    return {name: held[place][name] for name, place in places.items()}


def _unindexed(folder: Path) -> list[Path]:
    if (whole := folder / _WHOLE).is_file():
        return [whole]
    every = sorted(folder.glob("*.safetensors"))
    files = [path for path in every if not _BESIDE.match(path.name)]
    totals = {match.group(2) for path in files if (match := _SHARD.search(path.name))}
    if len(totals) > 1:
        raise CheckpointError(
            f"{folder} has no {INDEX}, and shards of {' and of '.join(sorted(totals))}: remove "
            "those of the other download, or bring the index"
        )
    numbers = {int(match.group(1)) for path in files if (match := _SHARD.search(path.name))}
    for total in map(int, totals):
        if missing := sorted(set(range(1, total + 1)) - numbers):
            raise CheckpointError(
                f"{folder}: {len(missing)} of its {total} shards are not there (number "
                f"{missing[0]}): the download did not finish; run it again"
            )
    return files or [path for path in every if path.name.startswith("consolidated")]


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The header, and where the tensors begin."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            first = file.read(8)
            length = int.from_bytes(first, "little")
            within = 2 <= length <= min(_LARGEST_HEADER, size - 8)
            data = file.read(length if within else 200)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    if left := [end for end in _UNDER_WAY if path.with_name(path.name + end).exists()]:
        raise CheckpointError(
            f"{path}: its download is not finished ({path.name}{left[0]} is still there): run it "
            "again"
        )
    if not first:
        raise CheckpointError(f"{path} is empty: the download did not finish; {_AGAIN}")
    _check_pointer(path, first + data)
    if not within:
        raise CheckpointError(
            f"{path} ({size:,} bytes) is cut off within its header, or no safetensors file: "
            f"{_AGAIN}"
        )
    try:
        header = json.loads(data)
        if not isinstance(header, dict):
            raise ValueError("its header is no JSON object")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no safetensors file ({error}): {_AGAIN}") from None
    return header, 8 + length


def _check_pointer(path: Path, data: bytes) -> None:
    if data.startswith(_POINTER):
        raise CheckpointError(
            f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` in the folder"
        )
