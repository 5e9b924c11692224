"""An engine calibrates itself, or finds the table that one like it has made: before it warms up,
in the process that drives the workers.

Every worker begins without a table and is handed one, the same bytes each, be it found or made.
"""

from __future__ import annotations

import logging
import platform
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sere import __version__
from sere.checkpoint import Fingerprint
from sere.checkpoint.quantised import settings as quantisation
from sere.checkpoint.samples import sample_hash
from sere.files import plainly
from sere.maps import LayerMaps, identity_of
from sere.serving.auto import Auto
from sere.serving.contract import CALIBRATION
from sere.serving.model_fit import hashes_of, model_folder, untold
from sere.serving.own_maps import Own
from sere.serving.own_table import Measured
from sere.serving.own_text import corpus_for, obstacle_in_text
from sere.serving.reading import longest, obstacle_to_reading
from sere.serving.refusal import ServingError
from sere.serving.remote import ask_workers
from sere.serving.session import settings_of
from sere.serving.settings import Settings
from sere.serving.symbols import lacking, vllm_version
from sere.serving.table_cache import CacheTrouble, Entry
from sere.serving.traffic import Watched, obstacle_to_watching
from sere.similarity.enough import first_with_too_little, in_words
from sere.table import Table
from sere.text.bundled import BUNDLED
from sere.text.corpus import CorpusError, file_hash

_LOG = logging.getLogger("vllm.sere")
_FORM = 1  # of what is measured; another one makes other keys
_MEASURE = (
    " (`sere evaluate MODEL` with this table tells what a policy costs; `sere tune MODEL` with it "
    "stores one that was measured, which later starts take if you name none)"
)
FOREIGN = (
    "sere: CALIBRATED ON FOREIGN TEXT: the bundled one agrees with text of your own on about half "
    'of the replacements only (docs/calibration.md); give {"auto": {"data": "text.jsonl"}}'
)


def check(config: Any, settings: Settings) -> None:
    """Refuse, before weights are loaded, what `prepare` would end in. Raises `ServingError`."""
    auto = settings.auto
    if auto is None or auto.otherwise == "stock":
        return
    if auto.traffic is not None:  # at any start: a text can be named instead
        if reason := _obstacle_to_watching(config):
            raise ServingError(reason)
        return
    # To look into the cache takes hashes of all weights: only where something is in the way.
    if (reason := _obstacle(config) or obstacle_in_text(auto)) and not _is_kept(config, auto):
        raise ServingError(reason)


def kept(config: Any) -> str:
    """Of an engine that is to calibrate itself: the table that it will find, or that it will make
    one, in words."""
    auto = settings_of(config).auto
    always = "it calibrates itself at every start"
    try:
        if auto is None or (entry := entry_of(config, auto)) is None:
            return always
    except CacheTrouble as trouble:
        return f"{always}: {trouble}"
    if _is_kept(config, auto):
        return f"it will find {entry.path}"
    if auto.traffic is not None:
        return f"what it serves first, by stock routing, will make {entry.path}"
    if auto.data is None:
        own = '{"auto": {"data": "text.jsonl"}} takes yours'
        return f"its first start will make {entry.path} of the bundled text; {own}"
    return f"its first start will make {entry.path}"


def prepare(executor: Any) -> Own | None:
    """Hand every worker its table; None where there is none yet, or none at all. Raises
    `ServingError` where there is none to be had and the user did not choose stock routing then."""
    config = executor.vllm_config
    settings = settings_of(config)
    if (auto := settings.auto) is None:
        return None
    try:
        own = _found_or_watched(executor, auto) if auto.traffic else _found_or_made(executor, auto)
        if own is None:
            return None
    except (CacheTrouble, ServingError, CorpusError, OSError) as error:
        said = plainly(error)
        if auto.otherwise != "stock":
            raise ServingError(said) from error
        _ask(executor, "sere_take_table", None, f"no table, and stock was asked for then: {said}")
        return None
    if auto.data is None and auto.traffic is None:
        _LOG.warning(FOREIGN)
    if reason := first_with_too_little(own.table.layers):
        _LOG.warning("sere: the table is made from too little text: %s", reason)
    else:
        _LOG.info("sere: the table is made from enough text: %s", in_words(own.table.layers))
    for index, layer in own.layers():
        _ask(executor, "sere_take_maps", index, layer)
    _ask(executor, "sere_take_table", own.data, "", own.table.maps)
    return own


