"""Results of finished pieces of long work, so that what is interrupted resumes.

A file of JSON lines beside the result-to-be: first what the work depends on, then a piece a line.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch

from sere.checkpoint import weight_hashes
from sere.files import is_passing, lock
from sere.table import Table


class JournalError(ValueError):
    """A journal of other work."""


class Journal:
    """`with Journal(path, settings) as journal:`; removed when the work ends without an error.

    settings: what the pieces depend on. states: a folder beside it, for what has been begun of
    pieces that are not finished.
    """

    def __init__(self, path: str | Path, settings: dict[str, Any]) -> None:
        """settings: all that the pieces depend on, JSON-able.

        Raises `JournalError` if the file holds pieces of other settings, or is none of ours, and
        `OSError` if another run is at work on it.
        """
        self.path = Path(path)
        self.states = Path(f"{path}.layers")
        self._resumes, self._done = True, True
        self._pieces: dict[str, Any] = {}
        self.settings = head = json.loads(json.dumps(settings))
        self._file = self._opened()
        try:
            lines = self._lines()
            if lines and lines[0] != head:
                raise JournalError(
                    f"{self.path}: unfinished work with other settings "
                    f"({_differing(lines[0], head)}); remove it, or repeat the command that it was "
                    "left by"
                )
        except JournalError:
            self._file.close()
            raise
        self._pieces = dict(lines[1:])
        if not lines:
            self._write(head)

    def _opened(self) -> IO[bytes]:
        """The file, held for this run alone."""
        while True:
            file = self.path.open("a+b")
            lock(file, self.path)
            try:
                if os.path.samestat(os.fstat(file.fileno()), self.path.stat()):
                    return file
            except FileNotFoundError:  # another run ended, and removed it, since it was opened
                pass
            file.close()

    def _lines(self) -> list[Any]:
        """What can be read; a last line that was cut off is dropped from the file too."""
        self._file.seek(0)
        data = self._file.read()
        whole = data[: data.rfind(b"\n") + 1]
        try:
            lines = [json.loads(line) for line in whole.split(b"\n")[:-1]]
            if whole and not isinstance(lines[0], dict):
                raise ValueError("no settings in it")
            dict(lines[1:])
        except (ValueError, TypeError, RecursionError) as error:
            raise JournalError(
                f"{self.path} is no unfinished work of sere's ({error}): remove it, or choose "
                "another output"
            ) from None
        if data and not whole.startswith(b"{"):
            raise JournalError(
                f"{self.path} is no unfinished work of sere's: remove it, or choose another output"
            )
        self._file.truncate(len(whole))
        return lines

    def _write(self, line: Any) -> None:
        """On a disk that is full the work goes on, and cannot be resumed."""
        try:
            self._file.write(json.dumps(line).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            print(f"{self.path}: {error.strerror}: this run cannot be resumed", file=sys.stderr)
            self._file = Path(os.devnull).open("ab")  # noqa: SIM115 - closed with the journal

    def __len__(self) -> int:
        return len(self._pieces)

    def __iter__(self) -> Iterator[str]:
        """The names of the finished pieces."""
        return iter(self._pieces)

    def get(self, piece: str) -> Any:
        """What was recorded for a piece, or None."""
        return self._pieces.get(piece)

    def add(self, piece: str, result: Any) -> None:
        """Record a finished piece; it is on disk when this returns."""
        self._pieces[piece] = result
        self._write([piece, result])

    def forget(self) -> None:
        """Keep nothing, however the work ends: it would end so again."""
        self._resumes = False

    def keep(self) -> None:
        """Leave what there is to another run, though this one ends well."""
        self._done = False

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        begun = bool(self._pieces) or self.states.is_dir()
        done = kind is None and self._done
        if done or not self._resumes or not begun or is_passing(self.path):
            self.path.unlink(missing_ok=True)
        self._file.close()


def _differing(mine: Any, other: dict[str, Any]) -> str:
    known = mine if isinstance(mine, dict) else {}
    return ", ".join(key for key in {**known, **other} if known.get(key) != other.get(key))


def contents(folder: str | Path, tables: Iterable[Table]) -> dict[str, Any]:
    """What is measured depends on, beside its flags: a checkpoint's weights and tables, as hashes
    for a journal to know them by. Where weights have none, it is None."""
    tables = list(tables)
    known = tables[0].fingerprint
    return {
        "weights": list(weight_hashes(folder, known.layers, known.E)),
        "tables": [table_hash(table) for table in tables],
    }


def table_hash(table: Table) -> str:
    """SHA-256 of all that re-routing reads in a table, its maps among it; not of the policy that it
    carries."""
    about = {"fingerprint": asdict(table.fingerprint), "method": table.method}
    digest = hashlib.sha256(json.dumps(about).encode())
    for layer in table.layers.values():
        for value in vars(layer).values():
            is_tensor = isinstance(value, torch.Tensor)
            digest.update(value.numpy().tobytes() if is_tensor else repr(value).encode())
    if table.maps:
        digest.update(table.maps.identity.encode())
    return digest.hexdigest()
