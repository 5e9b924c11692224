"""Everything that is measured goes by the name of its policy."""

from __future__ import annotations

from collections.abc import Sequence

from sere.policy import PolicyError


def check_names(names: Sequence[str]) -> None:
    """Raise `PolicyError` if two arms have one name: all that is measured goes by it."""
    if twice := [name for name in names if names.count(name) > 1]:
        raise PolicyError(
            f'two policies are called {twice[0]!r}: name one of them, {{"name": "mine", ...}}'
        )
