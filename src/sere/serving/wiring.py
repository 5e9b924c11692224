"""Where re-routing meets the engine: what is put into vLLM once a config asks for it.

vLLM has no stable hook between router and experts, so a few private symbols (all named in
`contract`) are wrapped, once per process, before a model is built:

* the config's hash: only what changes compiled code counts in it (see `compile_key`);
* the router factory: every router becomes an instance of a subclass that re-routes its choice;
* the constructor of a layer's runner: plan, counters and row classes are attached to it;
* the scheduler: what fast requests wrote into the KV cache is told apart (see `prefix_cache`);
* kernel selection: kernels that route by themselves are refused, re-routing could not reach them;
* model runners and workers: see `worker`.

An engine without "sere" in the same process passes straight through every wrapper.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from sere.policy import PolicyError
from sere.serving import (
    admission,
    drafters,
    expert_kernels,
    first_report,
    last_word,
    may_ask,
    own_table,
    prefix_cache,
    rust_front_end,
    second_engine,
    self_calibration,
    start_up,
    telemetry,
    worker,
)
from sere.serving.admin_key import check_admin_key
from sere.serving.asking import given
from sere.serving.compile_key import keyed
from sere.serving.contract_front_end import LAST, RUST
from sere.serving.may_start import check_config
from sere.serving.parallel import expert_ranks
from sere.serving.probe import sere_probe
from sere.serving.refusal import (
    ServingError,
    debugging,
    expect_word,
    leaving_word,
    say_plainly,
)
from sere.serving.remote import refusing_once
from sere.serving.session import open_session
from sere.serving.symbols import here, lacking, module_of, obstacle, symbol, wrap
from sere.table import TableError

_LOG = logging.getLogger("vllm.sere")


def admit(config: Any) -> None:
    """Make this process re-route engines of such a config, or refuse it: raises `ServingError`."""
    if drafters.is_drafters(config):
        return
    try:
        _admit(config)
    except (ServingError, PolicyError, TableError) as error:
        say_plainly()
        # a ValueError would come wrapped by pydantic
        raise ServingError(str(error)) from (error if debugging() else None)


def _admit(config: Any) -> None:
    asked = given(config)
    any_version = isinstance(asked, Mapping) and asked.get("any_version") is True
    if reason := obstacle(any_version=any_version):
        raise ServingError(f"sere cannot re-route: {reason}")
    install()
    check_config(config)
    expect_word()
    has_key = check_admin_key(asked or {})
    if has_key and (reason := lacking("metrics")):
        raise ServingError(f"sere cannot give an operator's key a route: {reason}")
    admission.wrap_front_end()
    _watch_starts()
    _export_metrics()


@functools.cache
def install() -> None:
    """Wrap what is not the worker's own; once per process. Raises `ServingError`."""
    if reason := obstacle(any_version=True):
        raise ServingError(f"sere cannot re-route: {reason}")
    wrap(symbol("VllmConfig"), "compute_hash", keyed)
    if second_engine.in_the_way():
        second_engine.allow()
    _define_operator()
    wrap(module_of("create_fused_moe_router"), "create_fused_moe_router", _rerouting_factory)
    wrap(symbol("MoERunner"), "__init__", _binding)
    experts = symbol("FusedMoEExperts")
    experts.is_supported_config = staticmethod(
        expert_kernels.vetoing(experts.is_supported_config, _is_to_reroute)
    )
    wrap(symbol("Executor"), "initialize_from_config", prefix_cache.opening)
    wrap(symbol("Executor"), "compile_or_warm_up_model", _asking_every_worker)
    wrap(symbol("Executor"), "initialize_from_config", leaving_word)
    wrap(symbol("Executor"), "compile_or_warm_up_model", leaving_word)
    wrap(symbol("InputProcessor"), "_validate_params", admission.admitting)
    runner = symbol("ModelRunnerV1")
    wrap(runner, "_prepare_inputs", worker.classifying_v1)
    wrap(runner, "_update_states", worker.tracking)
    wrap(runner, "_dummy_run", worker.voiding)
    wrap(runner, "capture_model", worker.voiding)
    if here("ModelRunnerV2"):
        runner = symbol("ModelRunnerV2")
        wrap(runner, "prepare_inputs", worker.classifying_v2)
        wrap(runner, "add_requests", worker.tracking)
        wrap(runner, "_dummy_run", worker.voiding)
        wrap(runner, "capture_model", worker.voiding)
    for call in (*worker.REMOTE_CALLS, *own_table.REMOTE_CALLS, sere_probe):
        setattr(symbol("WorkerBase"), call.__name__, refusing_once(call))


