"""Ten families of short, exactly checkable tasks: the demo model's training data and test bed.

Every prompt is one line that ends in a colon; the answer is what follows it. Arithmetic answers
carry their working (digits from the lowest up, then the result), because a small model can write
down what it cannot guess, and because longer answers exercise decoding.

    add 347+586:            ->  "3390>0933"     lowest digit first, then as usual
    run A=3,A+4>B,B-2>C:    ->  "A:3+4,B=7,B:7-2,C=5"
    count abbab:            ->  "a1b1b2a2b3"    each letter's first, second, ... occurrence
    close ([{}<(:           ->  ")>])"          what closes the open brackets
"""

from __future__ import annotations

import hashlib
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

Split = Literal["train", "held_out"]

END_OF_TEXT = "<|endoftext|>"
ALPHABET = "\n" + "".join(chr(code) for code in range(32, 127))
"""Every character the demo tokenizer knows: printable ASCII and the newline."""

HELD_OUT_ONE_IN = 10
BRACKETS = {"(": ")", "[": "]", "{": "}", "<": ">"}


@dataclass(frozen=True)
class Example:
    """One task: the model reads ``prompt`` and must write ``answer``, then stop."""

    family: str
    prompt: str
    answer: str


def _digits_then_number(value: int, width: int) -> str:
    """Write ``value`` lowest digit first, the order carries travel in, then as usual."""
    digits = f"{value:0{width}d}"
    return f"{digits[::-1]}>{digits}"


def _letters(rng: Random, shortest: int, longest: int) -> str:
    return "".join(rng.choices(string.ascii_lowercase, k=rng.randint(shortest, longest)))


def _add(rng: Random) -> tuple[str, str]:
    a, b = rng.randint(100, 999), rng.randint(100, 999)
    return f"add {a}+{b}:", _digits_then_number(a + b, 4)


def _subtract(rng: Random) -> tuple[str, str]:
    b, a = sorted((rng.randint(100, 999), rng.randint(100, 999)))
    return f"sub {a}-{b}:", _digits_then_number(a - b, 3)


def _multiply(rng: Random) -> tuple[str, str]:
    """Three digits times one: each partial product with its carry, then the product."""
    a, b = rng.randint(100, 999), rng.randint(2, 9)
    partials, carry = [], 0
    for digit in reversed(str(a)):
        partial = int(digit) * b + carry
        carry = partial // 10
        partials.append(f"{partial:02d}")
    return f"mul {a}*{b}:", f"{''.join(partials)}>{a * b:04d}"


def _assign(rng: Random) -> tuple[str, str]:
    """A chain of assignments: recall each operand, compute, store the result under its name."""
    names = rng.sample(string.ascii_uppercase, 3)
    values = {names[0]: rng.randint(0, 9)}
    prompt, answer = f"run {names[0]}={values[names[0]]}", []
    for name in names[1:]:
        source, amount = rng.choice(list(values)), rng.randint(1, 9)
        # Results stay in 0..18, so that every answer is one or two digits and never negative.
        adds = values[source] <= 9 and (values[source] < amount or rng.random() < 0.5)
        sign = "+" if adds else "-"
        values[name] = values[source] + (amount if adds else -amount)
        prompt += f",{source}{sign}{amount}>{name}"
        answer.append(f"{source}:{values[source]}{sign}{amount},{name}={values[name]}")
    return f"{prompt}:", ",".join(answer)


def _sort(rng: Random) -> tuple[str, str]:
    letters = rng.sample(string.ascii_lowercase, rng.randint(7, 11))
    return f"sort {''.join(letters)}:", "".join(sorted(letters))


def _reverse(rng: Random) -> tuple[str, str]:
    word = _letters(rng, 7, 11)
    return f"rev {word}:", word[::-1]


def _count(rng: Random) -> tuple[str, str]:
    """Count each letter along the way: its first, second, third occurrence."""
    kinds = rng.sample(string.ascii_lowercase, rng.randint(2, 4))
    letters = rng.choices(kinds, k=rng.randint(5, 8))
    seen, answer = Counter[str](), ""
    for letter in letters:
        seen[letter] += 1
        answer += f"{letter}{seen[letter]}"
    return f"count {''.join(letters)}:", answer


def _brackets(rng: Random) -> tuple[str, str]:
    """Close what is still open, innermost first; four to seven brackets are."""
    depth, text, open_brackets = rng.randint(4, 7), "", list[str]()
    while len(open_brackets) < depth:
        if open_brackets and rng.random() < 0.3:
            text += BRACKETS[open_brackets.pop()]
        else:
            open_brackets.append(rng.choice(list(BRACKETS)))
            text += open_brackets[-1]
    return f"close {text}:", "".join(BRACKETS[bracket] for bracket in reversed(open_brackets))


def _lookup(rng: Random) -> tuple[str, str]:
    keys = rng.sample(string.ascii_uppercase, rng.randint(3, 4))
    table = {key: _letters(rng, 5, 7) for key in keys}
    wanted = rng.choice(keys)
    pairs = ",".join(f"{key}={value}" for key, value in table.items())
    return f"get {pairs};{wanted}:", table[wanted]


def _shift(rng: Random) -> tuple[str, str]:
    """Caesar's cipher with a small key."""
    key, word = rng.randint(1, 5), _letters(rng, 6, 10)
    letters = string.ascii_lowercase
    shifted = word.translate(str.maketrans(letters, letters[key:] + letters[:key]))
    return f"shift{key} {word}:", shifted


_GENERATORS: dict[str, Callable[[Random], tuple[str, str]]] = {
    "add": _add,
    "subtract": _subtract,
    "multiply": _multiply,
    "assign": _assign,
    "sort": _sort,
    "reverse": _reverse,
    "count": _count,
    "brackets": _brackets,
    "lookup": _lookup,
    "shift": _shift,
}

FAMILIES: tuple[str, ...] = tuple(_GENERATORS)


def split_of(prompt: str) -> Split:
    """Say which split ``prompt`` belongs to, from a hash of its text alone.

    A prompt's split never depends on seeds or on order, so nothing held out can be trained on.
    """
    digest = hashlib.sha256(prompt.encode()).digest()
    return "held_out" if digest[0] % HELD_OUT_ONE_IN == 0 else "train"


def examples(
    count: int, *, seed: int, split: Split = "train", families: Sequence[str] = FAMILIES
) -> list[Example]:
    """Draw ``count`` examples, the families taking turns; equal arguments give equal lists.

    Examples may repeat: some families hold only some thousand different prompts.
    """
    rng = Random(f"{split}/{seed}")
    return [_draw(families[i % len(families)], split, rng) for i in range(count)]


def _draw(family: str, split: Split, rng: Random) -> Example:
    while True:
        prompt, answer = _GENERATORS[family](rng)
        if split_of(prompt) == split:
            return Example(family, prompt, answer)


def is_correct(example: Example, completion: str) -> bool:
    """Whether ``completion``, up to the end of the text or of the line, is exactly the answer."""
    return completion.split(END_OF_TEXT)[0].split("\n")[0] == example.answer
