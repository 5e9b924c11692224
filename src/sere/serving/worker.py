"""What sere does in vLLM's workers: classify the rows of each batch, check itself after warm-up,
answer `collective_rpc`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from sere.policy import Policy, PolicyError, in_words
from sere.serving import drafters, expert_kernels
from sere.serving.asking import asked_by, given
from sere.serving.loaded_maps import check_finalized
from sere.serving.refusal import ServingError
from sere.serving.reuse import obstacle_to_rows
from sere.serving.session import Session, is_dense_stage, open_session, session_of
from sere.serving.settings import merge_is_asked
from sere.serving.start_up import description
from sere.serving.symbols import rival, symbol
from sere.serving.telemetry import snapshot

_LOG = logging.getLogger("vllm.sere")


def classifying_v1(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps `GPUModelRunner._prepare_inputs` (V1; the CPU engine's too)."""

    def _prepare_inputs(
        runner: Any, scheduler_output: Any, num_scheduled_tokens: Any, *args: Any, **kwargs: Any
    ) -> Any:
        session = session_of(runner.vllm_config)
        if session is not None and session.observer is not None:
            batch = runner.input_batch
            lengths = num_scheduled_tokens[: batch.num_reqs]
            _observing(session, batch.req_ids, lengths, _prefilling_v1(batch))
        if session is not None and not session.live.dormant:
            with _classifying(session):
                batch = runner.input_batch
                R = batch.num_reqs
                prefilling = _prefilling_v1(batch)
                lengths = None
                if scheduler_output.total_num_scheduled_tokens != R:
                    lengths = num_scheduled_tokens[:R]
                    prefilling |= lengths > runner.vllm_config.uniform_decode_query_len
                session.begin(prefilling, lengths, batch.req_ids)
        return original(runner, scheduler_output, num_scheduled_tokens, *args, **kwargs)

    return _prepare_inputs


