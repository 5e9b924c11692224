"""Texts in every accepted form; a file that cannot be used is named with the remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sere.calibration.corpus import Corpus, CorpusError, encoder, read_pairs, read_texts
from sere.models.loading import load_tokenizer


def encode(text: str) -> list[int]:
    return [ord(character) for character in text]


def corpus(texts: list[str], **settings: Any) -> Corpus:
    defaults = {"source": "file", "samples": 3, "length": 5, "seed": 0}
    return Corpus.from_texts(texts, encode, **{**defaults, **settings})


TEXTS = [f"text number {i}" for i in range(20)]


def test_paragraphs_of_a_text_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\nstill one\n\n\n\n  two ü  \n", "utf-8")
    assert read_texts(path) == ["one\nstill one", "two ü"]


def test_json_lines_of_every_kind(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    chat = {"messages": [{"role": "user", "content": "hi"}, {"role": "bot", "content": "yes"}]}
    records = [{"text": "a", "id": 1}, "b", {"content": "c"}, {"prompt": "d"}, chat]
    path.write_text("\n\n".join(json.dumps(record) for record in records))
    assert read_texts(path) == ["a", "b", "c", "d", chat["messages"]]


CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
STRICT = "{{ raise_exception('a system message must come first') }}"


def test_a_chat_is_read_as_it_is_served(model_dir: Path) -> None:
    """Through the template of a tokenizer that has one; else line by line."""
    tokenizer: Any = load_tokenizer(str(model_dir))
    encode = encoder(tokenizer)
    assert encode(CHAT) == encode("hi\nyes")
    tokenizer.chat_template = TEMPLATE
    assert encode(CHAT) == encode("<user>hi<assistant>yes")
    assert encode("hi\nyes") != encode(CHAT)
    tokenizer.chat_template = STRICT
    with pytest.raises(CorpusError, match=r"does not take .*hi.*: a system message must come"):
        encode(CHAT)


def test_chats_without_a_word_are_no_texts() -> None:
    empty = [{"role": "user", "content": ""}, {"role": "assistant", "content": None}]
    with pytest.raises(CorpusError, match="no text in it"):
        Corpus.from_texts([empty], lambda _: [1], source="file", samples=1, length=5, seed=0)


def test_rows_of_a_parquet_file(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"id": [1, 2], "text": ["a", "b"]}), tmp_path / "a.parquet")
    assert read_texts(tmp_path / "a.parquet") == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.jsonl", b'{"text": "ok"}\n\n{"text": \n', r"a\.jsonl:3: not JSON"),
        ("a.jsonl", b'{"text": "ok"}\n{"title": "t", "n": 1}\n', r"a\.jsonl:2: no text.*title, n"),
        ("a.jsonl", b'{"messages": ["hi"]}\n', r"a\.jsonl:1: no text field"),
        ("a.jsonl", b"[1]\n", r"a\.jsonl:1: no text field.*has list"),
        ("a.txt", b"caf\xe9", r"a\.txt: not UTF-8"),
        ("a.csv", b"text\nhello\n", r"a\.csv: expected one of \.txt, \.jsonl, \.parquet"),
        ("a.parquet", b"not parquet", "(?i)parquet"),
    ],
)
def test_a_file_that_cannot_be_read(
    tmp_path: Path, name: str, content: bytes, complaint: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=complaint):
        read_texts(tmp_path / name)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"absent\.txt: no such file"):
        read_texts(tmp_path / "absent.txt")


@pytest.mark.parametrize("texts", [[], ["", " \n"]])
def test_an_empty_corpus_is_refused(texts: list[str]) -> None:
    with pytest.raises(CorpusError, match="file: no text in it"):
        corpus(texts, allow_fewer=True)


def test_texts_without_a_token_are_refused() -> None:
    with pytest.raises(CorpusError, match="file: the tokenizer makes no token"):
        Corpus.from_texts(TEXTS, lambda _: [], source="file", samples=3, length=5, seed=0)


def test_fewer_texts_than_asked_for_only_if_allowed() -> None:
    with pytest.raises(CorpusError, match=r"2 texts, but 3 .*--samples 2, --allow-fewer"):
        corpus(TEXTS[:2])
    assert len(corpus(TEXTS[:2], allow_fewer=True).sequences) == 2


def test_sequences_are_drawn_without_repeats_and_cut() -> None:
    drawn = corpus(TEXTS, samples=20, length=14)
    assert sorted(drawn.sequences) == sorted(encode(text)[:14] for text in TEXTS)
    assert corpus(TEXTS, length=5).sequences == [encode("text ")] * 3
    assert corpus(TEXTS, length=5).tokens == 15


def test_the_seed_decides_and_the_hash_tells() -> None:
    one, again, other = (corpus(TEXTS, seed=seed, length=99) for seed in (1, 1, 2))
    assert one.sequences == again.sequences
    assert one.hash == again.hash
    assert one.sequences != other.sequences
    assert one.hash != other.hash
    assert corpus(TEXTS, seed=1, length=98).hash == one.hash  # no text was long enough to be cut
    assert corpus(TEXTS, seed=1, length=9).hash != one.hash


@pytest.mark.parametrize(
    "second",
    ['{"prompt": "a"}', '{"prompt": "a", "answer": ""}', '{"prompt": 5, "answer": "b"}', "torn {"],
    ids=str,
)
def test_a_pair_that_is_none_is_named_by_its_line(second: str, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(f'{{"prompt": "1+1", "answer": "2"}}\n\n{second}\n')
    with pytest.raises(CorpusError, match=r"pairs\.jsonl:3: expected .*prompt.*, got"):
        read_pairs(path)
    path.write_text('{"text": "no pair"}\n')
    assert read_pairs(path) == []
