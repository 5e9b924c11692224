"""Where KV blocks may be found again, and whether it can be told there who wrote them.

`prefix_cache` tells blocks apart by their hashes. A connector that finds blocks by tokens alone
would hand what a fast request decoded to an exact one: only connectors on a list may serve.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from sere.policy import Policy
from sere.serving.symbols import lacking

BY_HASH = ("OffloadingConnector", "SimpleCPUOffloadConnector", "MooncakeStoreConnector")
BY_REQUEST = (
    "NixlConnector",
    "NixlPullConnector",
    "NixlPushConnector",
    "MooncakeConnector",
    "MoRIIOConnector",
    "HiSparseConnector",
)
"""Those of vLLM's own that, by the sources of 0.32 and 0.33, find what they stored by a block's
hash, and those that move blocks for one request and keep none for another."""
_SEVERAL = "MultiConnector"


def caches(config: Any) -> bool:
    """Whether an engine can find blocks again, in its own cache or in a store."""
    return bool(config.cache_config.enable_prefix_caching or config.kv_transfer_config)


def obstacle_to_reuse(config: Any) -> str | None:
    """Why an exact request could find what a fast one decoded, and what to do; or None."""
    if not caches(config):
        return None
    if reason := lacking("prefix cache"):
        return f"{reason}, which tells blocks apart; start with --no-enable-prefix-caching"
    for given in _connectors(config.kv_transfer_config):
        name = given.get("kv_connector")
        known = name in BY_HASH + BY_REQUEST and not given.get("kv_connector_module_path")
        if not known:
            return (
                f"the KV connector {name} may find blocks by their tokens alone; start without it, "
                f"or with one of {', '.join(BY_HASH + BY_REQUEST)}"
            )
        if (given.get("kv_connector_extra_config") or {}).get("bidirectional_kv_xfer"):
            return f"{name} fetches answers back as prompts; remove bidirectional_kv_xfer"
    return None


def obstacle_to_rows(config: Any, started: Policy, policy: Policy) -> str | None:
    """Why a live engine cannot take these rows, and what to do; or None. started: its first policy,
    by which the scheduler tells prompts apart."""
    if policy.rows == started.rows or policy.rows == "decode" or not caches(config):
        return None
    return (
        'prompts that "rows": "all" re-routes would be found by exact requests; start the engine '
        "with it, or with --no-enable-prefix-caching"
    )


def _connectors(transfer: Any) -> Iterator[Mapping[str, Any]]:
    """Each connector as the dict that configures it."""
    if transfer is None or transfer.kv_connector is None:
        return
    extra = transfer.kv_connector_extra_config
    if transfer.kv_connector == _SEVERAL and not transfer.kv_connector_module_path:
        yield from extra.get("connectors", ())
    else:
        yield {
            "kv_connector": transfer.kv_connector,
            "kv_connector_module_path": transfer.kv_connector_module_path,
            "kv_connector_extra_config": extra,
        }
