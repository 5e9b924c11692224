"""Everything that is measured goes by the name of its policy."""

from __future__ import annotations

from collections.abc import Sequence

from sere.policy import PolicyError


def check_names(names: Sequence[str]) -> None:
    """Raise `PolicyError` if a name is no word, or two arms have one: all that is measured goes by
    it."""
    for name in names:
        if not isinstance(name, str) or not name.isprintable():
            raise PolicyError(f'name={name!r}: expected a line of text, as in {{"name": "mine"}}')
    if twice := [name for name in names if names.count(name) > 1]:
        raise PolicyError(
            f'two policies are called {twice[0]!r}: name one of them, {{"name": "mine", ...}}'
        )