def classifying_v2(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps `GPUModelRunner.prepare_inputs` of model runner V2, the default on GPUs."""

    def prepare_inputs(runner: Any, *args: Any, **kwargs: Any) -> Any:
        batch = original(runner, *args, **kwargs)
        session = session_of(runner.vllm_config)
        if session is not None:
            lengths, total = batch.num_scheduled_tokens, batch.num_tokens
            if session.observer is not None:
                _observing(session, batch.req_ids, lengths, batch.is_prefilling_np)
            with _classifying(session):
                session.begin(batch.is_prefilling_np, lengths, batch.req_ids, total)
        return batch

    return prepare_inputs


def _prefilling_v1(batch: Any) -> Any:
    """[R] bool: which requests of a batch of model runner V1 still read their prompt."""
    R = batch.num_reqs
    return batch.num_computed_tokens_cpu[:R] < batch.num_prompt_tokens[:R]


def _observing(session: Session, requests: Any, lengths: Any, prefilling: Any) -> None:
    try:
        if session.observer is not None:
            session.observer.begin(requests, lengths, prefilling)
    except Exception as error:
        session.rows.incidents.survive("observing a step", error)


@contextmanager
def _classifying(session: Session) -> Iterator[None]:
    """Where it fails, no row of the coming pass is re-routed."""
    try:
        yield
    except Exception as error:
        session.begin_dummy()
        session.rows.incidents.survive("telling a batch's rows apart", error)


def tracking(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps what takes a scheduler's news about requests before each step: `_update_states` of
    model runner V1, `add_requests` of V2."""

    def take(runner: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        session = session_of(runner.vllm_config)
        if session is not None:
            try:
                _take_in(session, scheduler_output, runner.vllm_config.parallel_config.rank)
            except Exception as error:
                session.tiers.distrust()
                session.rows.incidents.survive("noting what requests ask for", error)
        return original(runner, scheduler_output, *args, **kwargs)

    return take


def _take_in(session: Session, news: Any, rank: int) -> None:
    if news.finished_req_ids:
        session.end(news.finished_req_ids)
        session.tiers.remove(news.finished_req_ids)
    session.latest.forget()
    for new in news.scheduled_new_reqs:
        session.tiers.add(new.req_id, asked_by(new.sampling_params))
        if session.incidents.serving and session.rows.gate == "decode":
            session.only_prompts.note(new.sampling_params, says=rank == 0)


def voiding(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps `_dummy_run` and `capture_model`: profiling, warm-up, capture and idle data-parallel
    ranks have no real row, whatever ran before them."""

    def run(runner: Any, *args: Any, **kwargs: Any) -> Any:
        session = session_of(runner.vllm_config)
        if session is not None:
            session.begin_dummy()
        return original(runner, *args, **kwargs)

    return run


def self_checking(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a worker's `compile_or_warm_up_model`, the last step before it serves."""

    def compile_or_warm_up_model(worker: Any) -> Any:
        result = original(worker)
        if given(worker.vllm_config) is not None:
            self_check(worker)
            sere_reset(worker)  # model runner V2 warms up with requests that look real
            session = session_in(worker)
            session.checked = session.rows.incidents.serving = True
        return result

    return compile_or_warm_up_model


def self_check(worker: Any) -> None:
    """Raise `ServingError` unless every MoE layer of this worker really re-routes."""
    runners = check_layers(worker.vllm_config)
    if not all(runner.sere.called for runner in runners):
        worker.model_runner._dummy_run(1)
    silent = [runner.layer_name for runner in runners if not runner.sere.called]
    if silent:
        raise ServingError(
            f"sere's operator was never called in {', '.join(silent)}; please report"
        )


def check_layers(config: Any) -> list[Any]:
    """The MoE layers of the model that was built under this config; `ServingError` unless all are
    bound, each to a kernel that does as its router says."""
    session, runners = session_of(config), _runners(config)
    if not runners and is_dense_stage(config):
        return []
    if session is None or not runners:
        raise ServingError(
            "sere found no MoE layer to re-route: is this a Mixture-of-Experts model? (Models that "
            "call expert kernels by themselves are not supported.)"
        )
    if reason := rival():
        raise ServingError(f"sere cannot re-route: {reason}")
    session.check_bound(config)
    for runner in runners:
        _check_runner(runner)
        check_finalized(runner)
    return runners


def _check_runner(runner: Any) -> None:
    if getattr(runner, "sere", None) is None:
        raise ServingError(
            f"sere is not bound to {runner.layer_name}: its router was not made by vLLM's factory"
        )
    if runner.is_monolithic:
        raise ServingError(
            f"{runner.layer_name} runs a kernel that routes inside itself, which sere cannot "
            "reach: start vLLM with --moe-backend triton (or another modular backend)"
        )
    if runner.do_naive_dispatch_combine:
        raise ServingError(
            f"{runner.layer_name} gathers all data-parallel ranks' rows before it routes, and sere "
            "knows the classes of its own only: use tensor parallel, or a quantisation whose "
            "kernels dispatch after routing"
        )


# --- methods that `collective_rpc` finds on the worker ----------------------------------------


def sere_policy(worker: Any, settings: Mapping[str, Any] | str | None) -> None:
    """Switch the live policy: settings as in `Policy.from_dict`, "start" for what the engine began
    with, or None for stock routing. Raises what is wrong with it, and changes nothing then."""
    session = session_in(worker)
    before = in_words(session.policy)
    policy = session.named(settings)
    if reason := _kept_apart(worker, session, policy):
        raise ServingError(reason)
    session.set_policy(policy)
    if worker.rank == 0:
        _LOG.info("sere: routing is %s from now on, was %s", in_words(session.policy), before)


def sere_obstacle(worker: Any, settings: Mapping[str, Any] | str | None) -> str | None:
    """Why `sere_policy` would be refused, or None."""
    try:
        session = session_in(worker)
        policy = session.named(settings)
        session.check_policy(policy)
    except (PolicyError, ServingError) as error:
        return str(error)
    return _kept_apart(worker, session, policy)


def _kept_apart(worker: Any, session: Session, policy: Policy | None) -> str | None:
    """Why KV blocks of fast and exact requests could not be kept apart under a policy, or None."""
    started = session.settings.policy
    reason = policy and obstacle_to_rows(worker.vllm_config, started, policy)
    return f"sere cannot switch to this policy: {reason}" if reason else None


def sere_description(worker: Any) -> dict[str, Any]:
    """See `sere.serving.start_up.description`; asked for at start-up, of every worker."""
    return description(_checked(worker), kernels_of(worker.vllm_config))


def sere_layers(worker: Any) -> list[int]:
    """Which decoder layers this worker re-routes."""
    return sorted(_checked(worker).layers)


def sere_stats(worker: Any) -> dict[int, dict[str, int]]:
    """Counters of every layer since start or `sere_reset`, by decoder layer index."""
    return {index: layer.stats() for index, layer in sorted(session_in(worker).layers.items())}


def sere_telemetry(worker: Any) -> dict[str, Any]:
    """See `sere.serving.telemetry.snapshot`; also while the engine sleeps."""
    return snapshot(session_in(worker, asleep=True))


def sere_reset(worker: Any) -> None:
    """Set all counters to zero."""
    session = session_in(worker)
    session.live.reset()
    session.latest.forget()
    if session.shadow is not None:
        session.shadow.reset()


def sere_merge(worker: Any, on: bool) -> None:
    """Does nothing, for callers of 0.1; goes with the next version."""
    merge_is_asked()


def sere_record(worker: Any, on: bool) -> None:
    """Start (or stop) keeping every batch's routing on the host, for checks. Not for graphs."""
    session_in(worker).record(on)


def sere_recording(worker: Any) -> dict[int, list[tuple[Any, ...]]]:
    """What `sere_record` kept: (ids, weights, rows, new ids, new weights) as nested lists, by layer
    and call."""
    return {
        index: [tuple(tensor.tolist() for tensor in batch) for batch in layer.recording or []]
        for index, layer in sorted(session_in(worker).layers.items())
    }


REMOTE_CALLS = (
    sere_description,
    sere_layers,
    sere_policy,
    sere_obstacle,
    sere_stats,
    sere_telemetry,
    sere_reset,
    sere_merge,
    sere_record,
    sere_recording,
)


def _runners(config: Any) -> list[Any]:
    """Those of the MoE layers that are to be re-routed."""
    context = config.compilation_config.static_forward_context
    return [
        layer
        for layer in context.values()
        if isinstance(layer, symbol("MoERunner")) and not drafters.owns(layer)
    ]


def kernels_of(config: Any) -> list[tuple[str, str]]:
    """Of each layer that is to be re-routed: the kernel that serves, and stock vLLM's."""
    return [(expert_kernels.serving(r), expert_kernels.of_stock(r)) for r in _runners(config)]


def _checked(worker: Any) -> Session:
    """The session of a worker that has checked that it re-routes; `ServingError` if it has not."""
    session = session_in(worker)
    if not session.checked:
        raise ServingError(f"{type(worker).__name__} has not checked itself: it was made unnoticed")
    return session


def session_in(worker: Any, *, asleep: bool = False) -> Session:
    session = session_of(worker.vllm_config)
    if session is None and given(worker.vllm_config) is not None:
        session = open_session(worker.vllm_config)  # a pipeline stage without MoE layers
    if session is None:
        raise ServingError('this engine was started without {"sere": ...} in additional_config')
    if session.asleep and not asleep:
        raise ServingError("the engine sleeps and its buffers are unmapped: wake it up first")
    return session
