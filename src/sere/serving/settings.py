"""What the user wrote behind `--additional-config '{"sere": {...}}'`, checked and completed."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from sere.cautious import CAUTIOUS, cautious
from sere.files import is_file
from sere.policy import Policy, PolicyError, check_keys
from sere.serving import admin_key
from sere.serving.asking import AUTO
from sere.serving.auto import NO_MAPS, Auto
from sere.serving.shadow import ShadowSettings
from sere.serving.tiers import EXACT, FAST, Tier
from sere.table import FILE_NAME, TableError, carried

_LOG = logging.getLogger("vllm.sere")
_MERGES_NO_MORE = (
    "sere: merge does nothing any more, as no re-routed row names an expert twice; remove it: the "
    "next version will not know the word"
)
_OWN_KEYS = (
    "table",
    AUTO,
    "fingerprint",
    "maps",
    "merge",  # until 0.3, see `merge_is_asked`
    "default",
    "cap",
    "any_version",
    "union",
    "shadow",
    "placement",
    admin_key.SETTING,
)
_POLICY_KEYS = tuple(f.name for f in fields(Policy))


@dataclass(frozen=True)
class Settings:
    """How one engine re-routes.

    table: path of the side file; None where the engine calibrates itself.
    policy: what it starts with; it can be switched on the live engine. Where the user names no
        setting of it, the one that `sere tune` left in the table, or else a cautious one, or the
        paper's where a table made without text knows no errors. `CAUTIOUS` where the engine is
        still to find or make its table.
    named: whether the user named settings of it.
    fingerprint: "weights" compares the routers and expert weights of table and checkpoint;
        "router" accepts other expert weights (a quantised copy of the calibrated model); "shape"
        compares only architecture, E, K and layers (engines with random weights).
    default: the tier of requests that ask for none.
    cap: the best tier that a request may ask for.
    any_version: try a version of vLLM outside the tested range.
    union: whose rows choose the primaries: those of each data-parallel "rank", or "all" ranks'.
    placement: how much less good (see `sere.kernels.plan.Placement`) a stand-in on the same
        expert-parallel rank may be and yet be preferred.
    maps: load linear maps at the start whatever its policy is, so that one with
        `fill: "linear"` can be switched to.
    shadow: how often a layer is compared with stock routing, and when to fall back to it; None
        never. Eager mode only.
    auto: how the engine calibrates itself; None where it has a table.
    """

    table: Path | None
    policy: Policy
    fingerprint: Literal["weights", "router", "shape"] = "weights"
    default: Tier = FAST
    cap: Tier = EXACT
    any_version: bool = False
    union: Literal["rank", "all"] = "rank"
    placement: float = 0.0
    shadow: ShadowSettings | None = None
    auto: Auto | None = None
    maps: bool = False
    named: bool = True

    @classmethod
    def parse(
        cls,
        given: Mapping[str, Any],
        *,
        model_folder: Path | None,
        model_default: Mapping[str, Any],
    ) -> Settings:
        """Settings from the user's dict.

        given: the value of "sere" in vLLM's additional_config.
        model_folder: where the model's checkpoint lies, if it is on this machine.
        model_default: the value of "sere" in the model's config.json; `given` overrides it.

        Raises `PolicyError` for unknown keys or bad values, `TableError` if there is no table.
        """
        if not isinstance(given, Mapping):
            raise PolicyError(
                f'"sere": {given!r}: expected settings, e.g. {{"table": "t.safetensors"}}'
            )
        if not isinstance(model_default, Mapping):
            raise PolicyError(f'"sere": {model_default!r} in config.json: expected settings')
        if admin_key.SETTING in model_default:
            raise PolicyError(
                f'"{admin_key.SETTING}" in config.json: a model may not open a route of the server '
                "that loads it; remove it there"
            )
        merged = {**model_default, **given}
        check_keys('"sere"', merged, _OWN_KEYS + _POLICY_KEYS)
        level = merged.get("fingerprint", "weights")
        if level not in ("weights", "router", "shape"):
            raise PolicyError(f'fingerprint={level!r}: expected "weights", "router" or "shape"')
        default, cap = _tier(merged, "default", "fast"), cap_of(merged)
        if default > cap:
            raise PolicyError(f'default="{default}" is better than cap="{cap}": raise the cap')
        union = merged.get("union", "rank")
        if union not in ("rank", "all"):
            raise PolicyError(f'union={union!r}: expected "rank" or "all"')
        if _flag(merged, "merge"):
            merge_is_asked()
        auto, from_model = _auto(given, merged), "table" not in given
        table = None if auto else _find_table(merged.get("table"), model_folder, from_model)
        own = {k: v for k, v in merged.items() if k in _POLICY_KEYS}
        stored = CAUTIOUS if table is None else _unnamed(table)
        policy = Policy.from_dict(own) if own else stored
        asked = merged.get("shadow")
        shadow = None if asked is None else ShadowSettings.parse(asked)
        return cls(
            table,
            policy,
            level,
            default=default,
            cap=cap,
            union=union,
            placement=_tolerance(merged.get("placement", 0.0)),
            shadow=shadow,
            auto=auto,
            maps=_flag(merged, "maps"),
            named=bool(own),
            any_version=_flag(merged, "any_version"),
        )


def _unnamed(table: Path) -> Policy:
    """The policy where the user names no setting of one."""
    if (found := carried(table)) is None:
        return CAUTIOUS  # what is wrong with it is said when it is loaded
    policy, K, knows_outputs = found
    return policy or (cautious(K) if knows_outputs else Policy())


def merge_is_asked() -> None:
    """Say that merging, once an option, is what re-routing does (rule 9 of the specification)."""
    _LOG.warning(_MERGES_NO_MORE)


def _flag(given: Mapping[str, Any], name: str) -> bool:
    value = given.get(name, False)
    if not isinstance(value, bool):
        raise PolicyError(f"{name}={value!r}: expected true or false")
    return value


def _tolerance(value: Any) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value <= 2:
        raise PolicyError(
            f"placement={value!r}: expected how much less similar a stand-in on the same rank may "
            "be, from 0 (no less) to 2, e.g. 0.02"
        )
    return float(value)


def cap_of(merged: Mapping[str, Any]) -> Tier:
    """The cap alone: the table need not be there any more."""
    return _tier(merged, "cap", "exact")


def policy_is_found_later(merged: Mapping[str, Any]) -> bool:
    """Whether the engine may start with what `sere tune` stored in its own table."""
    named = any(name in merged for name in _POLICY_KEYS)
    return merged.get(AUTO, False) is not False and not named


def _tier(given: Mapping[str, Any], name: str, otherwise: str) -> Tier:
    try:
        return Tier.parse(given.get(name, otherwise))
    except PolicyError as error:
        raise PolicyError(f"{name}={error}") from None


def _auto(given: Mapping[str, Any], merged: Mapping[str, Any]) -> Auto | None:
    auto = Auto.parse(merged.get(AUTO, False))
    if auto and given.get("table") is not None:
        raise PolicyError(
            f'"auto" and table={given["table"]!r}: an engine that has a table does not calibrate '
            "itself; leave one of the two out"
        )
    if auto and merged.get("maps") and auto.maps is None:
        raise PolicyError(f'"auto" and maps={merged["maps"]!r}: {NO_MAPS}')
    return auto


def _find_table(named: Any, folder: Path | None, from_model: bool) -> Path:
    """The named table (relative to the model if its config names it), or one beside the model."""
    if named is not None and not isinstance(named, str):
        raise PolicyError(f"table={named!r}: expected the path of a file")
    beside = folder / (named or FILE_NAME) if folder else None
    path = beside if from_model and beside else Path(named or FILE_NAME)
    if not is_file(path):
        raise TableError(
            f"{path}: no such table; run `sere calibrate MODEL -o {FILE_NAME}` and name it, "
            f'{{"sere": {{"table": "{FILE_NAME}"}}}}, or put it beside the model; or write '
            '{"sere": "auto"}, and the engine calibrates itself'
        )
    return path.absolute()
