"""Pieces of texts that nobody has read yet: what a setting is tried on."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import chain, islice, zip_longest

from sere.text.corpus import Text, text_hash
from sere.text.records import readable
from sere.text.texts import plain

_TEXTS = 512  # that are tokenized, at most


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
) -> tuple[list[list[int]], int]:
    """At most `count` pieces of `length` tokens, unread ones first, of as many texts as there are;
    and how many of them are unread.

    read: `text_hash` of the texts of which somebody has read the first `cut` tokens.
    """
    drawn = [text for text in texts if plain(text).strip()]
    random.Random(seed).shuffle(drawn)

    def encoded(text: Text) -> tuple[list[int], int]:
        return encode(text), cut if text_hash(text) in read else 0

    given = ((source, text) for text in drawn[:_TEXTS])
    tokens = readable(source, given, encoded)
    unread = list(islice(_in_turn([found[start:] for found, start in tokens], length), count))
    known = islice(_in_turn([found[:start] for found, start in tokens], length), count)
    return list(islice(chain(unread, known), count)), len(unread)


def _in_turn(sequences: Sequence[list[int]], length: int) -> Iterator[list[int]]:
    """The first piece of each sequence, then the second of those that have one, and so on."""
    split = (
        [tokens[at : at + length] for at in range(0, len(tokens) - length + 1, length)]
        for tokens in sequences
    )
    for turn in zip_longest(*split):
        yield from (piece for piece in turn if piece is not None)
