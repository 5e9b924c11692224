"""A user's files: what may be replaced, and writing all of a file or none of it.

One rule for every output of every verb (issue 21): it may replace a file of ours of the same kind.
Anything else that is there is refused, unless the user said --force; what the work reads is refused
in any case. A link is followed. Devices and pipes are written to, never replaced.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import IO, Any

FORCE: ContextVar[bool] = ContextVar("force", default=False)
"""Whether the user said that outputs may replace what is not ours."""


_NEXT = {
    errno.ENOENT: "check its name",
    errno.EACCES: "change its permissions, or name another",
    errno.EPERM: "change its permissions, or name another",
    errno.EEXIST: "choose another place",
    errno.ENOTDIR: "choose another place",
    errno.EISDIR: "name a file inside it",
    errno.EROFS: "choose another place",
    errno.ENOSPC: "make room there, or choose another place",
}


def plainly(error: BaseException) -> str:
    """What an error says, without Python's [Errno 13]: of a file its path, the reason in the
    system's words, and what to do. Without what pydantic puts around vLLM's, too."""
    if not isinstance(error, OSError) or not error.strerror:
        return sentence(str(error))
    path = error.filename
    where = f"{os.fsdecode(path)}: " if isinstance(path, str | bytes | os.PathLike) else ""
    step = _NEXT.get(error.errno or 0)
    ours = error.errno is None or error.strerror != os.strerror(error.errno)
    return where + error.strerror + (f"; {step}" if where and step and not ours else "")


def sentence(text: str) -> str:
    """What an error says, without what pydantic puts around it."""
    text = re.sub(r"^\d+ validation errors? for \S+\n", "", text)
    text = re.sub(r" \[type=\w+, input_value=.*", "", text, flags=re.S)
    return text.strip().removeprefix("Value error, ").removeprefix("Assertion failed, ")


def why(error: BaseException) -> str:
    """The same of a file that has been named already."""
    return (isinstance(error, OSError) and error.strerror) or str(error)


def unwritten(path: str | Path, error: BaseException) -> OSError:
    """What a library met that wrote a file: the system's own error, if it wraps one."""
    inner = error if isinstance(error, OSError) else error.__context__
    number = inner.errno if isinstance(inner, OSError) else None
    if number is None and (found := re.search(r"\(os error (\d+)\)", str(error))):  # Rust's words
        number = int(found[1])
    if number is None:
        return OSError(f"{path} cannot be written: {str(error).splitlines()[0]}")
    return OSError(number, os.strerror(number), str(path))


def unreadable(path: Path, absent: str) -> str | None:
    """Why a regular file cannot be read, in words, or None. absent: what to say where none is."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return f"{path}: {absent}"
        with path.open("rb"):
            return None
    except OSError as error:
        there = error.errno in (errno.EACCES, errno.EPERM, errno.EIO, errno.ELOOP)
        return plainly(error) if there else f"{path}: {absent}"


def absent(path: Path, kind: str, remedy: str) -> str:
    """What to say of a path that is no such file: of a folder, which files of the kind are in it.
    kind: see `KINDS`."""
    if not is_folder(path):
        return f"no such {kind}; {remedy}"
    try:
        files = [file for file in sorted(path.iterdir()) if is_file(file)]
        found = [file.name for file in files if KINDS[kind](file)]
    except OSError as error:
        return f"a folder, and not to be looked into ({why(error)}): name a {kind} in it"
    if not found:
        return f"a folder, in which there is no {kind}; {remedy}"
    return f"a folder: name a {kind} in it ({', '.join(found)})"


@contextmanager
def replaced(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it onto `path` if the block succeeds.

    Whatever goes wrong (an error, Ctrl-C, a full disk), a file already at `path` keeps its bytes
    and no partial file stays behind.
    """
    path = Path(path)
    check_writable(path)
    device = is_device(path)
    target = path if device else path.resolve()
    beside = tempfile.gettempdir() if device else target.parent
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=beside)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        if device:
            with temporary.open("rb") as written, target.open("wb") as opened:
                shutil.copyfileobj(written, opened)
            return
        temporary.chmod(0o666 & ~_umask())
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(target)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            full = f"{path} cannot be written: {os.strerror(errno.ENOSPC)}"
            raise OSError(errno.ENOSPC, f"{full}; make room, or choose another output") from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: str | Path, *inputs: str | Path | None, kind: str | None = None) -> None:
    """Raise `OSError` now, before hours of work, if `path` cannot be written later, is one of the
    files that the work reads, or, where a kind is named (see `KINDS`), is there and no file of ours
    of this kind, or another run is at work on it."""
    path = Path(path)
    for given in inputs:
        if given is not None and path.exists() and Path(given).exists() and path.samefile(given):
            raise FileExistsError(f"{path} is what the result is made from: choose another output")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: name a file inside it")
    if is_device(path):
        return
    folder = path.resolve().parent
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist: create it or choose another output")
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{folder} is not writable: choose another output")
    if kind and (work := unfinished(path)).is_file():
        with locked(work):
            pass
    if kind and path.exists() and not FORCE.get() and not KINDS[kind](path):
        raise FileExistsError(
            f"{path} is there, and no {kind} of sere's: choose another output, or add --force to "
            "replace it"
        )


@contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """Hold a file that is there for this process alone. Raises `OSError` if another one has it."""
    with Path(path).open("rb") as file:
        lock(file, path)
        yield


def lock(file: IO[Any], path: str | Path) -> None:
    """Hold an open file until it is closed."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OSError(
            f"{path}: another run is at work on it: wait for it, or choose another output"
        ) from None


def is_file(path: Path) -> bool:
    """Whether there is one; False, too, for names that no file can have."""
    try:
        return path.is_file()
    except OSError:  # too long
        return False


def is_folder(path: Path) -> bool:
    """Whether there is one; False, too, for what may not be asked."""
    try:
        return path.is_dir()
    except OSError:
        return False


def is_device(path: str | Path) -> bool:
    """Whether it is a device, a pipe or a socket: to be written to, and no place for a file beside.
    /dev/stdout is, even where it is sent to a file."""
    path = Path(path)
    named = path.absolute().parts[1:3]
    if named[:1] == ("dev",) and named[1:] != ("shm",) and path.exists():
        return not path.is_dir()
    return path.exists() and not path.is_file() and not path.is_dir()


def unfinished(output: str | Path) -> Path:
    """Where work on an output keeps what it has so far."""
    return _passing() if is_device(output) else Path(f"{output}.unfinished")


def is_passing(work: Path) -> bool:
    """Whether no later run would look for what work keeps there."""
    return work == _passing()


def _passing() -> Path:
    return Path(tempfile.gettempdir(), f"sere-{os.getpid()}.unfinished")


def _is_table(path: Path) -> bool:
    return _holds(path, "sere")


def _is_maps(path: Path) -> bool:
    return _holds(path, "sere_maps")


def _holds(path: Path, key: str) -> bool:
    """Whether it is a safetensors file with this metadata."""
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(min(int.from_bytes(file.read(8), "little"), 2**28)))
        return key in header["__metadata__"]
    except (ValueError, KeyError, TypeError, OverflowError, MemoryError, RecursionError):
        return False


def _is_result(path: Path) -> bool:
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and "provenance" in found


def _is_picture(path: Path) -> bool:
    """Ours say so; older ones are matplotlib's, and stand beside a result."""
    with path.open("rb") as file:
        head = file.read(1024)
    older = b"Matplotlib" in head and is_file(beside := path.with_suffix(".json"))
    return head.startswith(b"\x89PNG") and (b"sere" in head or (older and _is_result(beside)))


def _is_page(path: Path) -> bool:
    with path.open("rb") as file:
        return b"<title>sere report:" in file.read(4096)


KINDS: dict[str, Callable[[Path], bool]] = {
    "table": _is_table,
    "maps": _is_maps,
    "result": _is_result,
    "picture": _is_picture,
    "page": _is_page,
}


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
