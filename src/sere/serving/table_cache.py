"""Where tables that engines made for themselves are kept: one file for each model, quantisation,
dtype, text and method (and one of maps beside it, where they were asked for), written whole or not
at all, by one engine while others wait.

The folder is `SERE_CACHE`, else `$XDG_CACHE_HOME/sere`, else `~/.cache/sere`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from sere.checkpoint import Fingerprint
from sere.files import lock, plainly, replaced, why
from sere.maps import LayerMaps, MapsError, beside, save
from sere.table import FILE_NAME, Table, TableError

CACHE = "SERE_CACHE"
_KEY = 20  # characters of a key in a file's name
_LOOK = 0.5  # seconds between two looks at a lock
_TELL = 10  # seconds between two words about it


class CacheTrouble(RuntimeError):
    """Why the cache is of no use for this start."""


def cache_folder() -> Path:
    """See above; need not be there yet. Raises `CacheTrouble` for a user without a home."""
    own, shared = os.environ.get(CACHE), os.environ.get("XDG_CACHE_HOME")
    folder = Path(own) if own else Path(shared or "~/.cache") / "sere"
    try:
        return folder.expanduser().absolute()
    except RuntimeError as error:
        raise CacheTrouble(f"{folder}: {error} Name a folder by {CACHE}") from None


@dataclass(frozen=True)
class Entry:
    """One table's place in the cache.

    path: of its file, `MODEL-KEY.table`. fingerprint: of the model that it must be for.
    """

    path: Path
    fingerprint: Fingerprint

    @classmethod
    def of(cls, model: str, fingerprint: Fingerprint, facts: Mapping[str, Any]) -> Entry:
        """model: a name for people. facts: all that a table depends on beside the model, JSON-able;
        two engines share a table only if all are equal. Raises `CacheTrouble`."""
        known = {"fingerprint": vars(fingerprint), **facts}
        key = hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()
        name = re.sub(r"[^\w.-]+", "_", Path(model).name) or "model"
        return cls(cache_folder() / f"{name[:80]}-{key[:_KEY]}.table", fingerprint)

    def read(self) -> tuple[bytes, Table] | None:
        """The table's file, and the table in it, checked, with its maps if it names any; None if
        there is none. Raises `CacheTrouble` if it is broken or another model's, or if its maps are.
        """
        try:
            data = self.path.read_bytes()
            table = Table.load(self.path)
            table.check_against(self.fingerprint)
        except FileNotFoundError:
            return None
        except (TableError, MapsError, OSError) as error:
            said = plainly(error).splitlines()[0]
            raise CacheTrouble(f"the table in the cache cannot be used: {said}") from None
        if table.maps is None and "maps" in table.provenance:
            raise CacheTrouble(
                f"the table in the cache cannot be used: {beside(self.path)}, its file of linear "
                "maps, is gone"
            )
        return data, table

    def others(self) -> list[Path]:
        """Tables of a model by this name, if none of them is for this checkpoint: it has changed.
        One of another text, method or dtype says that it has not."""
        name = self.path.name.rsplit("-", 1)[0]  # which begins those of other models, too
        same = self.path.parent.glob(f"{name}-{'[0-9a-f]' * _KEY}.table")
        found = sorted(path for path in same if path != self.path)
        return [] if any(map(self._is_for_this, found)) else found

    def _is_for_this(self, path: Path) -> bool:
        try:
            return Table.load(path).fingerprint == self.fingerprint
        except (TableError, MapsError, OSError):
            return False

    def write(self, data: bytes, maps: Mapping[int, LayerMaps] | None = None) -> None:
        """Put a table's file in its place, whole or not at all; the maps that it names before.
        Raises `CacheTrouble`."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if maps:
                save(beside(self.path), maps)
            with replaced(self.path) as temporary:
                temporary.write_bytes(data)
        except OSError as error:
            raise CacheTrouble(f"the table cannot be kept: {plainly(error)}") from None

    @contextmanager
    def held(self, wait: float, tell: Callable[[float], None]) -> Iterator[None]:
        """Hold the place for this engine alone, until it is through or dead. Raises `CacheTrouble`
        where nothing can be written, or another engine still has it after so many seconds.

        tell: called now and then with the seconds that were waited.
        """
        _made(self.path.parent)
        lock_path = self.path.with_suffix(".lock")
        try:
            file = lock_path.open("ab")
        except OSError as error:
            raise CacheTrouble(f"{self.path.parent} cannot be written to: {why(error)}") from None
        with file:
            began = time.monotonic()
            told = -math.inf
            while reason := _taken(file, lock_path):
                waited = time.monotonic() - began
                if waited >= wait:
                    raise CacheTrouble(f"{reason} after {waited:.0f} s")
                if waited - told > _TELL:
                    told = waited
                    tell(waited)
                time.sleep(min(_LOOK, wait - waited))
            yield


def _made(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CacheTrouble(f"{folder} cannot be made: {why(error)}") from None


def _taken(file: IO[Any], path: Path) -> str | None:
    """Why the lock is not ours yet, or None once it is. Raises `CacheTrouble` where there can be
    none, as on some network disks."""
    try:
        lock(file, path)
    except OSError as error:
        if isinstance(error.__context__, BlockingIOError):
            return f"another engine was still at work on this table ({path})"
        raise CacheTrouble(f"{path} cannot be locked: {why(error)}") from None
    return None


def file_of(table: Table) -> bytes:
    """What `Table.save` writes: ranks are handed the same bytes, so that their plans agree."""
    with tempfile.TemporaryDirectory() as folder:
        table.save(path := Path(folder, FILE_NAME))
        return path.read_bytes()


def table_in(data: bytes) -> Table:
    """The table in a file's bytes."""
    with tempfile.TemporaryDirectory() as folder:
        (path := Path(folder, FILE_NAME)).write_bytes(data)
        return Table.load(path)
