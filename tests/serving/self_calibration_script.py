"""Engines that calibrate themselves, one after the other in one process, as importing vLLM takes
longer than they do: read a list of jobs as JSON, write each engine's table.

A job holds `options` for `vllm.LLM` and `output`, the file to write. Printed behind RESULT: of each
what sere said, and the error if it was refused.
"""

from __future__ import annotations

import gc
import json
import logging
import sys
from pathlib import Path
from typing import Any

RESULT = "RESULT "


def table_of(options: dict[str, Any]) -> bytes:
    from vllm import LLM

    llm = LLM(**options)
    try:
        (data,) = llm.collective_rpc("sere_table")
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
    return bytes(data)


def main() -> None:
    told: list[list[str]] = []
    make = logging.getLogRecordFactory()  # handlers that are there before vLLM do not stay

    def heard(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        if record.name == "vllm.sere":
            told[-1].append(record.getMessage())
        return record

    logging.setLogRecordFactory(heard)
    for job in json.load(sys.stdin):
        told.append([])
        try:
            Path(job["output"]).write_bytes(table_of(job["options"]))
        except Exception as error:
            told[-1].append(f"{type(error).__name__}: {error}")
    print(RESULT + json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
