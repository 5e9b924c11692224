"""May an engine of this config start? Asked in the first process, before weights are loaded."""

from __future__ import annotations

from typing import Any

from sere.serving import self_calibration
from sere.serving.invariance import check_default
from sere.serving.loaded_maps import obstacle_to_maps, ranks_to_load
from sere.serving.model_fit import check_kind, check_model
from sere.serving.no_table import NoTable
from sere.serving.parallel import obstacle_to_one_union, obstacle_to_placement
from sere.serving.refusal import ServingError
from sere.serving.reuse import obstacle_to_reuse
from sere.serving.session import settings_of, table_of
from sere.serving.settings import Settings
from sere.serving.symbols import lacking


def check_config(config: Any) -> None:
    """Refuse, in the first process and before weights are loaded, what cannot work."""
    check_kind(config)
    _check_rows_are_known(config)
    if reason := obstacle_to_reuse(config):
        raise ServingError(
            f"sere cannot keep the KV blocks of fast and exact requests apart: {reason}"
        )
    settings = settings_of(config)
    _check_ranks(config, settings)
    if settings.shadow is not None:
        _check_shadow(config)
    table = table_of(config, settings)
    check_default(config, settings, table.fingerprint)
    if isinstance(table, NoTable):
        table.check_asked(settings.policy, settings.auto.maps if settings.auto else None)
    else:
        table.check_policy(settings.policy)
    if ranks_to_load(settings, table) and (reason := obstacle_to_maps(config)):
        raise ServingError(f"sere cannot let linear maps answer for experts here: {reason}")
    if isinstance(table, NoTable):
        self_calibration.check(config, settings)
    else:
        check_model(config, settings, table)


def _check_rows_are_known(config: Any) -> None:
    """Refuse modes in which a layer sees other rows than the scheduler's batch and its padding."""
    parallel = config.parallel_config
    modes = {
        "sequence-parallel MoE (tensor with expert and data parallel) shards the rows; use tensor "
        "parallel, or data and expert parallel": parallel.use_sequence_parallel_moe,
        "dual-batch overlap (--enable-dbo, --ubatch-size) splits the rows; start without it": (
            parallel.use_ubatching
        ),
        "prefill context parallel splits the rows; set --prefill-context-parallel-size 1": (
            parallel.prefill_context_parallel_size > 1
        ),
        "--kv-sharing-fast-prefill drops rows between layers; start without it": (
            config.cache_config.kv_sharing_fast_prefill
        ),
    }
    for reason, asked in modes.items():
        if asked:
            raise ServingError(f"sere cannot re-route: {reason}")


def _check_ranks(config: Any, settings: Settings) -> None:
    """Refuse what other ranks would have to do and cannot, or what none would ever notice."""
    if settings.union == "all" and (
        reason := obstacle_to_one_union(config, settings.policy.batches)
    ):
        raise ServingError(f'sere cannot take "union": "all" here: {reason}. Or remove "union"')
    if settings.placement and (reason := obstacle_to_placement(config)):
        raise ServingError(f'sere cannot look at "placement" here: {reason}; or remove it')


def _check_shadow(config: Any) -> None:
    """Refuse the shadow check where it cannot run."""
    parallel = config.parallel_config
    reason = None
    if not config.model_config.enforce_eager:
        reason = "graphs would freeze it; add enforce_eager=True (--enforce-eager)"
    elif parallel.data_parallel_size > 1:
        reason = "data-parallel engines run their experts in lockstep"
    elif parallel.enable_eplb:
        reason = (
            "with expert load balancing (EPLB) the router's choice is not what experts are given"
        )
    if reason := reason or lacking("shadow"):
        raise ServingError(f'sere cannot run the shadow check here: {reason}; or remove "shadow"')
