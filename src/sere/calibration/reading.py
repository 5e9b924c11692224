"""Running a model over the text to be calibrated on: in memory, or one decoder layer at a time."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from sere import __version__
from sere.calibration.observation import Observer
from sere.calibration.stream import read_by_layer, read_until_stable
from sere.calibration.unfinished import Unfinished
from sere.files import unfinished
from sere.maps import LayerMaps
from sere.models.fit import check_vocabulary
from sere.models.loading import load_model
from sere.models.moe import MoELayer, moe_layers, observed
from sere.models.outlay import outlay
from sere.models.skeleton import Skeleton, load_skeleton
from sere.similarity.sums import FOLDS
from sere.table import LayerStatistics
from sere.text.corpus import Corpus


class CalibrationError(ValueError):
    """A calibration that cannot be meant, and why."""


@dataclass(frozen=True)
class Found:
    """What reading the text brought."""

    model: Any
    layers: list[MoELayer]
    statistics: dict[int, LayerStatistics]
    K: int
    sequences: list[list[int]]  # those that were read
    work: Unfinished | None = None
    maps: dict[int, LayerMaps] | None = None

    def clean_up(self) -> None:
        if self.work:
            self.work.remove()


def check_experts(E: int, method: str) -> None:
    if E == 1:
        raise CalibrationError("the model has one expert per layer: there is nothing to re-route")
    if E == 2 and method == "frobenius":
        raise CalibrationError(
            "the model has two experts per layer, and --method frobenius measures distances by the "
            "largest of the layer: of one pair that is always 1, so that no expert would ever be "
            "replaced. Choose --method cosine (or directed)"
        )


@torch.inference_mode()
def in_memory(
    folder: str,
    corpus: Corpus,
    method: str,
    batch: int,
    until_stable: float | None,
    progress: bool,
) -> Found:
    model = load_model(folder)
    layers, observer = moe_layers(model), Observer(method)
    check_experts(layers[0].E, method)
    read = corpus.sequences
    bar = tqdm(range(0, len(read), batch), "calibrate", unit="batch", disable=not progress)
    with observed(layers, observer):
        for i, start in enumerate(bar):
            inputs = _padded(corpus.sequences[start : start + batch], model)
            observer.begin(i, inputs["attention_mask"].bool())
            model(**inputs, use_cache=False)
            if until_stable is not None and i % FOLDS == FOLDS - 1:
                lowest = observer.stability()
                bar.set_postfix(stability=f"{lowest:.0%}")
                if lowest >= until_stable:
                    read = read[: start + batch]
                    bar.close()
                    break
    statistics = {layer.index: observer.finish(layer)[0] for layer in layers}
    return Found(model, layers, statistics, observer.K, read)


@torch.inference_mode()
def streamed(
    folder: str,
    corpus: Corpus,
    method: str,
    batch: int,
    maps: int | None,
    output: str | Path,
    progress: bool,
) -> Found:
    skeleton = load_skeleton(folder)
    check_experts(skeleton.layers[0].E, method)
    settings = _settings(folder, corpus, method, batch, maps=maps)
    observer = Observer(method, maps=maps, batch=batch)
    inputs = _batches(corpus.sequences, batch, skeleton.model)
    _say(skeleton, inputs, output)
    work = Unfinished(unfinished(output), settings, skeleton.model.device)
    with observed(skeleton.layers, observer):
        read_by_layer(
            skeleton,
            *_passes(skeleton.model, inputs, observer),
            observer,
            work,
            progress,
        )
    indices = [layer.index for layer in skeleton.layers]
    statistics = {i: work.statistics(i) for i in indices}
    fitted = {i: work.maps(i) for i in indices} if maps is not None else None
    read = corpus.sequences
    return Found(skeleton.model, skeleton.layers, statistics, work.K, read, work, fitted)


@torch.inference_mode()
def streamed_until(
    folder: str,
    corpus: Corpus,
    method: str,
    batch: int,
    share: float,
    output: str | Path,
    progress: bool,
) -> Found:
    skeleton = load_skeleton(folder)
    check_experts(skeleton.layers[0].E, method)
    settings = _settings(folder, corpus, method, batch, until_stable=share)
    observer = Observer(method)
    inputs = _batches(corpus.sequences, batch, skeleton.model)
    _say(skeleton, inputs, output, f"once, and again for each {FOLDS} batches of text")
    work = Unfinished(unfinished(output), settings, skeleton.model.device)
    observer.K = work.K
    with observed(skeleton.layers, observer):
        batches = read_until_stable(
            skeleton,
            *_passes(skeleton.model, inputs, observer),
            observer,
            share,
            work,
            progress,
        )
    statistics = {layer.index: observer.finish(layer)[0] for layer in skeleton.layers}
    read = corpus.sequences[: batches * batch]
    return Found(skeleton.model, skeleton.layers, statistics, observer.K, read, work)


def _settings(
    folder: str,
    corpus: Corpus,
    method: str,
    batch: int,
    maps: int | None = None,
    until_stable: float | None = None,
) -> dict[str, Any]:
    """All that what a reading finds depends on."""
    return {
        "model": str(Path(folder).resolve()),
        "text": corpus.hash,
        "method": method,
        "batch": batch,
        "maps": maps,
        "until_stable": until_stable,
        "versions": versions(),
    }


def _passes(
    model: Any, inputs: list[dict[str, Tensor]], observer: Observer
) -> tuple[list[Callable[[], Any]], Callable[[int], None]]:
    """The forward passes over these batches, and what is called with a pass's number before it."""
    forwards: list[Callable[[], Any]] = [partial(model, **each, use_cache=False) for each in inputs]
    return forwards, lambda i: observer.begin(i, inputs[i]["attention_mask"].bool())


def _say(
    skeleton: Skeleton,
    inputs: list[dict[str, Tensor]],
    output: str | Path,
    readings: str = "once",
) -> None:
    rows = sum(each["input_ids"].numel() for each in inputs)
    config = skeleton.model.config.get_text_config()
    states = 2 * rows * config.hidden_size * skeleton.model.dtype.itemsize
    outlay(skeleton, rows, states, asked=skeleton.layers[0].E).say(output, readings)


def _batches(sequences: list[list[int]], batch: int, model: Any) -> list[dict[str, Tensor]]:
    starts = range(0, len(sequences), batch)
    return [_padded(sequences[start : start + batch], model) for start in starts]


def _padded(sequences: list[list[int]], model: Any) -> dict[str, Tensor]:
    """Right-padded input_ids [B, length] and their attention_mask, 1 = a real token.

    An encoder-decoder model reads the text on both sides.
    """
    longest = max(map(len, sequences))
    ids = [s + [0] * (longest - len(s)) for s in sequences]
    mask = [[1] * len(s) + [0] * (longest - len(s)) for s in sequences]
    inputs = {
        "input_ids": torch.tensor(ids, device=model.device),
        "attention_mask": torch.tensor(mask, device=model.device),
    }
    check_vocabulary(model, int(inputs["input_ids"].max()))
    if model.config.is_encoder_decoder:
        inputs |= {f"decoder_{name}": value for name, value in inputs.items()}
    return inputs


def versions() -> dict[str, str]:
    return {
        "sere": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers")},
    }
