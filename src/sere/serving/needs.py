"""How a feature says what it relies on in vLLM; see `contract`."""

from __future__ import annotations

from dataclasses import dataclass, field

Where = tuple[str, str]
"""(module, path of attributes)."""


@dataclass(frozen=True)
class Needs:
    """What one feature relies on.

    called: names of `SYMBOLS`, and the attributes of each that are called or wrapped. Looked for
        at start.
    read: attributes of vLLM's objects, by class. Most exist on instances only: these are looked for
        in each version's sources, by `tools/vllm_contract.py`, and so are the following.
    parameters: where -> its first parameters.
    """

    called: dict[str, tuple[str, ...]]
    read: dict[Where, tuple[str, ...]] = field(default_factory=dict)
    parameters: dict[Where, tuple[str, ...]] = field(default_factory=dict)
