"""Questions to all workers, of all engines behind an API server, and what a refusal does."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from sere.policy import PolicyError
from sere.serving.refusal import ServingError


def refusing_once(call: Callable[..., Any]) -> Callable[..., Any]:
    """A remote call as workers have it: what all of them refuse, the last one raises, and the
    others return as text.

    vLLM's executor reads answers in rank order and stops at the first error. Those behind it stay
    in their queues, and each later call would be given the answers to the one before.
    """

    @functools.wraps(call)
    def answer(worker: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return call(worker, *args, **kwargs)
        except (PolicyError, ServingError) as error:
            if _is_last(worker):
                raise
            return str(error)

    return answer


def _is_last(worker: Any) -> bool:
    """Of those that answer one executor."""
    parallel = worker.vllm_config.parallel_config
    if parallel.distributed_executor_backend == "external_launcher":
        return True  # each has an executor of its own
    return bool(worker.rank == parallel.world_size - 1)


def ask_workers(executor: Any, what: str, call: str, *arguments: Any) -> list[Any]:
    """What every worker of an executor answers, in rank order. Raises `ServingError` for what one
    refuses; what: that then cannot be done."""
    try:
        told = executor.collective_rpc(call, args=arguments)
    except (ServingError, PolicyError) as error:
        raise ServingError(str(error)) from error
    except Exception as error:  # from another process it comes as vLLM's own
        raise ServingError(f"sere cannot {what}: {error}") from error
    if refused := [answer for answer in told if isinstance(answer, str)]:
        raise ServingError(refused[0])
    return list(told)


async def ask_engines(client: Any, method: str, *args: Any) -> dict[int, list[Any]]:
    """By engine (data-parallel) index what its workers answer, in rank order.

    client: vLLM's `AsyncLLM`. method: what `collective_rpc` finds on a worker. Engines answer
    between two steps; raises what one of them raises.
    """
    core = client.engine_core
    call = ("collective_rpc", method, None, args, None)
    answers = await core.call_utility_all_async(*call)
    return dict(zip(core.engine_ranks_managed, map(list, answers), strict=True))
