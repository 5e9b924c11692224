"""What re-routing does to speed and quality, in the very engine that calibrated itself: measured
once it is ready (see `trial`), said in its log, and kept beside its table for later starts."""

from __future__ import annotations

import hashlib
import json
import logging
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sere import __version__
from sere.files import replaced
from sere.serving.auto import Auto
from sere.serving.own_maps import Own
from sere.serving.reading import longest, obstacle_to_reading
from sere.serving.refusal import ServingError
from sere.serving.remote import ask_workers
from sere.serving.session import settings_of
from sere.serving.symbols import symbol, vllm_version
from sere.serving.trial import LENGTH, PROMPT
from sere.serving.verdict import in_words, mean, warnings
from sere.text.bundled import BUNDLED
from sere.text.corpus import CorpusError, encoder, file_hash, read_texts
from sere.text.pieces import Pieces, pieces

_LOG = logging.getLogger("vllm.sere")
_SIZES = (8, 32, 128)  # requests that decode together
_PATIENCE = 20  # seconds, after which no further size is tried
_EACH = 4  # pieces of a text, at most
_COLUMNS = (
    "requests",
    "experts read, a layer",
    "ms a step",
    "speed",
    "KL, nats a token",
    "loss, nats a token",
    "same next token",
)


def tell(executor: Any, own: Own | None, workers: Sequence[Mapping[str, Any]]) -> None:
    """Log it, once the engine is ready, unless there is nothing to say.

    own: its table; None where it has none. workers: their descriptions (see `start_up`).
    """
    auto = settings_of(executor.vllm_config).auto
    if auto is None or not auto.report or own is None or workers[0]["inert"]:
        return
    facts = _facts(executor.vllm_config, auto, own, workers)
    path = own.path and own.path.with_suffix(".report.json")
    try:
        if (report := _kept(path, facts)) is None:
            report = {"of": facts, **_made(executor, auto, own, workers[0]["policy"])}
            report["notes"] += _keep(path, report)
    except (ServingError, CorpusError, OSError) as error:
        _LOG.warning(
            "sere: no report on speed and quality: %s. %s is served, and not measured: bring "
            "longer texts, or ask `sere evaluate`",
            error,
            workers[0]["policy"],
        )
        return
    _LOG.info("sere: %s", as_text(report))
    for warning in report["warnings"]:
        _LOG.warning("sere: %s", warning)


def as_text(report: Mapping[str, Any]) -> str:
    """A table for people."""
    rows = [_COLUMNS, *map(_row, report["sizes"])]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    said = [f"{report['policy']} beside stock routing, here, {report['text']}:", *lines]
    return "\n".join([*said, *report["verdict"], *report["notes"]])


def _row(size: Mapping[str, Any]) -> tuple[str, ...]:
    low, middle, high = size["speed"]
    stock_ms, ms = (statistics.median(size[name]) for name in ("stock_ms", "ms"))
    return (
        str(size["requests"]),
        f"{size['before']:.1f} -> {size['after']:.1f}",
        f"{stock_ms:.2f} -> {ms:.2f}",
        f"{middle:.2f}x ({low:.2f}-{high:.2f})",
        _mean(size["kl"], ""),
        _mean(size["loss"], "+"),
        f"{size['same']:.1%}",
    )


def _mean(values: Sequence[float], sign: str) -> str:
    middle, error = mean(values)
    return f"{middle:{sign}.4f} ±{error:.4f}"