def entry_of(config: Any, auto: Auto) -> Entry | None:
    """The table's place in the cache, by all that it depends on; None where it is to have none, or
    where no safetensors tell one checkpoint from another. Raises `CacheTrouble`."""
    model, folder = config.model_config, model_folder(config)
    if not auto.cache or folder is None or (stored := sample_hash(folder)) is None:
        return None
    facts = {
        "form": _FORM,
        "stored": stored,
        "quantisation": quantisation(folder),
        "served_as": model.quantization,
        "dtype": str(model.dtype),
        "overrides": str(model.hf_overrides or ""),
        "method": auto.method,
    }
    if auto.traffic is None:
        facts |= {
            "text": file_hash(auto.data or BUNDLED),
            "samples": auto.samples,
            "length": min(auto.length, longest(config)),
            "seed": auto.seed,
        }
        if auto.maps is not None:
            facts["maps"] = auto.maps
    else:
        facts |= {"tokens": auto.traffic.tokens, "stable": auto.traffic.stable}
    return Entry.of(model.model, _fingerprint(config), facts)


def _fingerprint(config: Any) -> Fingerprint:
    known, folder = untold(config), model_folder(config)
    if folder is None:
        return known
    router, experts = hashes_of(folder, known.layers, known.E)
    return replace(known, router_hash=router, experts_hash=experts)


def _is_kept(config: Any, auto: Auto) -> bool:
    try:
        entry = entry_of(config, auto)
        return entry is not None and entry.read() is not None
    except CacheTrouble:
        return False


def _obstacle(config: Any) -> str | None:
    reason = lacking(CALIBRATION) or obstacle_to_reading(config)
    return reason and (
        f"sere cannot calibrate in this engine: {reason}; make a table with `sere calibrate` and "
        "name it"
    )


def _obstacle_to_watching(config: Any) -> str | None:
    reason = lacking(CALIBRATION) or obstacle_to_watching(config)
    return reason and (
        f"sere cannot measure experts on this engine's traffic: {reason}; or give a text, "
        '{"auto": {"data": "text.jsonl"}}'
    )


def _place(config: Any, auto: Auto) -> Entry | None:
    """See `entry_of`; raises as `_found_or_made`."""
    try:
        return entry_of(config, auto)
    except CacheTrouble as trouble:
        _anew(auto, trouble)
    return None


def _found_or_watched(executor: Any, auto: Auto) -> Own | None:
    """None where workers watch their traffic from now on; raises as `_found_or_made`."""
    config = executor.vllm_config
    assert auto.traffic is not None
    entry = _place(config, auto)
    if entry is not None and (own := _found(entry, auto)) is not None:
        return own
    if reason := _obstacle_to_watching(config):
        raise ServingError(reason)
    about = {
        **_about(config),
        "corpus": "prompts that the engine served",
        **dict.fromkeys(("corpus_hash", "file_hash", "sequences", "length", "seed")),
        "text_hashes": [],
    }
    known = entry.fingerprint if entry else _fingerprint(config)
    watched = Watched(auto.traffic, auto.method, entry, known, about)
    _ask(executor, "sere_watch", watched)
    _LOG.info("sere: %s", watched.in_words)
    return None


def _found_or_made(executor: Any, auto: Auto) -> Own:
    """Raises `CacheTrouble` where the user chose stock routing rather than to calibrate anew."""
    if (entry := _place(executor.vllm_config, auto)) is None:
        return Own.made(*_made(executor, auto, _fingerprint(executor.vllm_config)))
    if (own := _found(entry, auto)) is not None:
        return own
    try:
        with entry.held(auto.wait, lambda waited: _tell(entry, auto, waited)):
            return _shared(executor, auto, entry)
    except CacheTrouble as trouble:
        _anew(auto, trouble)
    return Own.made(*_made(executor, auto, entry.fingerprint))


