"""Pieces of texts to try a setting on: of as many texts as there are, and unread ones first."""

from __future__ import annotations

from typing import Any

from sere.text.corpus import text_hash
from sere.text.pieces import Pieces, pieces

TEXTS = ["".join(chr(200 + 50 * i + place) for place in range(25)) for i in range(4)]
LONG = "".join(chr(1000 + place) for place in range(61))


def drawn(texts: list[str], *, read: tuple[str, ...] = (), **settings: Any) -> Pieces:
    given = {"cut": 10, "length": 10, "count": 99, "seed": 0, **settings}
    hashes = [text_hash(text) for text in read]
    return pieces(texts, lambda text: list(map(ord, str(text))), source="", read=hashes, **given)


def starts(found: list[list[int]]) -> list[int]:
    return sorted(piece[0] for piece in found)


def test_what_is_too_short_for_a_piece_gives_none() -> None:
    assert drawn(["", "  ", "short"]) == Pieces([], 0, 0)
    found = drawn(TEXTS)
    assert starts(found.tokens) == sorted(200 + 50 * i + at for i in range(4) for at in (0, 10))
    assert found.fresh == 8 and {len(piece) for piece in found.tokens} == {10}


def test_every_text_has_its_turn_before_one_has_two() -> None:
    found = drawn([*TEXTS, LONG], count=5)
    assert starts(found.tokens) == [200, 250, 300, 350, 1000]
    assert len(drawn([*TEXTS, LONG]).tokens) == 14


def test_unread_texts_come_first_then_what_follows_what_was_read_then_that() -> None:
    found = drawn(TEXTS, read=(TEXTS[0], TEXTS[1]))
    assert (found.fresh, found.later, found.read) == (4, 2, 2)
    assert starts(found.tokens[:4]) == [300, 310, 350, 360]
    assert starts(found.tokens[4:6]) == [210, 260] and starts(found.tokens[6:]) == [200, 250]
    for count, kinds in ((3, (3, 0, 0)), (5, (4, 1, 0)), (7, (4, 2, 1))):
        fewer = drawn(TEXTS, read=(TEXTS[0], TEXTS[1]), count=count)
        assert (fewer.fresh, fewer.later, fewer.read) == kinds
        assert fewer == found.first(count)
    found = drawn(TEXTS, read=tuple(TEXTS), count=6)
    assert (found.fresh, found.later, found.read) == (0, 4, 2)


def test_the_draw_is_the_seeds() -> None:
    orders = {str(drawn(TEXTS, count=2, seed=seed).tokens) for seed in (0, 0, 1, 2, 3)}
    assert len(orders) > 1 and str(drawn(TEXTS, count=2).tokens) in orders
