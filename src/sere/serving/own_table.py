"""What a worker is asked about a table that its engine makes for itself: to read text for it, to
watch traffic for it, to go live with it, to show it."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

from sere.maps import LayerMaps, Maps
from sere.policy import PolicyError, in_words
from sere.serving import trial
from sere.serving.fitted_maps import at_once, fitted
from sere.serving.invariance import may_be_asked_for
from sere.serving.no_table import NoTable
from sere.serving.observing import Observation
from sere.serving.reading import read
from sere.serving.refusal import ServingError
from sere.serving.table_cache import file_of, table_in
from sere.serving.traffic import Watch, Watched
from sere.serving.worker import check_layers, sere_obstacle, sere_reset, session_in
from sere.statistics import LayerStatistics

_LOG = logging.getLogger("vllm.sere")

Measured = tuple[str, LayerStatistics, LayerMaps | None]
"""A layer's name, its statistics, and its maps if they were asked for."""


def _refusing(call: Callable[..., Any]) -> Callable[..., Any]:
    """Whatever fails on a rank is its refusal, and travels as one: see `remote.refusing_once`."""

    @functools.wraps(call)
    def ask(*args: Any, **kwargs: Any) -> Any:
        try:
            return call(*args, **kwargs)
        except (PolicyError, ServingError):
            raise
        except Exception as error:
            _LOG.exception("sere: a rank cannot do its part of the engine's own table")
            said = str(error) or type(error).__name__
            raise ServingError(f"sere cannot calibrate in this engine: {said}") from error

    return ask


@_refusing
def sere_calibrate(
    worker: Any,
    sequences: list[list[int]],
    method: str,
    rank: int | None = None,
    done: Collection[int] = (),
) -> dict[int, Measured] | None:
    """Let the model read token sequences and measure its experts, by decoder layer index; None of
    ranks that are not the first.

    rank: of the linear maps to fit as well; then of some of the layers, beside those that are done.
    """
    session, runners = session_in(worker), check_layers(worker.vllm_config)
    runners = [runner for runner in runners if runner.layer_id not in done]
    tokens = sum(map(len, sequences))
    if rank is not None:
        runners = runners[: at_once(runners, tokens, worker.model_config.dtype)]
    observation = _observation(worker, runners, method, serves=False, keeps=rank is not None)
    session.observer = observation
    try:
        read(worker, observation, sequences)
    finally:
        session.observer = None
    maps: dict[int, LayerMaps] = {}
    observation.agree(worker.device)
    if rank is None:
        found = observation.finished(tokens)
    else:
        found, maps = fitted(worker, observation, tokens, rank)
    if found is None:
        return None
    return {r.layer_id: (r.layer_name, found[(i := r.layer_id)], maps.get(i)) for r in runners}


@_refusing
def sere_take_maps(worker: Any, index: int, layer: LayerMaps) -> None:
    """Put one layer's maps where room was reserved; none answers before the table is there."""
    session = session_in(worker)
    if session.answers is None:
        raise ServingError("sere has no place for maps: the engine was started without")
    session.answers.learn(index, layer)


@_refusing
def sere_watch(worker: Any, watched: Watched) -> None:
    """Route as stock does, and measure experts on rows of prompts, until that makes a table."""
    session, runners = session_in(worker), check_layers(worker.vllm_config)
    observation = _observation(worker, runners, watched.method, serves=True)
    session.take(NoTable(session.table.fingerprint, watched.in_words))
    session.observer = session.traffic = Watch(worker, observation, watched, session)


@_refusing
def sere_take_table(
    worker: Any, data: bytes | None, reason: str = "", maps: Maps | None = None
) -> None:
    """Go live with a table's file, and with the policy that `sere tune` has stored in it meanwhile
    if the user named none; None if there is no table, and why. maps: those that were taken before.
    """
    session = session_in(worker)
    if data is None:
        session.take(NoTable(session.table.fingerprint, reason))
        return
    table = replace(table_in(data), maps=maps)
    session.learn(table)
    if table.policy is None or session.settings.named:
        session.begin_with(session.policy)
        return
    obstacle = sere_obstacle(worker, table.policy.to_dict())
    policy = session.settings.policy if obstacle else table.policy
    session.independent = may_be_asked_for(worker.vllm_config, policy, table.fingerprint)
    session.begin_with(policy)
    if obstacle:
        told = (
            "the policy that `sere tune` stored in the table cannot be taken by an engine that "
            f'calibrates itself, name the table itself ({{"table": PATH}}): {obstacle}'
        )
    else:
        told = f"the policy is the choice of `sere tune`: {in_words(policy)}"
    if worker.rank == 0:
        _LOG.log(logging.WARNING if obstacle else logging.INFO, "sere: %s", told)


def sere_table(worker: Any) -> bytes:
    """The file of the table that this worker goes by. Raises `ServingError` if it has none."""
    session = session_in(worker)
    if isinstance(session.table, NoTable):
        raise ServingError(session.table.reason)
    return file_of(session.table)


def sere_room_to_try(worker: Any) -> int:
    """See `sere.serving.trial.room`."""
    return trial.room(worker)


def sere_try(worker: Any, texts: list[list[int]]) -> dict[str, Any] | None:
    """See `sere.serving.trial.try_out`; counters are as at a start, after."""
    try:
        return trial.try_out(worker, session_in(worker), texts)
    finally:
        sere_reset(worker)


REMOTE_CALLS = (
    sere_calibrate,
    sere_watch,
    sere_take_maps,
    sere_take_table,
    sere_table,
    sere_room_to_try,
    sere_try,
)


def _observation(
    worker: Any, runners: list[Any], method: str, *, serves: bool, keeps: bool = False
) -> Observation:
    config = worker.vllm_config
    return Observation(
        runners,
        method,
        rows=config.scheduler_config.max_num_batched_tokens,
        adds_up=worker.rank == 0,
        ranks=config.parallel_config.tensor_parallel_size,
        serves=serves,
        keeps=keeps,
    )
