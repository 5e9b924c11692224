"""A user's files: is one there, and writing all of it or none of it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replaced(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it onto `path` if the block succeeds.

    Whatever goes wrong (an error, Ctrl-C, a full disk), a file already at `path` keeps its bytes
    and no partial file stays behind.
    """
    path = Path(path)
    check_writable(path)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: str | Path, *inputs: str | Path | None) -> None:
    """Raise `OSError` now, before hours of work, if `path` cannot be written later, or is one of
    the files that the work reads."""
    path = Path(path)
    for given in inputs:
        if given is not None and path.exists() and Path(given).exists() and path.samefile(given):
            raise FileExistsError(f"{path} is what the result is made from: choose another output")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: name a file inside it")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} does not exist: create it or choose another output")
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"{path.parent} is not writable: choose another output")


def is_file(path: Path) -> bool:
    """Whether there is one; False, too, for names that no file can have."""
    try:
        return path.is_file()
    except OSError:  # too long
        return False


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