def install_in_worker(own: Any, config: Any) -> None:
    """Wrap the class of worker that vLLM chose, which need not be one that this file could name.

    Raises `ServingError` if its engine is to sleep and it does not say when.
    """
    wrap(own, "load_model", drafters.telling_apart)
    wrap(own, "compile_or_warm_up_model", worker.self_checking)
    wrap(own, "compile_or_warm_up_model", leaving_word)
    wrap(own, "load_model", leaving_word)
    if hasattr(own, "sleep") and hasattr(own, "wake_up"):
        wrap(own, "sleep", telemetry.falling_asleep)
        wrap(own, "wake_up", telemetry.waking_up)
    elif config.model_config.enable_sleep_mode:
        raise ServingError(
            f"sere cannot follow an engine that sleeps: {own.__name__} has no sleep and wake_up; "
            "start without it"
        )


def _asking_every_worker(original: Callable[..., None]) -> Callable[..., None]:
    def compile_or_warm_up_model(executor: Any) -> None:
        own = None
        if given(executor.vllm_config) is not None:
            own = self_calibration.prepare(executor)
        original(executor)
        if given(executor.vllm_config) is None:
            return
        admission.wrap_engine()
        try:
            told = executor.collective_rpc(worker.sere_description.__name__)
        except Exception as error:
            raise ServingError(
                "sere is not loaded in every worker: install the same version on every host, and "
                f"let VLLM_PLUGINS name 'sere' there if it is set ({error})"
            ) from error
        if refused := [answer for answer in told if isinstance(answer, str)]:
            raise ServingError(refused[0])
        start_up.say(told, own.path if own else None)
        may_ask.hear(executor.vllm_config, executor.collective_rpc("sere_telemetry")[0])
        first_report.tell(executor, own, told)

    return compile_or_warm_up_model


@functools.cache
def _watch_starts() -> None:
    """Of an engine that may re-route nothing, and of the server that has nothing of ours."""
    if not lacking(LAST):
        wrap(symbol("PoolingOfflineMixin"), "__init__", last_word.starting)
    if not lacking(RUST):
        wrap(symbol("RustFrontendProcessManager"), "__init__", rust_front_end.starting)


@functools.cache
def _export_metrics() -> None:
    """Put sere's metrics on `/metrics`; called where a config is made, so not in workers."""
    if reason := lacking("metrics"):
        _LOG.warning("sere: no metrics on /metrics: %s", reason)
        return
    from sere.serving.frontend import exporting

    wrap(module_of("attach_router"), "attach_router", exporting)


def _current_config() -> Any:
    return symbol("get_current_vllm_config")()


def _is_to_reroute() -> bool:
    """Whether layers of the model that is being built are to be re-routed."""
    return not drafters.is_loading() and given(_current_config()) is not None


def _rerouting_factory(original: Callable[..., Any]) -> Callable[..., Any]:
    def create_fused_moe_router(*args: Any, **kwargs: Any) -> Any:
        router = original(*args, **kwargs)
        if _is_to_reroute():
            router.__class__ = _rerouting(router.__class__)
        return router

    return create_fused_moe_router


