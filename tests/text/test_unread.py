"""A text is one for a model if it is much better at it than a guess."""

from __future__ import annotations

import math

import pytest

from sere.text.unread import unread


@pytest.mark.parametrize(("nats", "told"), [(2.0, False), (5.0, False), (6.0, True), (20.0, True)])
def test_nearly_a_guess_is_told(nats: float, told: bool) -> None:
    said = unread(nats, 1000)
    assert (said is not None) == told
    assert said is None or f"guess among all tokens loses {math.log(1000):.1f}" in said
