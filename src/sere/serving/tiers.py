"""What quality a request may ask for, and what each request in the batch has asked for.

`SamplingParams(extra_args={"sere": "exact"})`, and `vllm_xargs` in an OpenAI request:

* "exact": stock routing, whatever the others in the batch get;
* "fast": what the engine's policy says;
* "independent": what the engine's pool says, whoever else is in the batch;
* {"S": n}, or "S=n" where a value must be a string: at least its own n best experts a token.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sere.kernels import RowClass
from sere.policy import PolicyError
from sere.serving.rows import row_class

_ALL = 100  # experts a token; no model has as many, and an int8 has room for it
_EXPECTED = 'expected "exact", "fast", "independent", {"S": n} or "S=n", n a whole number >= 1'


@dataclass(frozen=True, order=True)
class Tier:
    """How many of its own best experts each token of a request keeps; a larger tier is better.

    "independent" is below all others: it promises no more experts than the pool.
    """

    kept: int

    @classmethod
    def parse(cls, asked: Any) -> Tier:
        """The tier that a user wrote; `PolicyError` if it is none."""
        if isinstance(asked, str) and asked in _NAMED:
            return _NAMED[asked]
        kept = asked.get("S") if isinstance(asked, Mapping) and set(asked) == {"S"} else None
        if isinstance(asked, str) and (match := re.fullmatch(r"S=([0-9]{1,9})", asked)):
            kept = int(match[1])
        if isinstance(kept, bool) or not isinstance(kept, int) or kept < 1:
            raise PolicyError(f"{asked!r}: {_EXPECTED}")
        return cls(min(kept, _ALL))

    def __str__(self) -> str:
        names = {tier: name for name, tier in _NAMED.items()}
        return names.get(self, f"S={self.kept}")


INDEPENDENT, FAST, EXACT = Tier(-1), Tier(0), Tier(_ALL)
_NAMED = {"independent": INDEPENDENT, "fast": FAST, "exact": EXACT}


def _admitted(asked: Any) -> Tier:
    """A worker serves others, too: what slipped past the front end's check gets the best."""
    try:
        return Tier.parse(asked)
    except Exception:  # of whatever type it is, and whatever that raises
        return EXACT


class RequestTiers:
    """Row classes by request, for requests that asked for something; the others have `default`."""

    def __init__(self, default: Tier, K: int) -> None:
        self._K = K
        self._default = np.int8(row_class(default.kept, K))
        self._asked: dict[str, np.int8] = {}

    def add(self, request: str, asked: Any) -> None:
        """A request joins; asked: what its `extra_args` say, or None. Joining again replaces."""
        self._asked.pop(request, None)
        if asked is None:
            return
        wanted = np.int8(row_class(_admitted(asked).kept, self._K))
        if wanted != self._default:
            self._asked[request] = wanted

    def remove(self, requests: Sequence[str]) -> None:
        """Requests leave; unknown ones are none of ours."""
        for request in requests:
            self._asked.pop(request, None)

    def distrust(self) -> None:
        """What some request asked for has been missed: from now on nobody gets less than stock."""
        self._default = np.int8(RowClass.EXACT)
        self._asked.clear()

    def classes(self, requests: Sequence[str]) -> npt.NDArray[np.int8] | np.int8:
        """[R] the class of each request's decode rows; one for all where nobody asked."""
        if not self._asked:
            return self._default
        found, default = self._asked.get, self._default
        return np.array([found(request, default) for request in requests], dtype=np.int8)
