"""Whether a table was made from enough text."""

from __future__ import annotations

from collections.abc import Mapping

from sere.statistics import LayerStatistics

_UNSTABLE, _STABLE = 0.8, 0.9
_TOKENS_AN_EXPERT = 20


def first_with_too_little(layers: Mapping[int, LayerStatistics]) -> str | None:
    """What is to be said of a table: of the first layer that was made from too little, or None."""
    for index, layer in layers.items():
        if reason := too_little_text(layer):
            return f"layer {index} (`sere inspect` has all): {reason}"
    return None


def untrusted(layers: Mapping[int, LayerStatistics]) -> str | None:
    """Why a table is not to be trusted: it was made without text, or from too little; or None."""
    return _null_model(layers) or first_with_too_little(layers)


def _null_model(layers: Mapping[int, LayerStatistics]) -> str | None:
    if any(layer.tokens for layer in layers.values()):
        return None
    return (
        "made without any text: it knows nothing of what experts do, and is there to compare with"
    )


def in_words(layers: Mapping[int, LayerStatistics]) -> str:
    """How far a table is to be trusted, by the layer in which that is least."""
    tokens = f"{min(layer.tokens for layer in layers.values()):,} tokens"
    known = [layer.stability for layer in layers.values() if layer.stability is not None]
    if not known:
        return f"{tokens}; how far other text would agree with them is not known"
    return (
        f"{tokens}; other text of the kind would choose {min(known):.0%} of the replacements "
        f"again, in the layer where that is least (at least {_UNSTABLE:.0%} is enough)"
    )


def too_little_text(layer: LayerStatistics) -> str | None:
    """Why replacements are not to be trusted, and how many tokens it would take; or None.

    What other text would choose differently falls with the root of the tokens. Of very few the
    bootstrap knows nothing: then it is the bundled model's 20 an expert that give 90 %.
    """
    E = len(layer.load)
    if 0 < layer.tokens < _TOKENS_AN_EXPERT * E:
        few = "1 token is" if layer.tokens == 1 else f"{layer.tokens} tokens are"
        return (
            f"{few} too few: with about {_TOKENS_AN_EXPERT * E} of them other "
            f"text would choose {_STABLE:.0%} of the replacements again; calibrate on more"
        )
    if layer.stability is None or layer.stability >= _UNSTABLE:
        return None
    needed = layer.tokens * ((1 - layer.stability) / (1 - _STABLE)) ** 2
    return (
        f"unstable: other text would choose {1 - layer.stability:.0%} of the replacements "
        f"differently; calibrate on about {needed:,.0f} tokens and not {layer.tokens:,} for "
        f"{1 - _STABLE:.0%} at most"
    )
