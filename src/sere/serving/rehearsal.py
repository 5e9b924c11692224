"""Start-up without the start: what vLLM would do first, in a process that has done nothing yet.

`python -m sere.serving.rehearsal [MODEL [SETTINGS]]` lets vLLM load its plug-ins, make its
config and build the model without weights, so that every layer is bound or refused as in a worker.
It prints what came of it as one line of JSON behind `RESULT`. Nothing here imports the plug-in:
whether vLLM finds it is the question.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

import torch

from sere.files import plainly
from sere.policy import PolicyError
from sere.serving import self_calibration, wiring
from sere.serving.asking import KEY
from sere.serving.refusal import ServingError
from sere.serving.session import settings_of
from sere.serving.symbols import lacking, module_of, obstacle, symbol
from sere.serving.worker import check_layers, kernels_of
from sere.table import TableError

RESULT = "REHEARSAL "
_OTHER_TORCH = (
    "torchvision is a build for another torch, which breaks vLLM and transformers; text models do "
    "not need it: pip uninstall torchvision torchaudio torchcodec"
)


class Rehearsal:
    """A fresh process, at work while its maker goes on: importing vLLM takes it seconds."""

    def __init__(self, model: str | None, own: Mapping[str, Any] | str | None) -> None:
        """own: what is to stand behind "sere", if something is."""
        arguments = [] if model is None else [model]
        if model is not None and own is not None:
            arguments.append(json.dumps(own))
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"},
        )
        self._said: tuple[str, str] | None = None
        self._told = False  # why it died

    def found(self) -> dict[str, Any]:
        """What it found, once it is through.

        obstacle: why re-routing cannot be put into this vLLM, tested version or not; or None.
        missing: places of vLLM where sere should be and is not. no_metrics: why the server's
        `/metrics` would have none of sere's, or None. experts: of the model; 0 if it is dense,
        None if it was not named or cannot be configured. refused: why an engine with this model and
        these settings would not start, or None. auto: of an engine that is to calibrate itself,
        where its table is or will be, or None. unbuilt: why its layers could not be built here to
        be asked, or None. kernels: of each of these layers, the expert kernel that would serve and
        the one that stock vLLM would take.
        Raises `RuntimeError` with the end of its output if the process died, that once.
        """
        if self._said is None:
            self._said = self._process.communicate()
        output, errors = self._said
        for line in output.splitlines():
            if line.startswith(RESULT):
                found: dict[str, Any] = json.loads(line[len(RESULT) :])
                return found
        if self._told:
            raise RuntimeError("not known: the process of the first failure above died")
        self._told = True
        status, end = self._process.returncode, _end(errors or output)
        if status < 0:
            name = signal.Signals(-status).name
            raise RuntimeError(f"vLLM's process was ended by {name}, in native code: {end}")
        raise RuntimeError(end or f"exit {status}")


def _end(output: str) -> str:
    """The last of what a process said, whole lines of it; and what to do, where it is known."""
    lines, end = output.strip().splitlines(), ""
    while lines and len(end) + len(lines[-1]) < 600:
        end = f"{lines.pop()}\n{end}"
    known = "operator torchvision::" in end
    return (end + _OTHER_TORCH if known else end or output[-600:]).strip()


def _missing() -> list[str]:
    """Where vLLM has not been wrapped, once an engine asks for it."""
    listening = {"VllmConfig": symbol("VllmConfig").__post_init__}
    if missing := _untouched(listening):
        return missing
    wiring.install()
    places = {
        "router factory": module_of("create_fused_moe_router").create_fused_moe_router,
        "MoERunner": symbol("MoERunner").__init__,
        "Executor": symbol("Executor").compile_or_warm_up_model,
    }
    missing = _untouched(places)
    return missing if hasattr(symbol("WorkerBase"), "sere_stats") else [*missing, "worker"]


def _untouched(places: dict[str, Any]) -> list[str]:
    return [name for name, place in places.items() if not hasattr(place, "__wrapped__")]


def _started(model: str, own: Any) -> dict[str, Any]:
    """What of `Rehearsal.found` is about a model, and settings for it if there are any."""
    # Eager: what is refused with graphs has a flag of its own to say so.
    options: dict[str, Any] = {"model": model, "enforce_eager": True}
    arguments = symbol("EngineArgs")
    found: dict[str, Any] = {}
    try:
        config = arguments(**options).create_engine_config()
        found["experts"] = config.model_config.get_num_experts()
        if own is not None:
            config = arguments(**options, additional_config={KEY: own}).create_engine_config()
            if settings_of(config).auto is not None:
                found["auto"] = self_calibration.kept(config)
    except Exception as error:  # whatever vLLM raises is the answer
        return {**found, "refused": plainly(error)}
    if own is None:
        return found
    try:
        _build(config)
        check_layers(config)
        found["kernels"] = kernels_of(config)
    except (ServingError, TableError, PolicyError) as error:
        found["refused"] = str(error)
    except Exception as error:  # vLLM's own, and not of a start-up as it will be
        found["unbuilt"] = f"{type(error).__name__}: {error}"
    return found


def _build(config: Any) -> None:
    """Let vLLM build the model as a worker does, in no memory: every layer is bound or refused."""
    with tempfile.TemporaryDirectory() as folder, symbol("set_current_vllm_config")(config):
        meeting = f"file://{folder}/ranks"
        symbol("init_distributed_environment")(1, 0, meeting, 0, "gloo")
        symbol("initialize_model_parallel")()
        torch.set_default_dtype(config.model_config.dtype)
        with torch.device("meta"):
            symbol("initialize_model")(vllm_config=config)


def _main(model: str | None = None, own: str = "null") -> None:
    if reason := lacking("doctor"):
        sys.exit(reason)
    symbol("load_general_plugins")()
    hindered = obstacle(any_version=True)
    found: dict[str, Any] = {
        "obstacle": hindered,
        "missing": [] if hindered else _missing(),
        "no_metrics": lacking("metrics"),
        "experts": None,
        "refused": None,
        "auto": None,
        "unbuilt": None,
        "kernels": [],
    }
    if model is not None:
        found |= _started(model, json.loads(own))
    print(RESULT + json.dumps(found), flush=True)


if __name__ == "__main__":
    _main(*sys.argv[1:])
