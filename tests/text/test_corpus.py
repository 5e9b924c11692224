"""Texts in every accepted form; a file that cannot be used is named with the remedy."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from sere.models.loading import load_tokenizer
from sere.text.corpus import (
    Corpus,
    CorpusError,
    encoder,
    read_pairs,
    read_texts,
    text_hash,
)


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


def test_a_chat_that_is_joined_is_said(model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    encode = encoder(load_tokenizer(str(model_dir)))
    for text in ("plain", CHAT, CHAT):
        encode(text)
    assert capsys.readouterr().err.count("no chat template: chats are joined") == 1


USER, SAID = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}
CALL = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
CALLED = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
PARTS = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ("a text", "a text"),
        ({"text": "a", "n": 1}, "a"),
        ({"content": "a"}, "a"),
        ({"prompt": "a"}, "a"),
        ({"prompt": "a", "completion": "b"}, "ab"),
        ({"prompt": "a", "answer": "b"}, "ab"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "ab"),
        ({"question": "a", "answer": "b"}, "a\nb"),
        ({"instruction": "a", "input": "", "output": "b"}, "a\nb"),
        ({"instruction": "a", "input": "c", "output": "b"}, "a\nc\nb"),
        ({"messages": [USER, SAID], "tools": []}, [USER, SAID]),
        ({"messages": json.dumps([USER])}, [USER]),
        ({"messages": [{"role": "user", "content": PARTS}]}, [USER]),
        (
            {"messages": [{"role": "assistant", "content": None, "tool_calls": [CALL]}]},
            [{"role": "assistant", "content": "", "tool_calls": [CALLED]}],
        ),
        (
            {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]},
            [USER, SAID],
        ),
        ({"conversations": [USER, SAID]}, [USER, SAID]),
        ({"prompt": [USER]}, [USER]),
        ({"prompt": [USER], "completion": [SAID]}, [USER, SAID]),
        ({"prompt": [USER], "chosen": [SAID], "rejected": []}, [USER, SAID]),
        ({"chosen": [USER, SAID], "rejected": []}, [USER, SAID]),
        ({"custom_id": "1", "method": "POST", "body": {"messages": [USER]}}, [USER]),
        ({"custom_id": "1", "body": {"model": "m", "prompt": "a"}}, "a"),
        ({"custom_id": "1", "body": {"input": "a"}}, "a"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_every_shape_of_a_record(record: Any, expected: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(record))
    assert read_texts(path) == [expected]


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85"])
def test_a_line_ends_at_a_newline_alone(mark: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    records = [
        {"prompt": f"one{mark}two", "answer": f"{mark}three"},
        {"prompt": "a", "answer": "b"},
    ]
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    path.write_bytes(("\ufeff" + "\r\n\r\n".join(lines)).encode())
    assert read_pairs(path) == [(f"one{mark}two", f"{mark}three"), ("a", "b")]
    assert read_texts(path) == [f"one{mark}two{mark}three", "ab"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.md", b"one\r\n\r\ntwo"),
        ("a.txt", b"\xef\xbb\xbfone\n \t\ntwo\n"),
        ("a.TXT", b"one\n\n\n\ntwo"),
        ("a.txt.gz", gzip.compress(b"one\n\ntwo", mtime=0)),
        ("a.jsonl.gz", gzip.compress(b'"one"\n"two"', mtime=0)),
        ("a.json", b'["one", {"text": "two"}]'),
        ("a.json", b'"one"\n{"text": "two"}\n'),
        ("a.jsonl", b'{"text": "one", "id": ' + b"9" * 5000 + b'}\n"two"'),
    ],
)
def test_every_kind_of_file(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert read_texts(tmp_path / name) == ["one", "two"]


def test_few_damaged_lines_are_skipped_and_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.jsonl"
    good = [json.dumps({"prompt": str(i), "answer": "x"}).encode() for i in range(298)]
    path.write_bytes(b"\n".join([*good[:100], b'{"prompt": "caf\xe9"}', b"{", *good[100:]]))
    assert len(read_pairs(path)) == 298
    assert len(read_texts(path)) == 298
    told = capsys.readouterr().err
    assert told.count(f"{path}: skipped 2 of 300 lines: {path}:101: not UTF-8") == 2
    path.write_bytes(b"\n".join([*good, b"{", b"{", b"{", b"{"]))
    with pytest.raises(CorpusError, match=r"a\.jsonl:299: not JSON.*and 3 more of 302"):
        read_texts(path)


def test_few_chats_that_the_template_refuses_are_skipped(
    model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer: Any = load_tokenizer(str(model_dir))
    tokenizer.chat_template = "{% for m in messages %}{{ m.content + m.role }}{% endfor %}"
    odd = [{"role": None, "content": "hi"}]
    settings = {"source": "file", "samples": 200, "length": 9, "seed": 0}
    read = Corpus.from_texts([*[CHAT] * 199, odd], encoder(tokenizer), **settings)
    assert len(read.sequences) == len(read.text_hashes) == 199
    assert "skipped 1 of 200 lines" in capsys.readouterr().err
    with pytest.raises(CorpusError, match="does not take"):
        Corpus.from_texts([*[CHAT] * 198, odd, odd, odd, odd], encoder(tokenizer), **settings)


def test_of_a_long_text_only_what_is_kept_is_tokenized(model_dir: Path) -> None:
    tokenizer: Any = load_tokenizer(str(model_dir))
    seen: list[int] = []

    def counting(text: str, **more: Any) -> Any:
        seen.append(len(text))
        return tokenizer(text, **more)

    counting.chat_template = None  # type: ignore[attr-defined]
    text = "a b " * 10**6
    assert encoder(counting, 8)(text)[:8] == encoder(tokenizer)(text[:100])[:8]
    assert max(seen) < 1000


def test_texts_are_known_again_by_their_hashes() -> None:
    one = corpus(TEXTS, samples=3)
    assert set(one.text_hashes) <= {text_hash(text) for text in TEXTS}
    assert len(one.text_hashes) == 3
    assert one.first(2).text_hashes == one.text_hashes[:2]
    assert text_hash(CHAT) != text_hash("hi\nyes")


def test_chats_without_a_word_are_no_texts() -> None:
    empty = [{"role": "user", "content": ""}, {"role": "assistant", "content": None}]
    with pytest.raises(CorpusError, match="no text in it"):
        Corpus.from_texts([empty], lambda _: [1], source="file", samples=1, length=5, seed=0)


def test_rows_of_a_parquet_file(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"id": [1, 2], "text": ["a", "b"]}), tmp_path / "a.parquet")
    assert read_texts(tmp_path / "a.parquet") == ["a", "b"]


SPOILT = gzip.compress(b'"one"\n' * 99, mtime=0)
SPOILT = SPOILT[:10] + b"\x07" * 9 + SPOILT[19:]  # within what is packed, not in the header


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.jsonl", b'{"text": "ok"}\n\n{"text": \n', r"a\.jsonl:3: not JSON"),
        ("a.jsonl", b'{"text": "ok"}\n{"title": "t", "n": 1}\n', r"a\.jsonl:2: no text.*title, n"),
        ("a.jsonl", b'{"messages": ["hi"]}\n', r"a\.jsonl:1: no text field"),
        ("a.jsonl", b"[1]\n", r"a\.jsonl:1: no text field.*has list"),
        ("a.txt", b"one\n\ncaf\xe9", r"a\.txt:3: not UTF-8"),
        ("a.jsonl", "{}".encode("utf-16"), r"a\.jsonl: UTF-16 text: save it as UTF-8"),
        ("a.jsonl.gz", b"\x1f\x8b torn", r"a\.jsonl\.gz: a torn or foreign gzip file"),
        ("b.jsonl.gz", SPOILT, r"b\.jsonl\.gz: a torn or foreign gzip file"),
        ("a.csv", b"text\nhello\n", r"a\.csv: expected one of .*\.jsonl.*\.parquet, not '\.csv'"),
        ("a", b"text", r"a: expected one of .*, not ''"),
        ("a.json", b'[{"text": "a"}', r"a\.json: not JSON"),
        ("a.jsonl", b'{"text": null}', r"a\.jsonl:1: its text is null"),
        ("a.jsonl", b'{"text": 5}', r"a\.jsonl:1: its text is a int, not a string"),
        ("a.jsonl", b'{"text": "\\ud83d"}', r"a\.jsonl:1: .*half a surrogate"),
        ("a.jsonl", b'{"text": "a\x07"}', r"a\.jsonl:1: not JSON .*control character"),
        ("a.jsonl", b'{"text": ' + b"[" * 10**5, r"a\.jsonl:1: JSON that is nested too deeply"),
        (
            "a.jsonl",
            b'{"messages": [{"content": "hi"}]}',
            r":1: a message without a role; has content",
        ),
        ("a.jsonl", b'{"messages": [{"role": "user", "content": 3}]}', r":1: .*content is a int"),
        (
            "a.jsonl",
            b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
            r":1: a message with a part of type image_url, which is not text",
        ),
        (
            "a.jsonl",
            b'{"conversations": [{"from": "me", "value": "a"}]}',
            r":1: a message from 'me'",
        ),
        ("a.parquet", b"not parquet", r"a\.parquet: not a whole parquet file"),
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
    with pytest.raises(CorpusError, match=r"2 texts, but 3 .*ask for 2 .*--allow-fewer"):
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
    with pytest.raises(CorpusError, match=r"pairs\.jsonl:3: (expected .*prompt.*, got|not JSON)"):
        read_pairs(path)
    path.write_text('{"text": "no pair"}\n')
    assert read_pairs(path) == []


def test_a_text_that_is_mostly_repeats_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    corpus(["the same"] * 9 + ["another"], samples=10)
    assert "10 texts were drawn and 2 of them are distinct" in capsys.readouterr().err
    corpus(TEXTS + TEXTS, samples=40)
    assert not capsys.readouterr().err
