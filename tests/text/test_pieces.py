"""Pieces of texts to try a setting on: of as many texts as there are, and unread ones first."""

from __future__ import annotations

from typing import Any

from sere.text.corpus import text_hash
from sere.text.pieces import pieces

TEXTS = ["".join(chr(200 + 50 * i + place) for place in range(25)) for i in range(4)]
LONG = "".join(chr(1000 + place) for place in range(61))


def drawn(texts: list[str], *, read: tuple[str, ...] = (), **settings: Any) -> tuple[Any, int]:
    given = {"cut": 10, "length": 10, "count": 99, "seed": 0, **settings}
    hashes = [text_hash(text) for text in read]
    return pieces(texts, lambda text: list(map(ord, str(text))), source="", read=hashes, **given)


def starts(found: list[list[int]]) -> list[int]:
    return sorted(piece[0] for piece in found)


def test_what_is_too_short_for_a_piece_gives_none() -> None:
    assert drawn(["", "  ", "short"]) == ([], 0)
    found, unread = drawn(TEXTS)
    assert starts(found) == sorted(200 + 50 * i + at for i in range(4) for at in (0, 10))
    assert unread == 8 and {len(piece) for piece in found} == {10}


def test_every_text_has_its_turn_before_one_has_two() -> None:
    found, _ = drawn([*TEXTS, LONG], count=5)
    assert starts(found) == [200, 250, 300, 350, 1000]
    found, _ = drawn([*TEXTS, LONG])
    assert len(found) == 14


def test_what_was_read_comes_last_and_is_told() -> None:
    found, unread = drawn(TEXTS, read=(TEXTS[0], TEXTS[1]))
    assert unread == 6 and starts(found[:6]) == [210, 260, 300, 310, 350, 360]
    assert starts(found[6:]) == [200, 250]
    found, unread = drawn(TEXTS, read=tuple(TEXTS), count=6)
    assert unread == 4 and len(found) == 6


def test_the_draw_is_the_seeds() -> None:
    orders = {str(drawn(TEXTS, count=2, seed=seed)) for seed in (0, 0, 1, 2, 3)}
    assert len(orders) > 1 and str(drawn(TEXTS, count=2)) in orders
