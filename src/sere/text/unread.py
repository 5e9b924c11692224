"""Whether a model can read a text at all: where it cannot, nothing measured on it means much."""

from __future__ import annotations

import math

_SHARE = 0.8  # of the nats that a guess among all tokens takes


def unread(nats: float, vocabulary: int) -> str | None:
    """What is to be said where stock routing loses so many nats a token; or None.

    vocabulary: how many tokens may come next.
    """
    guess = math.log(vocabulary)
    if nats <= _SHARE * guess:
        return None
    return (
        f"THE MODEL CANNOT READ THIS TEXT: by stock routing it loses {nats:.1f} nats a token, and "
        f"to guess among all tokens loses {guess:.1f}; for text that it can read, neither the "
        "table nor what is said of quality holds (are its weights trained, its tokenizer its own?)"
    )
