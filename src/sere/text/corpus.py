"""Text in, token sequences out: what calibration reads.

A corpus is a list of texts cut to a common maximal length, drawn with a seed and hashed, so that
two tables can be compared knowing whether they saw the same tokens, and others whether they see the
same texts. `records` reads files, `texts` says what is a text in them.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sere.text.records import CorpusError, readable, records
from sere.text.texts import Text, UnreadableError, pair_of, plain, text_of

__all__ = [
    "Corpus",
    "CorpusError",
    "Text",
    "draw_pairs",
    "encoder",
    "file_hash",
    "read_pairs",
    "read_texts",
    "text_hash",
]

# A token is rarely longer; what is cut off behind so many characters is asked for again if it is.
_CHARACTERS_A_TOKEN = 16
_MARGIN = 16  # tokens before the cut that may be others than in the whole text


@dataclass(frozen=True)
class Corpus:
    """Token sequences of at most `length` tokens each, and where they came from.

    text_hashes: of each sequence's whole text, see `text_hash`.
    """

    sequences: list[list[int]]
    source: str
    length: int
    seed: int
    text_hashes: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        return sum(map(len, self.sequences))

    @property
    def hash(self) -> str:
        """SHA-256 of the token ids."""
        return hashlib.sha256(json.dumps(self.sequences).encode()).hexdigest()

    def first(self, count: int) -> Corpus:
        """The first `count` sequences of it."""
        hashes = self.text_hashes[:count]
        return Corpus(self.sequences[:count], self.source, self.length, self.seed, hashes)

    def about(self, data: str | Path | None) -> dict[str, Any]:
        """What a table says of its text; data: the file that it was drawn from, if any."""
        return {
            "corpus": self.source,
            "corpus_hash": self.hash,
            "file_hash": file_hash(data) if data else None,
            "text_hashes": list(self.text_hashes),
            "sequences": len(self.sequences),
            "tokens": self.tokens,
            "length": self.length,
            "seed": self.seed,
        }

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

        Raises `CorpusError` if there are no texts, or fewer than `samples` (unless allowed), or if
        more than one in a hundred is a chat that the tokenizer's template does not take.
        """
        texts = [text for text in texts if plain(text).strip()]
        if not texts:
            raise CorpusError(f"{source}: no text in it")
        if len(texts) < samples and not allow_fewer:
            raise CorpusError(
                f"{source}: {len(texts)} text{'s' * (len(texts) > 1)}, but {samples} were asked "
                f"for: ask for {len(texts)} (samples), take fewer (--allow-fewer; for an engine "
                '"allow_fewer": true), or bring a larger file'
            )
        random.Random(seed).shuffle(texts)

        def encoded(text: Text) -> tuple[list[int], str]:
            return encode(text)[:length], text_hash(text)

        drawn = ((source, text) for text in texts[:samples])
        kept = [(s, digest) for s, digest in readable(source, drawn, encoded) if s]
        if not kept:
            raise CorpusError(f"{source}: the tokenizer makes no token of any of its texts")
        if 2 * (distinct := len({digest for _, digest in kept})) < len(kept):
            print(
                f"{source}: {len(kept)} texts were drawn and {distinct} of them are distinct: what "
                "is repeated tells nothing new, and makes a table look more stable than it is",
                file=sys.stderr,
            )
        return cls([s for s, _ in kept], source, length, seed, tuple(d for _, d in kept))


def text_hash(text: Text) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of a text, or of a chat's messages."""
    whole = text if isinstance(text, str) else json.dumps(text, sort_keys=True)
    return hashlib.sha256(whole.encode()).hexdigest()[:16]


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def encoder(tokenizer: Any, length: int | None = None) -> Callable[[Text], list[int]]:
    """Tokens as an engine makes them of a prompt: special ones that begin a text included; a chat
    through the tokenizer's template, or as its contents, line by line, where it has none.

    length: how many are needed; of a very long text no more than it takes is tokenized.
    """
    told = False
    if isinstance(own := getattr(tokenizer, "deprecation_warnings", None), dict):
        own["sequence-length-is-longer-than-the-specified-maximum"] = True  # texts are cut later

    def encode(text: Text) -> list[int]:
        nonlocal told
        if isinstance(text, str):
            return _tokens(tokenizer, text, length, special=True)
        if getattr(tokenizer, "chat_template", None) is None:
            if not told:
                told = True
                print(
                    "the tokenizer has no chat template: chats are joined, line by line",
                    file=sys.stderr,
                )
            return _tokens(tokenizer, plain(text), length, special=True)
        return _tokens(tokenizer, _templated(tokenizer, text), length, special=False)

    return encode


def _tokens(tokenizer: Any, text: str, length: int | None, *, special: bool) -> list[int]:
    cut = len(text) if length is None else length * _CHARACTERS_A_TOKEN
    while True:
        found = list(tokenizer(text[:cut], add_special_tokens=special)["input_ids"])
        if cut >= len(text) or (length is not None and len(found) >= length + _MARGIN):
            return found
        cut *= 4


def _templated(tokenizer: Any, chat: Text) -> str:
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(chat, tokenize=False))
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
        raise TemplateRefusal(
            f"the tokenizer's chat template does not take {str(chat)[:80]}: {error}"
        ) from error


class TemplateRefusal(CorpusError, UnreadableError):
    """A chat that the tokenizer's own template raises at."""


def read_texts(path: str | Path) -> list[Text]:
    """The texts and chats of a file, in the shapes of `texts.SHAPES`; see `records.records`."""
    return readable(str(path), records(path), text_of)


def read_pairs(path: str | Path) -> list[tuple[str, str]]:
    """(prompt, answer) of every record of a file whose first record has both; else none."""
    if Path(path).suffix.lower() in (".txt", ".md") or not Path(path).is_file():
        return []
    found = list(records(path))
    whole = (record for _, record in found if not isinstance(record, UnreadableError))
    first = next(whole, None)
    if not (isinstance(first, dict) and {"prompt", "answer"} <= set(first)):
        return []

    def pair(record: Any) -> tuple[str, str]:
        if (read := pair_of(record)) is None:
            raise UnreadableError(
                'expected {"prompt": "...", "answer": "..."} as on the first line, got '
                f"{json.dumps(record)[:80]}"
            )
        return read

    return readable(str(path), found, pair)


def draw_pairs(path: str | Path, samples: int, seed: int) -> list[tuple[str, str]]:
    """At most `samples` of `read_pairs`, drawn with `seed`: files are often sorted by task."""
    pairs = read_pairs(path)
    random.Random(seed).shuffle(pairs)
    return pairs[:samples]
