"""Ten families of short, exactly checkable tasks: the demo model's training data and test bed.

Inputs vary in length: a small model learns the long ones by way of the short ones.

Every prompt is one line that ends in a colon; the answer is what follows it. Arithmetic answers
carry their working (digits from the lowest up, then the result), because a small model can write
down what it cannot guess, and because longer answers exercise decoding.

    add 3475+5860:          ->  "53390>09335"       lowest digit first, then as usual
    chain 7+5*3-8:          ->  "+5=2*3=6-8=8"      step by step, modulo ten
    get Abcd,Bxyz;B:        ->  "Bxyz"              the entry under that key
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


def _number(rng: Random, digits: int) -> int:
    return rng.randint(10 ** (digits - 1), 10**digits - 1)


def _letters(rng: Random, shortest: int, longest: int) -> str:
    return "".join(rng.choices(string.ascii_lowercase, k=rng.randint(shortest, longest)))


def _add(rng: Random) -> tuple[str, str]:
    digits = rng.randint(2, 4)
    a, b = _number(rng, digits), _number(rng, digits)
    return f"add {a}+{b}:", _digits_then_number(a + b, digits + 1)


def _subtract(rng: Random) -> tuple[str, str]:
    digits = rng.randint(2, 4)
    b, a = sorted((_number(rng, digits), _number(rng, digits)))
    return f"sub {a}-{b}:", _digits_then_number(a - b, digits)


def _multiply(rng: Random) -> tuple[str, str]:
    """Several digits times one: each partial product with its carry, then the product."""
    digits = rng.randint(2, 4)
    a, b = _number(rng, digits), rng.randint(2, 9)
    partials, carry = [], 0
    for digit in reversed(str(a)):
        partial = int(digit) * b + carry
        carry = partial // 10
        partials.append(f"{partial:02d}")
    return f"mul {a}*{b}:", f"{''.join(partials)}>{a * b:0{digits + 1}d}"


def _chain(rng: Random) -> tuple[str, str]:
    """Sums, differences and products modulo ten, one after another."""
    value = rng.randint(0, 9)
    prompt, answer = f"chain {value}", ""
    for _ in range(rng.randint(3, 5)):
        sign, amount = rng.choice("+-*"), rng.randint(2, 9)
        value = {"+": value + amount, "-": value - amount, "*": value * amount}[sign] % 10
        prompt += f"{sign}{amount}"
        answer += f"{sign}{amount}={value}"
    return f"{prompt}:", answer


def _sort(rng: Random) -> tuple[str, str]:
    letters = rng.sample(string.ascii_lowercase, rng.randint(8, 13))
    return f"sort {''.join(letters)}:", "".join(sorted(letters))


def _reverse(rng: Random) -> tuple[str, str]:
    word = _letters(rng, 8, 14)
    return f"rev {word}:", word[::-1]


def _count(rng: Random) -> tuple[str, str]:
    """Count each letter along the way: its first, second, third occurrence."""
    kinds = rng.sample(string.ascii_lowercase, rng.randint(2, 5))
    letters = rng.choices(kinds, k=rng.randint(4, 11))
    seen, answer = Counter[str](), ""
    for letter in letters:
        seen[letter] += 1
        answer += f"{letter}{seen[letter]}"
    return f"count {''.join(letters)}:", answer


def _brackets(rng: Random) -> tuple[str, str]:
    """Close what is still open, innermost first; three to nine brackets are."""
    depth, text, open_brackets = rng.randint(3, 9), "", list[str]()
    while len(open_brackets) < depth:
        if open_brackets and rng.random() < 0.3:
            text += BRACKETS[open_brackets.pop()]
        else:
            open_brackets.append(rng.choice(list(BRACKETS)))
            text += open_brackets[-1]
    return f"close {text}:", "".join(BRACKETS[bracket] for bracket in reversed(open_brackets))


def _lookup(rng: Random) -> tuple[str, str]:
    keys = rng.sample(string.ascii_uppercase, rng.randint(2, 4))
    table = {key: _letters(rng, 3, 7) for key in keys}
    wanted = rng.choice(keys)
    entries = ",".join(f"{key}{value}" for key, value in table.items())
    return f"get {entries};{wanted}:", f"{wanted}{table[wanted]}"


def _shift(rng: Random) -> tuple[str, str]:
    """Caesar's cipher with a small key."""
    key, word = rng.randint(1, 9), _letters(rng, 7, 12)
    letters = string.ascii_lowercase
    shifted = word.translate(str.maketrans(letters, letters[key:] + letters[:key]))
    return f"shift{key} {word}:", shifted


_GENERATORS: dict[str, Callable[[Random], tuple[str, str]]] = {
    "add": _add,
    "subtract": _subtract,
    "multiply": _multiply,
    "chain": _chain,
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
