"""Text in, token sequences out: what calibration reads.

A corpus is a list of texts cut to a common maximal length, drawn with a seed and hashed, so that
two tables can be compared knowing whether they saw the same tokens.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

# A text, or a chat: its messages, {"role", "content"} each.
Text: TypeAlias = str | list[dict[str, Any]]

_TEXT_FIELDS = ("text", "content", "prompt")


class CorpusError(ValueError):
    """Text that cannot be used: names the file, what was found and what to do next."""


@dataclass(frozen=True)
class Corpus:
    """Token sequences of at most `length` tokens each, and where they came from."""

    sequences: list[list[int]]
    source: str
    length: int
    seed: int

    @property
    def tokens(self) -> int:
        return sum(map(len, self.sequences))

    @property
    def hash(self) -> str:
        """SHA-256 of the token ids."""
        return hashlib.sha256(json.dumps(self.sequences).encode()).hexdigest()

    @classmethod
    def from_texts(
        cls,
        texts: Sequence[Text],
        encode: Callable[[Text], list[int]],
        *,
        source: str,
        samples: int,
        length: int,
        seed: int,
        allow_fewer: bool = False,
    ) -> Corpus:
        """Draw `samples` texts with `seed`, encode them and cut each to `length` tokens.

        Raises `CorpusError` if there are no texts, or fewer than `samples` (unless allowed).
        """
        texts = [text for text in texts if _plain(text).strip()]
        if not texts:
            raise CorpusError(f"{source}: no text in it")
        if len(texts) < samples and not allow_fewer:
            raise CorpusError(
                f"{source}: {len(texts)} texts, but {samples} were asked for: "
                f"use --samples {len(texts)}, --allow-fewer, or a larger file"
            )
        random.Random(seed).shuffle(texts)
        sequences = [s for text in texts[:samples] if (s := encode(text)[:length])]
        if not sequences:
            raise CorpusError(f"{source}: the tokenizer makes no token of any of its texts")
        return cls(sequences, source, length, seed)


def encoder(tokenizer: Any) -> Callable[[Text], list[int]]:
    """Tokens as an engine makes them of a prompt: special ones that begin a text included; a chat
    through the tokenizer's template, or as its contents, line by line, where it has none."""

    def encode(text: Text) -> list[int]:
        if isinstance(text, str) or tokenizer.chat_template is None:
            return list(tokenizer(_plain(text))["input_ids"])
        return list(tokenizer(_templated(tokenizer, text), add_special_tokens=False)["input_ids"])

    return encode


def _templated(tokenizer: Any, chat: Text) -> str:
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(chat, tokenize=False))
    except TemplateError as error:
        raise CorpusError(
            f"the tokenizer's chat template does not take {str(chat)[:80]}: {error}"
        ) from error


def _plain(text: Text) -> str:
    if isinstance(text, str):
        return text
    return "\n".join(str(message.get("content") or "") for message in text)


def read_texts(path: str | Path) -> list[Text]:
    """The texts of a file: paragraphs of .txt; a text, or a chat as "messages", per line of .jsonl
    or row of .parquet."""
    path = Path(path)
    if not path.is_file():
        raise CorpusError(f"{path}: no such file")
    readers = {".txt": _paragraphs, ".jsonl": _json_lines, ".parquet": _parquet_rows}
    if path.suffix not in readers:
        raise CorpusError(f"{path}: expected one of {', '.join(readers)}, not {path.suffix!r}")
    try:
        return list(readers[path.suffix](path))
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path}: not UTF-8 text ({error})") from error


def read_pairs(path: str | Path) -> list[tuple[str, str]]:
    """(prompt, answer) of every line of a .jsonl whose first line has both; else none."""
    path = Path(path)
    if path.suffix != ".jsonl" or not path.is_file():
        return []
    lines = enumerate(path.read_text("utf-8").splitlines(), 1)
    records = ((number, line, _pair_of(line)) for number, line in lines if line.strip())
    pairs: list[tuple[str, str]] = []
    for number, line, record in records:
        if record is None and not pairs:
            return []
        prompt, answer = record or (None, None)
        if not (isinstance(prompt, str) and prompt and isinstance(answer, str) and answer):
            raise CorpusError(
                f'{path}:{number}: expected {{"prompt": "...", "answer": "..."}} as on the first '
                f"line, neither of them empty, got {line[:80]}"
            )
        pairs.append((prompt, answer))
    return pairs


def draw_pairs(path: str | Path, samples: int, seed: int) -> list[tuple[str, str]]:
    """At most `samples` of `read_pairs`, drawn with `seed`: files are often sorted by task."""
    pairs = read_pairs(path)
    random.Random(seed).shuffle(pairs)
    return pairs[:samples]


def _pair_of(line: str) -> tuple[Any, Any] | None:
    """A line's prompt and answer, if it has both."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    if not (isinstance(record, dict) and {"prompt", "answer"} <= set(record)):
        return None
    return record["prompt"], record["answer"]


def _paragraphs(path: Path) -> Iterator[Text]:
    yield from (part.strip() for part in path.read_text("utf-8").split("\n\n") if part.strip())


def _json_lines(path: Path) -> Iterator[Text]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise CorpusError(f"{path}:{number}: not JSON ({error})") from error
            yield _text_of(record, f"{path}:{number}")


def _parquet_rows(path: Path) -> Iterator[Text]:
    from pyarrow import parquet

    for batch in parquet.ParquetFile(path).iter_batches():
        for record in batch.to_pylist():
            yield _text_of(record, str(path))


def _text_of(record: Any, where: str) -> Text:
    if isinstance(record, str):
        return record
    if isinstance(record, dict):
        for field in _TEXT_FIELDS:
            if isinstance(record.get(field), str):
                return str(record[field])
        messages = record.get("messages")
        if isinstance(messages, list) and all(isinstance(m, dict) for m in messages):
            return messages
    keys = ", ".join(record) if isinstance(record, dict) else type(record).__name__
    raise CorpusError(f"{where}: no text field ({', '.join(_TEXT_FIELDS)} or messages); has {keys}")
