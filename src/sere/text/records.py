"""Files -> records, each with the place where it stands; damaged ones are skipped and counted.

A line ends at "\\n" and nowhere else: U+2028, U+2029 and U+0085 may stand inside a text. A
byte-order mark is no text.
"""

from __future__ import annotations

import gzip
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from sere.text.texts import UnreadableError

T = TypeVar("T")
Record = tuple[str, Any]
"""(where it stands, what was decoded); an `UnreadableError` in its place where that failed."""

LARGEST_SKIPPED_SHARE = 0.01
_BOM = b"\xef\xbb\xbf"
_SUFFIXES = ".txt, .md, .jsonl, .json (each also as .gz) and .parquet"


class CorpusError(ValueError):
    """Text that cannot be used: names the file, what was found and what to do next."""


def readable(source: str, found: Iterable[tuple[str, Any]], read: Callable[[Any], T]) -> list[T]:
    """What `read` makes of each record; those that it or the decoder refuses are skipped, counted
    and told on stderr, the first by its place.

    Raises `CorpusError` if more than one in a hundred is like that.
    """
    kept: list[T] = []
    first, skipped = "", 0
    for where, record in found:
        try:
            if isinstance(record, UnreadableError):
                raise record
            kept.append(read(record))
        except UnreadableError as error:
            first, skipped = first or f"{where}: {error}", skipped + 1
    total = len(kept) + skipped
    if skipped > LARGEST_SKIPPED_SHARE * total:
        others = f" (and {skipped - 1} more of {total:,} like it)" if skipped > 1 else ""
        raise CorpusError(f"{first}{others}: mend the file, or name another")
    if skipped:
        print(f"{source}: skipped {skipped} of {total:,} lines: {first}", file=sys.stderr)
    return kept


def records(path: str | Path) -> Iterator[Record]:
    """The records of a file: JSON lines, the items of a JSON array, rows of parquet, paragraphs.

    Raises `CorpusError` for what is no such file.
    """
    path, (kind, packed) = Path(path), kind_of(path)
    if kind == ".parquet":
        return _rows(path)
    reader = {".jsonl": _lines, ".json": _array}.get(kind, _paragraphs)
    return reader(path, _bytes_of(path, packed))


def kind_of(path: str | Path) -> tuple[str, bool]:
    """A file of text's ending, and whether it is packed (.gz), told without reading it.

    Raises `CorpusError` for what is no such file.
    """
    path = Path(path)
    if not path.is_file():
        there = "a folder: name a file in it" if path.is_dir() else "no regular file: name one"
        what = there if path.exists() else "no such file"
        raise CorpusError(f"{path}: {what}")
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    packed = suffixes[-1:] == [".gz"]
    kind = "".join((suffixes[:-1] if packed else suffixes)[-1:])
    if kind not in (".txt", ".md", ".jsonl", ".json") and (packed or kind != ".parquet"):
        raise CorpusError(f"{path}: expected one of {_SUFFIXES}, not {''.join(suffixes)!r}")
    return kind, packed


def _bytes_of(path: Path, packed: bool) -> bytes:
    try:
        data = gzip.decompress(path.read_bytes()) if packed else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise CorpusError(f"{path}: a torn or foreign gzip file ({error})") from error
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise CorpusError(f"{path}: UTF-16 text: save it as UTF-8")
    return data.removeprefix(_BOM)


def _lines(path: Path, data: bytes) -> Iterator[Record]:
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.strip():
            yield f"{path}:{number}", _decoded(line)


def _array(path: Path, data: bytes) -> Iterator[Record]:
    """A JSON array's items; a lone object; or JSON lines, as some tools name them, too."""
    try:
        whole = _json(_utf8(data))
    except UnreadableError as error:
        if data.lstrip()[:1] == b"[":
            raise CorpusError(f"{path}: {error}") from error
        yield from _lines(path, data)
        return
    for number, item in enumerate(whole if isinstance(whole, list) else [whole], 1):
        yield f"{path}: item {number}", item


def _paragraphs(path: Path, data: bytes) -> Iterator[Record]:
    """What blank lines part."""
    line = 1
    for part in re.split(rb"((?:\n[ \t\r]*)+\n)", data):
        if part.strip():
            try:
                yield f"{path}:{line}", _utf8(part).strip().replace("\r\n", "\n")
            except UnreadableError as error:
                yield f"{path}:{line}", error
        line += part.count(b"\n")


def _rows(path: Path) -> Iterator[Record]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise CorpusError(f"{path}: reading parquet needs pyarrow: pip install pyarrow") from error
    number = 0
    with path.open("rb") as file:
        try:
            for batch in parquet.ParquetFile(file).iter_batches():
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", record
        except (ArrowException, OSError) as error:
            raise CorpusError(f"{path}: not a whole parquet file ({error})") from error


def _decoded(line: bytes) -> Any:
    try:
        return _json(_utf8(line))
    except UnreadableError as error:
        return error


def _utf8(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UnreadableError(f"not UTF-8 text ({error.reason} {data[error.start]:#x})") from None


def _json(text: str) -> Any:
    try:
        return json.loads(text, parse_int=_number)
    except json.JSONDecodeError as error:
        raise UnreadableError(f"not JSON ({error})") from None
    except RecursionError:
        raise UnreadableError("JSON that is nested too deeply") from None


def _number(digits: str) -> float:
    """A number is never text; Python refuses very long whole ones."""
    return int(digits) if len(digits) < 20 else float(digits)
