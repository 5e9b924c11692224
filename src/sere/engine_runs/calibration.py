"""`sere calibrate --engine vllm`: a table from the engine that will serve with it, for checkpoints
that transformers does not know, cannot read or has no room for."""

from __future__ import annotations

import inspect
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from sere import demo_model
from sere.calibration.calibrate import DEMO_TEXT, CalibrationError, check_output, texts_of
from sere.calibration.calibrate import calibrate as by_transformers
from sere.calibration.saved import save
from sere.serving.auto import METHODS
from sere.serving.calibrator import table_by_engine
from sere.table import Table

_ELSEWHERE = inspect.signature(by_transformers).parameters
"""Of what transformers does: what its flags are where the user says nothing."""


def calibrate(
    model_name: str,
    output: str | Path,
    arguments: Sequence[str],
    *,
    method: str,
    samples: int,
    length: int,
    seed: int,
    allow_fewer: bool,
    overwrite: bool,
    data: str | Path | None = None,
    maps: int | None = None,
    **elsewhere: Any,
) -> Table:
    """As `sere.calibration.calibrate.calibrate`; arguments: of vLLM's engine, as on its command
    line. Raises `CalibrationError` for what needs transformers."""
    given = [name for name, value in elsewhere.items() if value != _ELSEWHERE[name].default]
    if given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise CalibrationError(f"{flags}: not with --engine vllm; leave one of the two out")
    if method not in METHODS:
        raise CalibrationError(
            f"--method {method}: an engine measures {', '.join(METHODS)}; leave --engine out"
        )
    check_output(output, data, overwrite)
    folder = demo_model.resolve(model_name)
    with nullcontext(data) if data else _written(folder, samples, seed) as text:
        found, fitted = table_by_engine(
            folder,
            {
                "data": str(text),
                "method": method,
                "samples": samples,
                "length": length,
                "seed": seed,
                "allow_fewer": allow_fewer,
                "maps": maps,
            },
            arguments,
        )
    about: dict[str, Any] = {"model": Path(model_name).name}
    if not data:
        about |= {"corpus": DEMO_TEXT, "file_hash": None}
    table = replace(found, provenance={**found.provenance, **about})
    save(table, fitted, Path(output))
    return table


@contextmanager
def _written(folder: str, samples: int, seed: int) -> Iterator[Path]:
    """The demo model's own texts as a file, which an engine's process can read."""
    texts = texts_of(folder, None, samples, seed)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "text.jsonl")
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        yield path
