"""`"sere": "auto"`: what the user wrote of an engine that calibrates itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from sere.checks import check_count
from sere.files import is_file
from sere.policy import PolicyError, check_keys

NO_MAPS = (
    "an engine that calibrates itself fits linear maps if it is told their rank: "
    '{"auto": {"maps": 16}}'
)
_OF_A_TEXT = {"data", "samples", "length", "seed", "allow_fewer", "wait", "maps"}
METHODS = ("frobenius", "cosine", "directed")
"""Not those that depend on which rows are read together."""


@dataclass(frozen=True)
class Traffic:
    """How an engine measures its experts on the prompts that it serves.

    share: of the prompts, 0 < share <= 1. rows: of a step that are observed, at most. tokens: rows
        that are observed in all, at most. stable: the share of each layer's replacements that a
        bootstrap must choose again, as of `sere calibrate --until-stable`.
    """

    share: float = 0.1
    rows: int = 64
    tokens: int = 16384
    stable: float = 0.9

    @classmethod
    def parse(cls, given: Any) -> Traffic | None:
        """From the user's true, false or settings; raises `PolicyError`."""
        if given is None or given is False:
            return None
        return cls(**_settings(cls, given, "auto: traffic", '{"share": 0.1}'))

    def __post_init__(self) -> None:
        for name in ("share", "stable"):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not 0 < value <= 1:
                raise PolicyError(f"auto: traffic: {name}={value!r}: expected 0 < {name} <= 1")
        for name, least in (("rows", 1), ("tokens", 2)):
            check_count(f"auto: traffic: {name}", getattr(self, name), optional=False, least=least)


@dataclass(frozen=True)
class Auto:
    """How an engine calibrates itself at its first start.

    data: the user's text, in any shape that `sere calibrate --data` reads; None takes the bundled
        text, which is foreign to the user's.
    method, samples, length, seed, allow_fewer: as of `sere calibrate`; sequences are cut to what
        the engine can read whole.
    traffic: measure on what is served instead, under stock routing until then; None for the text.
    maps: the largest rank of linear maps to fit as well, as of `sere calibrate`; the room for them
        is reserved in every layer, whatever the policy is.
    cache: whether the table is looked for, and kept, in the cache folder.
    wait: seconds for another engine that is at work on the same table; then this one calibrates for
        itself. vLLM's front end gives a whole start `VLLM_ENGINE_READY_TIMEOUT_S`, 600 s.
    report: whether what the policy does to speed and quality is measured, before the engine serves,
        and said (see `first_report`); with traffic, from the second start on.
    otherwise: where the cache is of no use (not writable, a broken file, another engine that does
        not end, a table of this model's name that is another checkpoint's), "calibrate" anew for
        this start or serve "stock"; with "stock" also where calibration fails.
    """

    data: Path | None = None
    traffic: Traffic | None = None
    maps: int | None = None
    method: str = "frobenius"
    samples: int = 400
    length: int = 128
    seed: int = 0
    allow_fewer: bool = True
    cache: bool = True
    wait: float = 300
    report: bool = True
    otherwise: Literal["calibrate", "stock"] = "calibrate"

    @classmethod
    def parse(cls, given: Any) -> Auto | None:
        """From the user's true, false or settings; raises `PolicyError`."""
        if given is False:
            return None
        given = _settings(cls, given, "auto", '{"data": "text.jsonl"}')
        own = {**given, "traffic": Traffic.parse(given.get("traffic"))}
        if own["traffic"] and (unread := sorted(_OF_A_TEXT & set(given))):
            raise PolicyError(
                f"auto: {', '.join(unread)}: of a text, and with traffic none is read; leave one "
                "of the two out"
            )
        if own.get("data") is not None:
            own["data"] = _file(own["data"])
        return cls(**own)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise PolicyError(
                f"auto: method={self.method!r}: an engine measures one of {', '.join(METHODS)}; "
                "the others depend on which rows are read together: use `sere calibrate`"
            )
        for name, least in (("samples", 1), ("length", 2), ("seed", 0)):
            check_count(f"auto: {name}", getattr(self, name), optional=False, least=least)
        check_count("auto: maps", self.maps, optional=True)
        for name in ("allow_fewer", "cache", "report"):
            if not isinstance(value := getattr(self, name), bool):
                raise PolicyError(f"auto: {name}={value!r}: expected true or false")
        number = isinstance(self.wait, int | float) and not isinstance(self.wait, bool)
        if not number or not 0 <= self.wait <= 86400:
            raise PolicyError(f"auto: wait={self.wait!r}: expected seconds from 0 to 86400")
        if self.otherwise not in ("calibrate", "stock"):
            raise PolicyError(
                f'auto: otherwise={self.otherwise!r}: expected "calibrate" or "stock"'
            )


def _settings(cls: Any, given: Any, what: str, example: str) -> Mapping[str, Any]:
    """The fields of a dataclass that the user named; none where they wrote true."""
    if given is True:
        return {}
    if not isinstance(given, Mapping):
        raise PolicyError(f"{what}={given!r}: expected true, or settings, e.g. {example}")
    check_keys(what, given, [field.name for field in fields(cls)])
    return given


def _file(named: Any) -> Path:
    if not isinstance(named, str):
        raise PolicyError(f"auto: data={named!r}: expected the path of a file of text")
    if not is_file(path := Path(named)):
        raise PolicyError(
            f"auto: data={named!r}: no such file here; name a .txt, .md, .jsonl, .json or .parquet "
            "file that the engine's own machine can read"
        )
    return path.absolute()
