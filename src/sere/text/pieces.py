"""Pieces of texts that nobody has read yet: what a setting is tried on."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice, zip_longest

from sere.text.corpus import Text, text_hash
from sere.text.records import readable
from sere.text.texts import plain

_TEXTS = 512  # that are tokenized, at most


@dataclass(frozen=True)
class Pieces:
    """Token sequences in this order: `fresh` of texts that nobody has read, `later` from further on
    in texts of which somebody has read the beginning, and then what somebody has read."""

    tokens: list[list[int]]
    fresh: int
    later: int

    def first(self, count: int) -> Pieces:
        """No more of them than that."""
        fresh = min(self.fresh, count)
        return Pieces(self.tokens[:count], fresh, min(self.later, count - fresh))

    @property
    def read(self) -> int:
        """How many of them somebody has read."""
        return len(self.tokens) - self.fresh - self.later


def pieces(
    texts: Sequence[Text],
    encode: Callable[[Text], list[int]],
    *,
    source: str,
    read: Collection[str],
    cut: int,
    length: int,
    count: int,
    seed: int,
) -> Pieces:
    """At most `count` pieces of `length` tokens, of as many texts as there are.

    read: `text_hash` of the texts of which somebody has read the first `cut` tokens.
    """
    drawn = [text for text in texts if plain(text).strip()]
    random.Random(seed).shuffle(drawn)

    def encoded(text: Text) -> tuple[list[int], bool]:
        return encode(text), text_hash(text) in read

    tokens = readable(source, ((source, text) for text in drawn[:_TEXTS]), encoded)
    kinds = (
        [found for found, known in tokens if not known],
        [found[cut:] for found, known in tokens if known],
        [found[:cut] for found, known in tokens if known],
    )
    fresh, later, known = (list(islice(_in_turn(kind, length), count)) for kind in kinds)
    return Pieces([*chain(fresh, later, known)], len(fresh), len(later)).first(count)


def _in_turn(sequences: Sequence[list[int]], length: int) -> Iterator[list[int]]:
    """The first piece of each sequence, then the second of those that have one, and so on."""
    split = (
        [tokens[at : at + length] for at in range(0, len(tokens) - length + 1, length)]
        for tokens in sequences
    )
    for turn in zip_longest(*split):
        yield from (piece for piece in turn if piece is not None)
