"""What is served where nobody has measured anything yet."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sere.policy import Policy

CAUTIOUS = Policy(tau=0.02)
"""S=2, and no replacement may lose more than 0.02 (see `Policy.tau`). Not measured on your model:
`sere tune` chooses within a budget."""


def cautious(K: int) -> Policy:
    """`CAUTIOUS` for rows of K experts: S=1 where two are all."""
    return CAUTIOUS if K > CAUTIOUS.S else replace(CAUTIOUS, S=1)


def spoken(K: int) -> dict[str, Any]:
    """`cautious` as settings beside a table: what is not the default anyway."""
    plain = Policy().to_dict()
    return {name: value for name, value in cautious(K).to_dict().items() if value != plain[name]}
