"""A question to all workers of all engines behind an API server."""

from __future__ import annotations

from typing import Any


async def ask_engines(client: Any, method: str, *args: Any) -> dict[int, list[Any]]:
    """By engine (data-parallel) index what its workers answer, in rank order.

    client: vLLM's `AsyncLLM`. method: what `collective_rpc` finds on a worker. Engines answer
    between two steps; raises what one of them raises.
    """
    core = client.engine_core
    call = ("collective_rpc", method, None, args, None)
    answers = await core.call_utility_all_async(*call)
    return dict(zip(core.engine_ranks_managed, map(list, answers), strict=True))
