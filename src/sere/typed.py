"""What is typed on a command line: numbers in their ranges, and a mistake in one sentence."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from sere.checks import nearest


class Parser(argparse.ArgumentParser):
    """One that answers a mistake with what was given, what is expected and where to read on, and
    not with its whole usage."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._flags: list[str] = []
        super().__init__(*args, **kwargs)

    def add_argument(self, *names: Any, **settings: Any) -> argparse.Action:
        if "choices" in settings:
            settings.setdefault("type", _one_of(settings["choices"]))
        action = super().add_argument(*names, **settings)
        self._flags += action.option_strings
        return action

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """All are known: a verb's own parser, which argparse asks in this way, knows best what it
        does not know."""
        if "" in (args or ()):
            self.error("an argument is empty: is a variable of the shell not set?")
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(self._unknown(unknown[0]))
        return found, unknown

    def error(self, message: str) -> NoReturn:
        """End with status 2."""
        message = message.replace("ignored explicit argument", "takes no value, and was given")
        if message.startswith("argument "):  # an option, and what is wrong with its value
            place, _, said = message.removeprefix("argument ").partition(": ")
            message = f"{place}{' ' if ': expected ' in said else ': '}{said}"
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")

    def _unknown(self, given: str) -> str:
        if not given.startswith("-"):
            return f"{given}: expected no further argument"
        near = nearest(given.partition("=")[0], self._flags)
        return f"{given}: no such flag" + (f"; did you mean {near}?" if near else "")


def _one_of(choices: Sequence[str]) -> Callable[[str], str]:
    def choice(text: str) -> str:
        if text not in choices:
            near = nearest(text, choices)
            hint = f"; did you mean {near}?" if near else ""
            raise argparse.ArgumentTypeError(f"{text}: expected one of {', '.join(choices)}{hint}")
        return text

    return choice


def positive(text: str) -> int:
    """A whole number >= 1."""
    return whole(text, least=1)


# What is larger counts or measures nothing, and overflows in the libraries that it is given to.
_MOST = 2**32 - 1


def whole(text: str, least: int = 0) -> int:
    """A whole number >= 0."""
    if not text.isdecimal() or len(text) > 10 or not least <= int(text) <= _MOST:
        several = text.replace(",", "").isdecimal()
        raise argparse.ArgumentTypeError(
            f"{text[:40]}: expected a whole number >= {least} (and < 2**32)"
            + (", and of several one behind each flag" if several and "," in text else "")
        )
    return int(text)


def above_0(text: str) -> float:
    """A number > 0."""
    return _number(text, "a number > 0 (and < 2**32)", lambda value: 0 < value <= _MOST)


def at_least_0(text: str) -> float:
    """A number >= 0."""
    return _number(text, "a number >= 0 (and < 2**32)", lambda value: 0 <= value <= _MOST)


def threshold(text: str) -> float:
    """A rho: a number >= 0, or inf."""
    return _number(text, "a number >= 0, usually between 0 and 1", lambda value: value >= 0)


def share(text: str) -> float:
    """A share from 0 to 1."""
    return _number(text, "a share from 0 to 1, e.g. 0.9", lambda value: 0 <= value <= 1)


def rate(text: str) -> float:
    """Requests per second, or inf."""
    return _number(text, "requests per second > 0, or inf", lambda value: value > 0)


def _number(text: str, expected: str, right: Callable[[float], bool]) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not right(value):
        raise argparse.ArgumentTypeError(f"{text[:40]}: expected {expected}")
    return value