def _facts(
    config: Any, auto: Auto, own: Own, workers: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """All that a report is of, JSON-able: another one is another report."""
    parallel = config.parallel_config
    return {
        "versions": {"sere": __version__, "vllm": vllm_version()},
        "table": hashlib.sha256(own.data).hexdigest(),
        "text": file_hash(auto.data or BUNDLED),
        "workers": [
            {name: worker[name] for name in ("policy", "rows", "kernels", "operator", "device")}
            for worker in workers
        ],
        "expert_parallel": parallel.enable_expert_parallel,
        "eager": config.model_config.enforce_eager,
        "graphs": str(config.compilation_config.cudagraph_mode),
        "most_requests": config.scheduler_config.max_num_seqs,
    }


def _kept(path: Path | None, facts: Mapping[str, Any]) -> dict[str, Any] | None:
    """What an earlier start has measured of the same."""
    try:
        report = json.loads(path.read_text("utf-8")) if path else None
        if not isinstance(report, dict) or report.get("of") != facts:
            return None
        as_text(report)
        return {**report, "notes": [*report["notes"], f"Measured at an earlier start: {path}"]}
    except Exception:  # gone, torn or somebody else's: it is made again
        return None


def _keep(path: Path | None, report: Mapping[str, Any]) -> list[str]:
    """Where it is, as a note; none where it is not kept."""
    if path is None:
        return []
    try:
        with replaced(path) as temporary:
            temporary.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    except OSError as error:
        _LOG.warning("sere: the report is not kept: %s", error)
        return []
    return [f"kept as {path} (`sere report {path.parent}` shows it)"]


def _made(executor: Any, auto: Auto, own: Own, policy: str) -> dict[str, Any]:
    """Raises `ServingError` or `CorpusError` where nothing can be tried."""
    config = executor.vllm_config
    if reason := obstacle_to_reading(config):
        raise ServingError(reason)
    most = min(config.scheduler_config.max_num_seqs, *_ask(executor, "sere_room_to_try"))
    texts = _texts(config, auto, own, min(most, max(_SIZES)))
    count = len(texts.tokens)
    sizes = [n for n in _SIZES if n <= count] or [count]
    if sizes == [0] or sizes == [1]:
        raise ServingError(
            f"two texts of {LENGTH} tokens are wanted, decoded together; there are {count} in "
            f"{auto.data or 'the bundled text'} (this engine takes {most} requests at once)"
        )
    _LOG.info("sere: trying %s beside stock routing, %s requests", policy, sizes)
    began = time.monotonic()
    found: list[dict[str, Any]] = []
    while len(found) < len(sizes) and time.monotonic() - began < _PATIENCE:
        answers = _ask(executor, "sere_try", texts.first(sizes[len(found)]).tokens)
        size = next(answer for answer in answers if answer is not None)
        ratios = sorted(s / n for s, n in zip(size["stock_ms"], size["ms"], strict=True))
        found.append({**size, "speed": [ratios[0], statistics.median(ratios), ratios[-1]]})
    report = {
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": round(time.monotonic() - began, 1),
        "policy": policy,
        "text": _described(auto, texts.first(sizes[len(found) - 1])),
        "sizes": found,
        "notes": _notes(sizes[len(found) :]),
    }
    return {**report, "verdict": in_words(report), "warnings": warnings(report)}


def _texts(config: Any, auto: Auto, own: Own, count: int) -> Pieces:
    """Of the text, to decode; read is what the table is made of."""
    if longest(config) < LENGTH:
        raise ServingError(f"texts of {LENGTH} tokens are tried, this engine reads fewer")
    about = own.table.provenance
    cut = about.get("length") or 0
    encode = encoder(
        symbol("cached_tokenizer_from_config")(config.model_config), cut + _EACH * LENGTH
    )
    return pieces(
        read_texts(auto.data or BUNDLED),
        lambda text: encode(text)[: cut + _EACH * LENGTH],
        source=str(auto.data or "the bundled text"),
        read=set(about.get("text_hashes") or ()),
        cut=cut,
        length=LENGTH,
        count=count,
        seed=auto.seed,
    )


def _described(auto: Auto, texts: Pieces) -> str:
    name = auto.data.name if auto.data else "the bundled text, which is not yours"
    told = [] if texts.read else ["none of them calibrated on"]
    if texts.later:
        told.append(
            f"{texts.later} are later parts of texts that were, and other texts may lose more"
        )
    if texts.read:
        told.append(f"{texts.read} of them calibrated on, which flatters")
    tokens = LENGTH - PROMPT - 1
    return (
        f"{tokens} tokens of each of up to {len(texts.tokens)} pieces of {name} ({'; '.join(told)})"
    )


def _notes(left_out: Sequence[int]) -> list[str]:
    notes = [
        "speed: of a whole step, stock's time over this one's, in each turn: the median of these, "
        "lowest to highest; KL: from stock's next token to this one's, 0 where they are equal; "
        "loss: more than stock's; ± standard error; of perplexity two of them either way",
    ]
    if left_out:
        notes.append(f"not tried, as it takes long: {', '.join(map(str, left_out))} requests")
    return notes


def _ask(executor: Any, call: str, *arguments: Any) -> list[Any]:
    return ask_workers(executor, "try a policy in this engine", call, *arguments)