@functools.cache
def _rerouting(router: Any) -> type:
    """A subclass of a router class that re-routes what it chose.

    A subclass and not a proxy: vLLM asks routers for their type and reads their state.
    """
    if "Simulator" in router.__name__:
        raise ServingError(f"sere cannot re-route {router.__name__}: it invents its routes")

    choose = router._compute_routing

    def _compute_routing(self: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        weights, ids = choose(self, *args, **kwargs)
        layer = self._sere
        if layer.traced and torch.compiler.is_compiling():
            ids = torch.ops.sere.reroute(ids, weights, layer.name)
        else:
            ids = layer.forward(ids, weights)
        return weights, ids

    members = {
        "_compute_routing": _compute_routing,
        # Read by vLLM 0.33: no kernel that routes inside itself. 0.32 needs `expert_kernels`.
        "supports_monolithic_kernels": False,
    }
    return type(f"Rerouting{router.__name__}", (router,), members)


def _binding(original: Callable[..., None]) -> Callable[..., None]:
    def __init__(runner: Any, *args: Any, **kwargs: Any) -> None:
        original(runner, *args, **kwargs)
        if drafters.is_loading():
            drafters.claim(runner)
        if not _is_to_reroute():
            return
        config = _current_config()
        session = open_session(config)
        runner.sere = session.bind(
            runner.layer_id,
            runner.layer_name,
            E=runner.moe_config.num_logical_experts,
            K=runner.router.top_k,
            ranks=expert_ranks(runner, config),
        )
        if session.answers is not None:
            runner.sere.stand_ins = session.answers.attach(runner)
        runner.sere.traced = not config.model_config.enforce_eager
        runner.router._sere = runner.sere
        if session.shadow is not None:
            session.shadow.watch(runner.layer_id, runner.sere, runner.routed_experts)

    return __init__


# --- the operator as vLLM sees it -------------------------------------------------------------

_LIBRARY: Any = torch.library.Library("sere", "FRAGMENT")  # type: ignore[no-untyped-call]


def _define_operator() -> None:
    """`torch.ops.sere.reroute`, and what maps add around the experts: opaque to torch.compile,
    which on the CPU traces through routers and would freeze what they saw while tracing."""
    _LIBRARY.define("reroute(Tensor topk_ids, Tensor(a!) topk_weights, str layer_name) -> Tensor")
    _LIBRARY.impl("reroute", _reroute, "CompositeExplicitAutograd")
    torch.library.register_fake("sere::reroute", _like_ids, lib=_LIBRARY)
    _LIBRARY.define("ask(Tensor x, Tensor topk_ids, str layer_name, int rank) -> Tensor")
    _LIBRARY.impl("ask", _ask, "CompositeExplicitAutograd")
    torch.library.register_fake("sere::ask", _like_inner, lib=_LIBRARY)
    _LIBRARY.define("answer(Tensor(a!) output, Tensor inner, str layer_name) -> ()")
    _LIBRARY.impl("answer", _answer, "CompositeExplicitAutograd")
    torch.library.register_fake("sere::answer", lambda *_: None, lib=_LIBRARY)


def _reroute(topk_ids: Tensor, topk_weights: Tensor, layer_name: str) -> Tensor:
    layers = symbol("get_forward_context")().no_compile_layers
    own = topk_ids.clone() if topk_ids.is_cuda else topk_ids  # GPUs may work in place
    ids: Tensor = layers[layer_name].sere.forward(own, topk_weights)
    return ids.clone() if ids is topk_ids else ids  # an operator must not return its input


def _ask(x: Tensor, topk_ids: Tensor, layer_name: str, rank: int) -> Tensor:
    """After the operator, whose choice it is given for the sake of that order."""
    inner: Tensor = _stand_ins(layer_name).ask(x)
    return inner


def _answer(output: Tensor, inner: Tensor, layer_name: str) -> None:
    _stand_ins(layer_name).answer_(output, inner)


def _stand_ins(layer_name: str) -> Any:
    return symbol("get_forward_context")().no_compile_layers[layer_name].sere.stand_ins


def _like_inner(x: Tensor, topk_ids: Tensor, layer_name: str, rank: int) -> Tensor:
    return x.new_empty(*topk_ids.shape, rank, dtype=torch.float32)


def _like_ids(topk_ids: Tensor, topk_weights: Tensor, layer_name: str) -> Tensor:
    return torch.empty_like(topk_ids)
