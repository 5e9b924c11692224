"""Documentation packages and Python sources become documents, a tokenizer and its tokens.

    python training/text_model/build_corpus.py SOURCES OUT

SOURCES holds the packages' contents, made by (Debian 12; 120 M tokens come of it in four minutes):

    mkdir debs SOURCES; cd debs
    apt-get download linux-doc-6.1 python3.11-doc postgresql-doc-15 git-doc perl-doc dict-gcide \
        debian-policy developers-reference manpages-dev bible-kjv-text dict-jargon apache2-doc \
        erlang-doc glibc-doc maxima-doc octave-doc python-django-doc nginx-doc postfix-doc \
        debian-reference-en debian-handbook libreoffice-help-en-us ghc-doc lilypond-doc-html \
        python-scipy-doc
    for d in *.deb; do dpkg -x $d ../SOURCES; done

Code is the running Python's own library and installed packages. One document in fifty of each kind
is held out: nothing is trained on it.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import html
import json
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY = 8192
LONGEST = 60_000  # characters of a document
PROSE = re.compile(r"\.(html|txt|pod)$|\.(rst|txt|\d\w*|html|pod)\.gz$")
UNSEEN = re.compile(r"<(script|style|head|nav|header|footer)\b.*?</\1>|<!--.*?-->", re.S | re.I)
BREAKS = re.compile(r"</?(p|div|li|tr|h\d|pre|dt|dd|br|table)\b[^>]*>", re.I)

Documents = dict[str, list[str]]


def text_of(path: Path) -> str:
    raw = path.read_bytes()
    if path.suffix == ".gz":
        raw = gzip.decompress(raw)
    text = raw.decode("utf-8", "ignore")
    if "<html" in text[:2000].lower() or path.suffix == ".html":
        text = BREAKS.sub("\n", UNSEEN.sub(" ", text))
        text = html.unescape(re.sub(r"<[^>]+>", "", text))
    text = re.sub(r" ?\n ?", "\n", re.sub(r"[ \t\xa0]+", " ", text))
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def sources(folder: Path) -> Iterator[tuple[str, str]]:
    """(kind, text) of every file, in a fixed order."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and PROSE.search(path.name) and "changelog" not in path.name:
            try:
                yield "prose", text_of(path)
            except (OSError, EOFError):
                continue
    for base in (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")):
        for path in sorted(Path(base).rglob("*.py")):
            if "/sere" in str(path):
                continue
            try:
                text = path.read_text("utf-8")
            except (OSError, UnicodeDecodeError):
                continue
            if 1500 < len(text) < LONGEST:
                yield "code", text


def documents(folder: Path) -> Documents:
    """Without paragraphs that have been there before; as much code as four fifths of the prose."""
    found: Documents = {"prose": [], "code": []}
    seen: set[bytes] = set()
    for kind, text in sources(folder):
        kept = []
        for paragraph in text.split("\n\n"):
            digest = hashlib.md5(paragraph.encode()).digest()[:8]
            if len(paragraph) <= 60 or digest not in seen:
                seen.add(digest)
                kept.append(paragraph)
        whole = "\n\n".join(kept)
        if len(whole) > 800 and sum(c.isascii() for c in whole) > 0.95 * len(whole):
            found[kind].append(whole[:LONGEST])
    shuffled = np.random.default_rng(0)
    for each in found.values():
        shuffled.shuffle(each)
    room = int(sum(map(len, found["prose"])) * 0.8)
    ends = np.cumsum([len(text) for text in found["code"]])
    found["code"] = found["code"][: int(np.searchsorted(ends, room, "right")) + 1]
    return found


def new_tokenizer(train: Documents) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sample = [text[:8000] for texts in train.values() for text in texts[:2500]]
    tokenizer.train_from_iterator(sample, trainer)
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sources", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    found, out = documents(arguments.sources), arguments.out
    held = {kind: texts[: len(texts) // 50] for kind, texts in found.items()}
    train = {kind: texts[len(texts) // 50 :] for kind, texts in found.items()}
    tokenizer = new_tokenizer(train)
    out.mkdir(exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    for kind, texts in held.items():
        lines = (json.dumps({"text": text[:6000]}) + "\n" for text in texts)
        (out / f"held_{kind}.jsonl").write_text("".join(lines))
    mixed = [text for texts in train.values() for text in texts]
    np.random.default_rng(1).shuffle(mixed)
    ids = []
    for start in range(0, len(mixed), 2000):
        for encoded in tokenizer.encode_batch(mixed[start : start + 2000]):
            ids.append(np.array([*encoded.ids, 0], dtype=np.uint16))
    tokens = np.concatenate(ids)
    tokens.tofile(out / "train.bin")
    print({kind: len(texts) for kind, texts in found.items()}, f"{len(tokens) / 1e6:.1f} M tokens")


if __name__ == "__main__":
    main()
