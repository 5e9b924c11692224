"""Is the model that vLLM is about to serve one that this table re-routes?

What the table was made for is compared with what vLLM has read from the model's config, overrides
included, and with the checkpoint's own files: in the first process, before weights are loaded.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from threading import Timer
from typing import Any

from sere.checkpoint import Fingerprint, expert_layers, weight_hashes
from sere.checkpoint.fingerprint import HASHING
from sere.serving.refusal import ServingError
from sere.serving.settings import Settings
from sere.table import Table, TableError

_LOG = logging.getLogger("vllm.sere")
_PATIENCE = 2.0  # seconds
_HASHING = (
    "sere: reading weights of %s, to know whether the table was made for them; a start without it: "
    '"fingerprint": "shape"'
)


def check_kind(config: Any) -> None:
    """Refuse models whose steps or experts are not what re-routing is about."""
    if config.model_config.runner_type == "pooling":
        raise ServingError(
            "sere cannot re-route: it re-routes decode steps, and a pooling engine has none; start "
            'without "sere" in additional_config, or with --runner generate'
        )
    if _substitutes(config.model_config):
        raise ServingError(
            "sere cannot re-route: this checkpoint replaces experts by constants (MoNE), of which "
            "a table knows nothing, and which cost nothing to load; serve the checkpoint that it "
            'was made from, or start without "sere" in additional_config'
        )


def _substitutes(model: Any) -> bool:
    """Whether vLLM (0.33) takes some experts for constants: what it reads from a config."""
    configs = (model.hf_config, model.hf_text_config)
    if any(getattr(config, "approximate_experts", None) for config in configs):
        return True
    compression = getattr(model.hf_config, "compression_config", None)
    parts: Any = compression
    for part in ("transform_config", "expert_substitution"):
        parts = parts.get(part) if isinstance(parts, Mapping) else None
    return bool(parts)


def check_model(config: Any, settings: Settings, table: Table) -> None:
    """Raise `TableError` unless the table was made for the model being served."""
    known, model = table.fingerprint, served(config, settings.fingerprint, table.fingerprint)
    try:
        table.check_against(model)
        if gone := sorted(set(known.layers) - set(model.layers)):
            raise TableError(f"the table has MoE layers that the model lacks: {gone}")
    except TableError as error:
        if not config.model_config.hf_overrides:
            raise
        raise TableError(
            f"{error}\n--hf-overrides is part of the model that you serve: calibrate a folder with "
            "links to its files and a config.json that says the same (docs/serving.md, "
            '"Overridden models"), or start without the override'
        ) from None


def served(config: Any, level: str, known: Fingerprint) -> Fingerprint:
    """The model as vLLM will build it; where nothing tells, as the table `known` has it.

    level: which hashes to compute, see `Settings.fingerprint`.
    """
    model, folder = config.model_config, model_folder(config)
    stored = expert_layers(folder) if folder else ()
    built = model.get_total_num_hidden_layers()
    hashes: tuple[str | None, str | None] = (None, None)
    if level != "shape" and folder is not None:
        router, experts = hashes_of(folder, known.layers, known.E, known.hashing)
        hashes = (router, experts if level == "weights" else None)
    return Fingerprint(
        model.hf_config.architectures[0],
        model.get_num_experts() or known.E,
        model.get_num_experts_per_tok() or known.K,
        tuple(index for index in stored or known.layers if index < built),
        *hashes,
        known.hashing,
    )


def hashes_of(
    folder: Path, layers: Iterable[int], E: int, hashing: int = HASHING
) -> tuple[str | None, str | None]:
    """`weight_hashes`, with a line in the log while they are waited for: on a slow disk a server
    would seem to hang."""
    told = Timer(_PATIENCE, _LOG.info, [_HASHING, folder])
    told.start()
    try:
        return weight_hashes(folder, layers, E, hashing)
    finally:
        told.cancel()
        told.join()  # no thread may be left where vLLM forks


def untold(config: Any) -> Fingerprint:
    """The model as vLLM will build it, where no table tells what it should be; without hashes. All
    layers have experts where the checkpoint does not tell: workers refuse what is not so.
    Raises `ServingError` for dense models."""
    model, folder = config.model_config, model_folder(config)
    E, K = model.get_num_experts(), model.get_num_experts_per_tok()
    if not (E and K):
        raise ServingError(
            "sere cannot calibrate in this engine: vLLM finds no routed experts in the model's "
            "config; is this a Mixture-of-Experts model?"
        )
    stored = expert_layers(folder) if folder else ()
    built = range(model.get_total_num_hidden_layers())
    layers = tuple(index for index in stored or built if index in built)
    return Fingerprint(model.hf_config.architectures[0], E, K, layers)


def model_folder(config: Any) -> Path | None:
    """The checkpoint on this machine: the folder itself, or the hub's local snapshot."""
    name, revision = config.model_config.model, config.model_config.revision
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, ValueError):
        return None