def _found(entry: Entry, auto: Auto) -> Own | None:
    """What an earlier start has made, or None to make it now; raises as `_found_or_made`."""
    try:
        if (kept := entry.read()) is not None:
            _LOG.info("sere: calibrated at an earlier start: %s", entry.path)
            return Own.found(*kept, entry.path)
    except CacheTrouble as trouble:
        _anew(auto, trouble)
    if others := entry.others():
        _anew(
            auto,
            CacheTrouble(
                f"{others[0].parent} has {len(others)} table(s) for a model of this name, and none "
                "for this checkpoint (other weights, experts, K or layers)"
            ),
        )
    return None


def _shared(executor: Any, auto: Auto, entry: Entry) -> Own:
    """What another engine has made meanwhile, or what this one makes and keeps."""
    try:
        if (kept := entry.read()) is not None:
            _LOG.info("sere: calibrated by an engine that started beside this one: %s", entry.path)
            return Own.found(*kept, entry.path)
    except CacheTrouble:
        pass  # said before; it is replaced
    table, maps = _made(executor, auto, entry.fingerprint)
    own = Own.made(table, maps)
    try:
        entry.write(own.data, maps)
        _LOG.info("sere: kept for later starts: %s%s", entry.path, _MEASURE)
    except CacheTrouble as trouble:
        _LOG.warning("sere: %s; the next start calibrates anew", trouble)
        return own
    return replace(own, path=entry.path)


def _anew(auto: Auto, trouble: CacheTrouble) -> None:
    if auto.otherwise == "stock":
        raise trouble
    _LOG.warning("sere: %s; calibrating anew", trouble)


def _tell(entry: Entry, auto: Auto, waited: float) -> None:
    _LOG.info(
        "sere: another engine calibrates the same model: waiting for it, %.0f of at most %.0f s "
        "(%s)",
        waited,
        auto.wait,
        entry.path,
    )


def _made(
    executor: Any, auto: Auto, fingerprint: Fingerprint
) -> tuple[Table, dict[int, LayerMaps]]:
    """A new table and its maps, for the model of this fingerprint. Raises as `prepare` takes it."""
    config = executor.vllm_config
    if reason := _obstacle(config):
        raise ServingError(reason)
    began = time.monotonic()
    corpus = corpus_for(config, auto)
    _LOG.info(
        "sere: calibrating on %d texts, %d tokens, %s",
        len(corpus.sequences),
        corpus.tokens,
        corpus.source,
    )
    asked = (corpus.sequences, auto.method, auto.maps)
    layers: dict[int, Measured] = {}
    while len(layers) < len(fingerprint.layers):  # at once, unless maps are fitted
        told = _ask(executor, "sere_calibrate", *asked, [*layers])
        layers |= next(answer for answer in told if answer is not None)
        if auto.maps is not None:
            _LOG.info(
                "sere: maps are fitted of %d of %d layers", len(layers), len(fingerprint.layers)
            )
    about = {**_about(config), "layer_names": [name for name, *_ in layers.values()]}
    about |= corpus.about(auto.data or BUNDLED)
    maps = {index: own for index, (_, _, own) in layers.items() if own is not None}
    if maps:
        about["maps"] = {"rank": next(iter(maps.values())).R, "identity": identity_of(maps)}
    statistics = {index: layer for index, (_, layer, _) in layers.items()}
    table = Table(fingerprint, statistics, auto.method, about)
    _LOG.info("sere: calibrated %d layers in %.1f s", len(layers), time.monotonic() - began)
    return table, maps


def _about(config: Any) -> dict[str, Any]:
    """What a table says of the engine that made it."""
    model = config.model_config
    return {
        "model": Path(model.model).name,
        "engine": {
            "vllm": vllm_version(),
            "dtype": str(model.dtype).removeprefix("torch."),
            "quantization": model.quantization,
            "tensor_parallel": config.parallel_config.tensor_parallel_size,
        },
        "versions": {
            "sere": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers")},
        },
    }


def _ask(executor: Any, call: str, *arguments: Any) -> list[Any]:
    return ask_workers(executor, "calibrate in this engine", call, *arguments)
