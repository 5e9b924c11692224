"""An engine reads text before it serves: whole sequences in hand-made scheduler outputs, as vLLM's
own warm-up makes them, so that nothing is cut, cached or preempted and each token counts once.

Run in every worker, before it warms up: nothing is captured or locked by then.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from sere.fitting.mapping import is_held_out
from sere.serving.hand_made import end, first_step, free_blocks, joining, places, run, taken
from sere.serving.observing import Observation
from sere.similarity.sums import FOLDS

_LOG = logging.getLogger("vllm.sere")
_BATCH = 16  # texts of one part, as `sere calibrate` has them, until the next part has its turn
_PATIENCE = 5  # seconds from one line of progress to the next


def longest(config: Any) -> int:
    """Tokens of a sequence that this engine can read whole, before it is asked for one more."""
    scheduler = config.scheduler_config
    return int(min(config.model_config.max_model_len - 1, scheduler.max_num_batched_tokens))


def obstacles_to_measuring(config: Any) -> dict[str, bool]:
    """What may keep an engine from measuring its experts, be it on a text or on what it serves, and
    whether it is there."""
    parallel = config.parallel_config
    return {
        "data-parallel ranks run their experts in lockstep": parallel.data_parallel_size > 1,
        "each pipeline stage has a part of the layers": parallel.pipeline_parallel_size > 1,
        "context parallel splits the rows": parallel.prefill_context_parallel_size > 1
        or parallel.decode_context_parallel_size > 1,
        "expert load balancing (EPLB) moves and copies experts": parallel.enable_eplb,
        "adapters (LoRA) change the experts": config.lora_config is not None,
    }


def obstacle_to_reading(config: Any) -> str | None:
    """Why an engine of such a config cannot calibrate itself, or None."""
    model = config.model_config
    obstacles = {
        **obstacles_to_measuring(config),
        "a drafter would have to follow (speculative decoding)": (
            config.speculative_config is not None
        ),
        "KV connectors would take the text for a request": config.kv_transfer_config is not None,
        "the model reads more than text (encoder-decoder)": model.is_encoder_decoder,
        "the engine was started without a tokenizer": model.skip_tokenizer_init,
        "the order of the rows is not known (external_launcher)": (
            config.parallel_config.distributed_executor_backend == "external_launcher"
        ),
    }
    return next((reason for reason, there in obstacles.items() if there), None)


def read(worker: Any, observation: Observation, sequences: Sequence[list[int]]) -> None:
    """Let the worker's model read token sequences, each of at most `longest` tokens."""
    runner, made, began = worker.model_runner, 0, time.monotonic()
    said, known = began, set[str]()  # of which requests the runner knows
    with _as_written(worker), observation.watching():
        try:
            for part in _passes(runner, sequences, worker.vllm_config):
                requests = {_name(i): sequences[i] for i in part}
                parts = {_name(i): (i // _BATCH % FOLDS, is_held_out(i)) for i in part}
                observation.expect(parts)
                output, known = _whole(runner, requests, known), set(requests)
                run(worker, output)
                made += len(requests)
                if worker.rank == 0 and time.monotonic() - said > _PATIENCE:
                    said = time.monotonic()
                    _LOG.info("sere: calibrating: %d of %d texts", made, len(sequences))
        finally:  # where it fails, too, the engine may be wanted for stock routing
            end(worker, known)


def _name(number: int) -> str:
    return f"_sere_calibration_{number}_"


def _passes(runner: Any, sequences: Sequence[list[int]], config: Any) -> Iterator[list[int]]:
    """Numbers of sequences that are read together: as many as the scheduler would take."""
    scheduler, free = config.scheduler_config, free_blocks(runner)
    part: list[int] = []
    tokens = blocks = 0
    for i, sequence in enumerate(sequences):
        own = sum(taken(runner, len(sequence)))
        full = (
            len(part) == scheduler.max_num_seqs
            or tokens + len(sequence) > scheduler.max_num_batched_tokens
            or blocks + own > free
        )
        if part and full:
            yield part
            part, tokens, blocks = [], 0, 0
        part.append(i)
        tokens, blocks = tokens + len(sequence), blocks + own
    if part:
        yield part


def _whole(runner: Any, requests: Mapping[str, list[int]], ended: set[str]) -> Any:
    """vLLM's scheduler output for requests that are new and read whole."""
    lengths = {name: len(tokens) for name, tokens in requests.items()}
    blocks = places(runner, lengths.values())
    new = [joining(*request, own) for request, own in zip(requests.items(), blocks, strict=True)]
    return first_step(new, lengths, ended)


@contextmanager
def _as_written(worker: Any) -> Iterator[None]:
    """Neither compiled code, which would not see the observer, nor graphs."""
    compilation = worker.vllm_config.compilation_config
    size = compilation.max_cudagraph_capture_size
    try:
        compilation.max_cudagraph_capture_size = 0
        with written_out(worker):
            yield
    finally:
        compilation.max_cudagraph_capture_size = size


@contextmanager
def written_out(worker: Any) -> Iterator[None]:
    """No compiled code."""
    modules = [m for m in worker.get_model().modules() if hasattr(m, "do_not_compile")]
    compiled = [m.do_not_compile for m in modules]
    try:
        for module in modules:
            module.do_not_compile = True
        yield
    finally:
        for module, before in zip(modules, compiled, strict=True):
            module.do_not_compile = before
