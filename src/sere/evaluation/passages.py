"""What is decoded to judge a policy by: prompts with answers, or texts, unseen in calibration."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict

from sere import demo_model
from sere.demo_model.tasks import examples
from sere.evaluation.decoding import Passage
from sere.evaluation.quality import EvaluationError
from sere.models.loading import load_tokenizer
from sere.results.provenance import said
from sere.table import Table
from sere.text.corpus import (
    Corpus,
    draw_pairs,
    encoder,
    file_hash,
    read_texts,
    text_hash,
)

SEARCHED = "searched_on"
"""In a table's provenance: `search_hashes` of what `sere tune` searched on."""


def load_passages(
    model_name: str,
    folder: str,
    data: str | None,
    *,
    samples: int,
    prompt: int,
    length: int,
    seed: int,
) -> list[Passage]:
    """What to decode: held-out tasks of the demo model; or a file's {"prompt", "answer"} lines; or
    its texts, `prompt` tokens each to begin with and at most `length` to be decoded. Drawn with
    `seed`; what is drawn twice counts once."""
    tokenizer = load_tokenizer(folder)
    if data is None:
        if model_name != demo_model.NAME:
            raise EvaluationError(
                "--data is needed: text to measure on, not what you calibrated on"
            )
        pairs = [(e.prompt, e.answer) for e in examples(samples, seed=seed, split="held_out")]
    else:
        pairs = draw_pairs(data, samples, seed)
    if pairs:
        encode = encoder(tokenizer)
        answers = tokenizer([answer for _, answer in pairs], add_special_tokens=False).input_ids
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        encoded = [
            (encode(question), answer + end)
            for (question, _), answer in zip(pairs, answers, strict=True)
        ]
        return _distinct([Passage(q + a, len(q)) for q, a in encoded if q and len(a) > 1])
    assert data is not None
    corpus = Corpus.from_texts(
        read_texts(data),
        encoder(tokenizer, prompt + length),
        source=data,
        samples=samples,
        length=prompt + length,
        seed=seed,
        allow_fewer=True,
    )
    long_enough = [tokens for tokens in corpus.sequences if len(tokens) > prompt + 1]
    if not long_enough:
        raise EvaluationError(f"{data}: no text has more than {prompt + 1} tokens: lower --prompt")
    return _distinct([Passage(tokens, prompt) for tokens in long_enough])


def _distinct(passages: Sequence[Passage]) -> list[Passage]:
    """Without repeats: what is searched on and what is checked never share a passage."""
    return list({(p.start, *p.tokens): p for p in passages}.values())


def passages_hash(passages: Sequence[Passage]) -> str:
    """SHA-256 of all tokens."""
    return hashlib.sha256(json.dumps([asdict(p) for p in passages]).encode()).hexdigest()


def search_hashes(passages: Sequence[Passage]) -> list[str]:
    """What a table keeps of the passages that its policy was searched on: 8 bytes of each."""
    return [passages_hash([passage])[:16] for passage in passages]


def searched_on(table: Table, passages: Sequence[Passage]) -> int:
    """How many of these passages the table's policy was searched on."""
    known = set(table.provenance.get(SEARCHED) or ())
    return sum(digest in known for digest in search_hashes(passages)) if known else 0


def say_if_seen(table: Table, data: str | None) -> list[str]:
    """Warn of text that the table was calibrated on, by its file's or its own hash."""
    known = set(table.provenance.get("text_hashes") or ())
    if data is None or not known:
        return []
    if file_hash(data) == table.provenance.get("file_hash"):
        found = f"{data} is the file that the table was calibrated on"
    else:
        texts = read_texts(data)
        again = sum(text_hash(text) in known for text in texts)
        if not again:
            return []
        found = f"{again:,} of the {len(texts):,} texts in {data} are among the calibration's"
    return said(f"{found}: unseen text may do worse; give other text of the kind")
