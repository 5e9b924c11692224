"""Steps of an engine that nobody asked for: hand-made scheduler outputs, as vLLM's own warm-up
makes them, before there is a request. Their KV blocks are nobody's, and found by nobody after."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sere.serving.asking import KEY
from sere.serving.refusal import ServingError
from sere.serving.symbols import symbol

Blocks = tuple[list[int], ...]
"""Of one sequence, by group of caches."""
# Caches that hold a block for so many tokens, and no state that is carried from step to step.
_CACHES = (
    "FullAttentionSpec",
    "MLAAttentionSpec",
    "SlidingWindowSpec",
    "SlidingWindowMLASpec",
    "ChunkedLocalAttentionSpec",
    "SinkFullAttentionSpec",
)


def free_blocks(runner: Any) -> int:
    """Block 0 is nobody's."""
    return int(runner.kv_cache_config.num_blocks - 1)


def taken(runner: Any, tokens: int) -> list[int]:
    """Blocks that a sequence, and the token behind it, take of each group of caches. Raises
    `ServingError` where caches carry more than tokens."""
    found = []
    for group in runner.kv_cache_config.kv_cache_groups:
        spec = group.kv_cache_spec
        if type(spec).__name__ not in _CACHES:
            raise ServingError(
                f"sere cannot calibrate in this engine: its {type(spec).__name__} carries state "
                "from step to step, which hand-made steps might leave behind; calibrate with "
                "`sere calibrate` without --engine and name the table"
            )
        found.append(-(-(tokens + 1) // spec.block_size))
    return found


def places(runner: Any, lengths: Iterable[int]) -> list[Blocks]:
    """Blocks for sequences of so many tokens, one behind the other."""
    found, free = [], 1
    for tokens in lengths:
        own = []
        for count in taken(runner, tokens):
            own.append(list(range(free, free + count)))
            free += count
        found.append(tuple(own))
    return found


def joining(
    name: str, tokens: Sequence[int], blocks: Blocks, *, computed: int = 0, tier: str | None = None
) -> Any:
    """A request whose first tokens may have been computed. tier: what it asks of sere."""
    from vllm import SamplingParams

    return symbol("NewRequestData")(
        req_id=name,
        prompt_token_ids=list(tokens),
        mm_features=[],
        sampling_params=SamplingParams(
            temperature=0, max_tokens=1, extra_args={KEY: tier} if tier else None
        ),
        pooling_params=None,
        block_ids=blocks,
        num_computed_tokens=computed,
        lora_request=None,
        prefill_token_ids=list(tokens),
    )


def first_step(requests: Sequence[Any], rows: Mapping[str, int], ended: set[str]) -> Any:
    """The output of a scheduler that lets requests join, with so many rows each, as others end."""
    output = symbol("SchedulerOutput").make_empty()
    output.scheduled_new_reqs = list(requests)
    output.num_scheduled_tokens = dict(rows)
    output.total_num_scheduled_tokens = sum(rows.values())
    output.finished_req_ids = ended
    return output


def next_step(names: Sequence[str], computed: int) -> Any:
    """... where they go on with one row each, behind so many tokens."""
    output = symbol("SchedulerOutput").make_empty()
    known = output.scheduled_cached_reqs
    known.req_ids = list(names)
    known.new_block_ids = [None] * len(names)
    known.num_computed_tokens = [computed] * len(names)
    known.num_output_tokens = [0] * len(names)
    output.num_scheduled_tokens = dict.fromkeys(names, 1)
    output.total_num_scheduled_tokens = len(names)
    return output


def run(worker: Any, output: Any) -> None:
    """One step, what it samples is nobody's."""
    if worker.execute_model(output) is None:
        worker.sample_tokens(None)


def end(worker: Any, names: set[str]) -> None:
    """Let the worker forget requests."""
    output = symbol("SchedulerOutput").make_empty()
    output.finished_req_ids = names
    worker.execute_model(output)
