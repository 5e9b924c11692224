"""Results of finished pieces of long work, so that what is interrupted resumes.

A file of JSON lines beside the result-to-be: first what the work depends on, then a piece a line.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any


class JournalError(ValueError):
    """A journal of other work."""


class Journal:
    """`with Journal(path, settings) as journal:`; removed when the work ends without an error."""

    def __init__(self, path: str | Path, settings: dict[str, Any]) -> None:
        """settings: all that the pieces depend on, JSON-able.

        Raises `JournalError` if the file holds pieces of other settings.
        """
        self.path = Path(path)
        self._pieces: dict[str, Any] = {}
        head = json.loads(json.dumps(settings))
        lines = self._lines()
        if lines and lines[0] != head:
            raise JournalError(
                f"{self.path}: unfinished work with other settings; remove it, or repeat the "
                "command that it was left by"
            )
        self._pieces = dict(lines[1:])
        self._file = self.path.open("a")
        if not lines:
            self._write(head)

    def _lines(self) -> list[Any]:
        """What can be read; a last line that was cut off is dropped from the file too."""
        lines = []
        text = self.path.read_text() if self.path.exists() else ""
        good = 0
        for line in text.splitlines(keepends=True):
            if not line.endswith("\n"):
                break
            lines.append(json.loads(line))
            good += len(line)
        if good < len(text):
            self.path.write_text(text[:good])
        return lines

    def _write(self, line: Any) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def __len__(self) -> int:
        return len(self._pieces)

    def get(self, piece: str) -> Any:
        """What was recorded for a piece, or None."""
        return self._pieces.get(piece)

    def add(self, piece: str, result: Any) -> None:
        """Record a finished piece; it is on disk when this returns."""
        self._pieces[piece] = result
        self._write([piece, result])

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        if kind is None:
            self.path.unlink()
