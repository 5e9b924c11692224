"""Engines that calibrate themselves, one after the other in one process: read a list of jobs as
JSON, write each engine's table.

A job holds `options` for `vllm.LLM` and `output`, the file to write; with `prompts` (token ids) the
engine is asked for answers before, until it has made a table of them; with `policy` it finds what
an earlier one has kept in another cache, with that policy stored in it, as all that follow do; with
`named` (a pattern) it is given the table that an earlier one has kept; with `tier` it is asked for
one answer of that. Printed behind RESULT: of each what sere said, and the error if it was refused;
behind ANSWERED what `answered` gives.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

RESULT, ANSWERED = "RESULT ", "ANSWERED "
WATCHING = "the engine measures its experts"


def table_of(job: dict[str, Any], said: list[str]) -> bytes:
    from vllm import LLM

    llm = LLM(**job["options"])
    try:
        if "tier" in job:
            said.append(admitted(llm, job["tier"]))
        if "prompts" in job:
            print(ANSWERED + json.dumps(answered(llm, job["prompts"])), flush=True)
        data, *_ = llm.collective_rpc("sere_table")
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
    return bytes(data)


def store(policy: dict[str, Any], table: Path, cache: Path) -> None:
    """As `sere tune` would, in a copy; which is as if made from little text."""
    from sere.policy import Policy
    from sere.table import Table

    cache.mkdir()
    made = Table.load(table)
    layers = {index: replace(layer, stability=0.5) for index, layer in made.layers.items()}
    tuned = replace(made, policy=Policy.from_dict(policy), layers=layers)
    tuned.save(cache / table.name)
    os.environ["SERE_CACHE"] = str(cache)


def admitted(llm: Any, tier: str) -> str:
    """What is said to a request for a tier, and how many rows are counted as independent then."""
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    sampling = SamplingParams(max_tokens=4, ignore_eos=True, extra_args={"sere": tier})
    try:
        llm.generate([{"prompt_token_ids": [5, 6]}], sampling, use_tqdm=False)
    except VLLMValidationError as error:
        return f"{tier}: {error}"
    layers = llm.collective_rpc("sere_stats")[0].values()
    return f"{tier}: {[layer['rows_independent'] for layer in layers]} rows"


def answered(llm: Any, prompts: list[list[int]]) -> dict[str, Any]:
    """What was answered while the engine watched, once it was live, and by stock routing; what it
    told before and after."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    given = [{"prompt_token_ids": ids} for ids in prompts]

    def answers() -> list[list[int]]:
        found = llm.generate(given, sampling, use_tqdm=False)
        return [list(request.outputs[0].token_ids) for request in found]

    def told() -> dict[str, Any]:
        return dict(llm.collective_rpc("sere_telemetry")[0])

    found: dict[str, Any] = {"before": told(), "watched": answers()}
    while (told()["inert"] or "").startswith(WATCHING):
        llm.generate(given[:1], sampling, use_tqdm=False)
    found |= {"after": told(), "live": answers(), "moved": told()}
    llm.collective_rpc("sere_policy", args=(None,))
    return {**found, "stock": answers()}


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
            if "policy" in job:
                (found,) = Path(os.environ["SERE_CACHE"]).glob("qwen3_moe-*.table")
                store(job["policy"], found, Path(job["output"]).with_suffix(".cache"))
            if "named" in job:
                (kept,) = Path(os.environ["SERE_CACHE"]).glob(job["named"])
                job["options"]["additional_config"]["sere"]["table"] = str(kept)
            Path(job["output"]).write_bytes(table_of(job, told[-1]))
        except Exception as error:
            told[-1].append(f"{type(error).__name__}: {error}")
    print(RESULT + json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
