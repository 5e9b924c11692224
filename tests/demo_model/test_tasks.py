"""The tasks: stable, balanced, split by construction, and right."""

from __future__ import annotations

import re
from collections import Counter
from importlib.resources import as_file, files
from typing import Any

import pytest

from sere.demo_model.tasks import (
    ALPHABET,
    END_OF_TEXT,
    FAMILIES,
    Example,
    Split,
    examples,
    is_correct,
    split_of,
)

SPLITS: tuple[Split, ...] = ("train", "held_out")


def of_family(family: str) -> list[Example]:
    return [e for split in SPLITS for e in examples(300, seed=5, split=split, families=[family])]


def arguments(example: Example, keyword: str) -> str:
    """The prompt between its keyword and its final colon."""
    assert example.prompt.startswith(keyword) and example.prompt.endswith(":")
    return example.prompt[len(keyword) : -1]


def test_equal_arguments_give_equal_examples() -> None:
    for split in SPLITS:
        assert examples(200, seed=3, split=split) == examples(200, seed=3, split=split)
        assert examples(200, seed=3, split=split) != examples(200, seed=4, split=split)


def test_examples_do_not_change_between_versions() -> None:
    # The demo model's accuracy is stated on these; a changed generator must be a decision.
    assert examples(2, seed=0, split="held_out") == [
        Example("add", "add 5007+1245:", "25260>06252"),
        Example("subtract", "sub 9307-6705:", "2062>2602"),
    ]


def test_a_longer_list_begins_with_the_shorter_one() -> None:
    assert examples(70, seed=1)[:30] == examples(30, seed=1)


def test_families_are_balanced() -> None:
    for split in SPLITS:
        counts = Counter(example.family for example in examples(200, seed=0, split=split))
        assert counts == dict.fromkeys(FAMILIES, 20)


def test_only_the_asked_families_are_drawn() -> None:
    drawn = examples(30, seed=0, families=("sort", "add", "count"))
    assert Counter(example.family for example in drawn) == {"sort": 10, "add": 10, "count": 10}


def test_the_prompt_alone_decides_the_split() -> None:
    for split in SPLITS:
        for seed in range(3):
            drawn = examples(500, seed=seed, split=split)
            assert {split_of(example.prompt) for example in drawn} == {split}


def test_splits_share_no_prompt() -> None:
    train = {example.prompt for example in examples(5000, seed=0)}
    held_out = {example.prompt for example in examples(5000, seed=0, split="held_out")}
    assert not train & held_out


def test_answers_are_short_and_prompts_are_one_line() -> None:
    for example in examples(2000, seed=2):
        assert 3 <= len(example.answer) <= 24
        assert "\n" not in example.prompt + example.answer
        assert set(example.prompt + example.answer) <= set(ALPHABET)


@pytest.mark.parametrize(("family", "keyword"), [("add", "add "), ("subtract", "sub ")])
def test_sums_and_differences_are_right(family: str, keyword: str) -> None:
    for example in of_family(family):
        working, result = example.answer.split(">")
        assert int(result) == eval(arguments(example, keyword))
        assert working == "".join(reversed(result))


def test_products_are_right() -> None:
    for example in of_family("multiply"):
        number, digit = map(int, arguments(example, "mul ").split("*"))
        working, result = example.answer.split(">")
        assert int(result) == number * digit
        carry = 0
        for place, partial in enumerate(re.findall("..", working)):
            carry += number // 10**place % 10 * digit
            assert int(partial) == carry
            carry //= 10
        assert len(working) == 2 * len(str(number))


def test_chains_are_right() -> None:
    for example in of_family("chain"):
        problem = arguments(example, "chain ")
        assert re.sub(r"=\d", "", example.answer) == problem[1:]
        value = int(problem[0])
        for step, result in re.findall(r"(.\d)=(\d)", example.answer):
            value = eval(f"{value}{step}") % 10
            assert value == int(result)


def test_sorted_letters_are_right() -> None:
    for example in of_family("sort"):
        pairs = list(zip(example.answer, example.answer[1:], strict=False))
        assert all(left < right for left, right in pairs)
        assert set(arguments(example, "sort ")) == set(example.answer)


def test_reversed_letters_are_right() -> None:
    for example in of_family("reverse"):
        word = arguments(example, "rev ")
        assert len(word) == len(example.answer)
        assert all(word[-1 - i] == letter for i, letter in enumerate(example.answer))


def test_counts_are_right() -> None:
    for example in of_family("count"):
        letters = arguments(example, "count ")
        assert example.answer[::2] == letters
        for i, number in enumerate(example.answer[1::2]):
            assert int(number) == letters[: i + 1].count(letters[i])


def test_brackets_are_right() -> None:
    for example in of_family("brackets"):
        text = arguments(example, "close ") + example.answer
        assert text[0] in "([{<" and not set(example.answer) & set("([{<")
        while text:
            text, before = re.sub(r"\(\)|\[\]|\{\}|<>", "", text), text
            assert text != before


def test_looked_up_values_are_right() -> None:
    for example in of_family("lookup"):
        table, key = arguments(example, "get ").split(";")
        assert re.findall(rf"{key}[a-z]+", table) == [example.answer]


def test_shifted_letters_are_right() -> None:
    for example in of_family("shift"):
        key, word = arguments(example, "shift").split(" ")
        for plain, shifted in zip(word, example.answer, strict=True):
            assert (ord(shifted) - ord(plain) - int(key)) % 26 == 0
            assert shifted.islower()


def test_only_the_exact_answer_is_correct() -> None:
    for example in examples(100, seed=9):
        answer = example.answer
        assert is_correct(example, answer)
        assert is_correct(example, answer + END_OF_TEXT + "anything")
        assert is_correct(example, answer + "\nanything")
        misses = ["", " " + answer, answer + " ", answer[:-1], answer + answer[-1], "\n" + answer]
        assert not any(is_correct(example, miss) for miss in misses)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    transformers = pytest.importorskip("transformers")
    with as_file(files("sere") / "demo_model") as folder:
        return transformers.AutoTokenizer.from_pretrained(folder)


def test_the_tokenizer_is_one_token_per_character(tokenizer: Any) -> None:
    assert tokenizer.is_fast
    ids = tokenizer(ALPHABET).input_ids
    assert len(set(ids)) == len(ids) == len(ALPHABET)
    assert not set(ids) & set(tokenizer.all_special_ids)
    assert len(tokenizer) == len(ALPHABET) + len(tokenizer.all_special_ids)


def test_text_survives_the_tokenizer(tokenizer: Any) -> None:
    texts = [example.prompt + example.answer for example in examples(200, seed=1)]
    for text in [ALPHABET, " a  b \n 's ,.", *texts]:
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_end_of_text_is_the_tokenizers(tokenizer: Any) -> None:
    assert tokenizer.eos_token == END_OF_TEXT
    assert tokenizer(END_OF_TEXT).input_ids == [tokenizer.eos_token_id]
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
