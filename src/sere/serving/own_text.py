"""The text that an engine reads for its own table: the user's, or the bundled one."""

from __future__ import annotations

from typing import Any

from sere.serving.auto import Auto
from sere.serving.reading import longest
from sere.serving.symbols import symbol
from sere.text.bundled import BUNDLED
from sere.text.corpus import Corpus, CorpusError, Text, encoder, read_texts


def obstacle_in_text(auto: Auto) -> str | None:
    """Why there is nothing to read, or None."""
    if auto.data is None:
        return None
    try:
        _texts(auto)
    except (CorpusError, OSError) as error:
        return f"sere cannot calibrate in this engine: {error}"
    return None


def corpus_for(config: Any, auto: Auto) -> Corpus:
    """As the engine's own tokenizer cuts it. Raises `CorpusError` or `OSError`."""
    length = min(auto.length, longest(config))
    encode = encoder(symbol("cached_tokenizer_from_config")(config.model_config), length)
    return Corpus.from_texts(
        _texts(auto),
        encode,
        source=str(auto.data) if auto.data else "the bundled text",
        samples=auto.samples,
        length=length,
        seed=auto.seed,
        allow_fewer=auto.allow_fewer,
    )


def _texts(auto: Auto) -> list[Text]:
    if found := read_texts(auto.data or BUNDLED):
        return found
    raise CorpusError(f"{auto.data}: no text in it")
