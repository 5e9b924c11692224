"""An engine that is started for nothing but its own table."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from sere.serving.asking import AUTO, KEY
from sere.serving.contract import CALIBRATION
from sere.serving.engine import prepare
from sere.serving.symbols import lacking, symbol
from sere.serving.table_cache import table_in
from sere.table import Table


def table_by_engine(model: str, auto: Mapping[str, Any], arguments: Sequence[str]) -> Table:
    """Start vLLM with these arguments, as on its command line, and let it calibrate itself.

    auto: see `sere.serving.auto.Auto`. Raises `ServingError` (or what vLLM makes of it).
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "INFO")  # or nobody sees its progress
    prepare()
    if reason := lacking(CALIBRATION):
        raise RuntimeError(f"no engine to calibrate with: {reason}")
    made = symbol("EngineArgs")
    parser = made.add_cli_args(symbol("FlexibleArgumentParser")(prog="sere calibrate MODEL --"))
    asked = made.from_cli_args(parser.parse_args(["--model", model, *arguments]))
    asked.additional_config = {**(asked.additional_config or {}), KEY: {AUTO: dict(auto)}}
    asked.enforce_eager = True  # what it compiled or captured would be of no use
    engine = symbol("LLMEngine").from_engine_args(asked)
    try:
        return table_in(engine.collective_rpc("sere_table")[0])
    finally:
        engine.engine_core.shutdown()
