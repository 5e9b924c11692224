"""What an engine's report comes to: whether anything is gained and lost, told from chance or not,
and whether the text was one for this model."""

from __future__ import annotations

from typing import Any

import pytest

from sere.serving.verdict import in_words, warnings

Speed = tuple[float, float, float]


def size(requests: int, speed: Speed, loss: list[float], stock: float = 2.0) -> dict[str, Any]:
    own = {"loss": loss, "stock_loss": [stock] * len(loss), "vocabulary": 1000}
    return {"requests": requests, "speed": list(speed), **own}


def report(*speeds: Speed, loss: tuple[float, ...] = (0.05, 0.07), stock: float = 2.0) -> Any:
    return {"sizes": [size(8 * 4**i, s, [*loss], stock) for i, s in enumerate(speeds)]}


def test_speed_is_told_by_size() -> None:
    made = report((1.35, 1.39, 1.46), (1.01, 1.02, 1.03), (0.9, 0.95, 0.99), (0.98, 1.2, 1.4))
    assert in_words(made)[0] == (
        "speed gained: 1.39x at 8 requests; none to speak of (1.01-1.03) at 32 requests; "
        "slower, 0.95x, at 128 requests; none to speak of (0.98-1.40) at 512 requests"
    )
    assert not warnings(made)


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        ((0.05, 0.07), "+6.2% (+4.1% to +8.3%) at 8 requests"),
        ((-0.07, -0.05), "-5.8% (-7.7% to -3.9%) at 8 requests"),
        ((-0.05, 0.01), "no change told from chance (±6.2%) at 8 requests"),
        ((0.0, 0.0), "no change told from chance (±0.0%) at 8 requests"),
    ],
)
def test_a_loss_within_its_error_is_none_and_no_gain_either(
    loss: tuple[float, ...], words: str
) -> None:
    assert in_words(report((2, 2, 2), loss=loss))[1] == f"perplexity (stock's is 7.39): {words}"


@pytest.mark.parametrize(
    ("speeds", "warning"),
    [
        ([(0.99, 1.01, 1.02), (0.97, 0.99, 1.01)], "NO SPEED IS GAINED HERE, 1.01x at best"),
        ([(0.98, 1.3, 1.4)], "NO SPEED IS GAINED HERE, 1.30x at best"),  # not at every turn
        ([(0.8, 0.9, 0.95), (0.6, 0.7, 0.8)], "MAKES DECODING SLOWER HERE, 0.90x at best"),
        ([(1.04, 1.06, 1.07), (0.6, 0.7, 0.8)], None),
    ],
)
def test_where_no_size_is_clearly_faster_a_warning_says_so(
    speeds: list[Speed], warning: str | None
) -> None:
    said = warnings(report(*speeds))
    assert len(said) == (warning is not None)
    assert not warning or warning in said[0]


def test_a_text_that_the_model_cannot_read_is_told() -> None:
    """A model of random weights, or another's tokenizer: ln 1000 is 6.9."""
    (said,) = warnings(report((2, 2, 2), stock=6.9))
    assert "CANNOT READ THIS TEXT: by stock routing it loses 6.9 nats" in said
    assert "guess among all tokens loses 6.9" in said
    assert not warnings(report((2, 2, 2), stock=5.0))
