"""An engine that is started for nothing but its own table."""

from __future__ import annotations

import os
from argparse import SUPPRESS
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sere.maps import LayerMaps
from sere.serving.asking import AUTO, KEY
from sere.serving.contract import CALIBRATION
from sere.serving.engine import prepare
from sere.serving.refusal import ServingError
from sere.serving.symbols import lacking, symbol
from sere.serving.table_cache import CACHE, table_in
from sere.table import Table


def table_by_engine(
    model: str, auto: Mapping[str, Any], arguments: Sequence[str]
) -> tuple[Table, dict[int, LayerMaps] | None]:
    """Start vLLM with these arguments, as on its command line, and let it calibrate itself: its
    table, and its maps if they were asked for.

    auto: see `sere.serving.auto.Auto`. Raises `ServingError` (or what vLLM makes of it).
    """
    auto = {**auto, "report": False}  # of an engine that ends here
    if auto.get("maps") is None:
        return table_in(_started(model, {**auto, "cache": False}, arguments)), None
    with TemporaryDirectory() as folder, _cache(folder):  # they are too large for one answer
        _started(model, {**auto, "cache": True}, arguments)
        kept = [Table.load(path) for path in Path(folder).glob("*.table")]
        if not kept or kept[0].maps is None:
            raise ServingError(
                "the engine kept no maps, see above; leave --maps out, or calibrate without "
                "--engine"
            )
        table, maps = kept[0], kept[0].maps
        return table, {index: maps.layer(index) for index in table.layers}


@contextmanager
def _cache(folder: str) -> Iterator[None]:
    before = os.environ.get(CACHE)
    os.environ[CACHE] = folder
    try:
        yield
    finally:
        del os.environ[CACHE]
        if before is not None:
            os.environ[CACHE] = before


def _started(model: str, auto: Mapping[str, Any], arguments: Sequence[str]) -> bytes:
    """The file of an engine's table."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "INFO")  # or nobody sees its progress
    prepare()
    if reason := lacking(CALIBRATION):
        raise RuntimeError(f"no engine to calibrate with: {reason}")
    made = symbol("EngineArgs")
    named = {"prog": "sere calibrate MODEL --", "usage": SUPPRESS}  # which has hundreds of lines
    parser = made.add_cli_args(symbol("FlexibleArgumentParser")(**named))
    asked = made.from_cli_args(parser.parse_args(["--model", model, *arguments]))
    asked.additional_config = {
        **(asked.additional_config or {}),
        KEY: {AUTO: dict(auto)},
    }
    asked.enforce_eager = True  # what it compiled or captured would be of no use
    engine = symbol("LLMEngine").from_engine_args(asked)
    try:
        return bytes(engine.collective_rpc("sere_table")[0])
    finally:
        engine.engine_core.shutdown()
