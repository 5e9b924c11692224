"""`sere calibrate`: run a model over a little text and write down how alike its experts are.

In memory where the model fits, else streamed from the checkpoint, one decoder layer at a time; the
result is the same to the bit. Padding never counts.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from sere import __version__, demo_model
from sere.calibration import null_models
from sere.calibration.corpus import Corpus, Text, encoder, file_hash, read_texts
from sere.calibration.observation import FOLDS, Observer
from sere.calibration.saved import save
from sere.calibration.similarity import METHODS
from sere.calibration.stream import read_by_layer
from sere.calibration.unfinished import Unfinished
from sere.checkpoint import Fingerprint, weight_hashes
from sere.demo_model.tasks import examples
from sere.files import check_writable, unfinished
from sere.maps import LayerMaps, beside, identity_of
from sere.models.hub import located
from sere.models.loading import exceeds_memory, load_model, load_tokenizer
from sere.models.moe import MoELayer, moe_layers, observed
from sere.models.skeleton import load_skeleton
from sere.policy import PolicyError
from sere.table import FILE_NAME, LayerStatistics, Table, stored_policy


class CalibrationError(ValueError):
    """A calibration that cannot be meant, and why."""


@dataclass(frozen=True)
class _Found:
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


def calibrate(
    model_name: str,
    output: str | Path,
    *,
    data: str | Path | None = None,
    method: str = "frobenius",
    samples: int = 400,
    length: int = 128,
    batch: int = 16,
    seed: int = 0,
    allow_fewer: bool = False,
    until_stable: float | None = None,
    stream: bool | None = None,
    maps: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Table:
    """Calibrate `model_name` (a folder, a hub name, or "demo") and save the table to `output`.

    data: .txt, .jsonl or .parquet; the bundled demo model may go without (its own generator).
    samples, length, seed: how many texts are drawn, and their maximal length in tokens.
    until_stable: stop early once a bootstrap says that every layer would choose this share of its
        replacements again on other text of the kind.
    stream: hold one decoder layer in memory at a time; None decides by the free memory. What is
        killed on the way goes on where it was when the same command is run again.
    maps: also fit linear maps of at most this rank (`sere.maps`), always one layer at a time.
    overwrite: also a table in which `sere tune` left a policy, which is lost.
    method: how similarity is measured; "weights" and "random" are null models, made without text.
    The defaults are the paper's: 400 sequences of 128 tokens, Frobenius similarity.
    """
    _check_output(output, data, overwrite)
    _check_method(method)
    _check_maps(maps, method, stream)
    if method in null_models.METHODS:
        table = _without_text(model_name, located(model_name), method, seed, progress)
        save(table, None, Path(output))
        return table
    texts = _texts(demo_model.resolve(model_name), data, samples, seed)
    folder = located(model_name)
    corpus = Corpus.from_texts(
        texts,
        encoder(load_tokenizer(folder), length),
        source=str(data) if data else "the demo model's own task generator",
        samples=samples,
        length=length,
        seed=seed,
        allow_fewer=allow_fewer,
    )
    if stream is None:
        stream = maps is not None or exceeds_memory(folder)
    if stream:
        _check_unconditional(until_stable)
        found = _streamed(folder, corpus, method, batch, maps, output, progress)
    else:
        found = _in_memory(folder, corpus, method, batch, until_stable, progress)
    about = _about(corpus.first(len(found.sequences)), data, found)
    table = _table(model_name, folder, found, method, about)
    save(table, found.maps, Path(output))
    found.clean_up()
    return table


@torch.inference_mode()
def _in_memory(
    folder: str,
    corpus: Corpus,
    method: str,
    batch: int,
    until_stable: float | None,
    progress: bool,
) -> _Found:
    model = load_model(folder)
    layers, observer = moe_layers(model), Observer(method)
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
    return _Found(model, layers, statistics, observer.K, read)


@torch.inference_mode()
def _streamed(
    folder: str,
    corpus: Corpus,
    method: str,
    batch: int,
    maps: int | None,
    output: str | Path,
    progress: bool,
) -> _Found:
    skeleton = load_skeleton(folder)
    settings = {
        "model": str(Path(folder).resolve()),
        "text": corpus.hash,
        "method": method,
        "batch": batch,
        "maps": maps,
        "versions": _versions(),
    }
    sequences = corpus.sequences
    inputs = [
        _padded(sequences[start : start + batch], skeleton.model)
        for start in range(0, len(sequences), batch)
    ]
    observer = Observer(method, maps=maps)
    work = Unfinished(unfinished(output), settings, skeleton.model.device)
    with observed(skeleton.layers, observer):
        read_by_layer(
            skeleton,
            [partial(skeleton.model, **each, use_cache=False) for each in inputs],
            lambda i: observer.begin(i, inputs[i]["attention_mask"].bool()),
            observer,
            work,
            progress,
        )
    indices = [layer.index for layer in skeleton.layers]
    statistics = {i: work.statistics(i) for i in indices}
    fitted = {i: work.maps(i) for i in indices} if maps is not None else None
    return _Found(skeleton.model, skeleton.layers, statistics, work.K, sequences, work, fitted)


@torch.inference_mode()
def _without_text(name: str, folder: str, method: str, seed: int, progress: bool) -> Table:
    skeleton = load_skeleton(folder)
    alike = null_models.similarities(skeleton, method, seed, progress)
    statistics = {i: LayerStatistics.without_text(each) for i, each in alike.items()}
    K = null_models.experts_per_token(skeleton.model)
    about = {"corpus": "no text", "tokens": 0, "seed": seed}
    return _table(
        name, folder, _Found(skeleton.model, skeleton.layers, statistics, K, []), method, about
    )


def _check_output(output: str | Path, data: str | Path | None, overwrite: bool) -> None:
    check_writable(output, data, kind="table")
    check_writable(beside(output), data, kind="maps")
    _check_name(Path(output))
    if not overwrite:
        _check_untuned(output)


def _check_method(method: str) -> None:
    if method not in (*METHODS, *null_models.METHODS):
        known = ", ".join((*METHODS, *null_models.METHODS))
        raise CalibrationError(f"method {method!r}: expected one of {known}")


def _check_unconditional(until_stable: float | None) -> None:
    if until_stable is not None:
        raise CalibrationError(
            "--until-stable needs the whole model in memory: a streamed layer (as --maps has all "
            "layers) is done with all text before the next is read; choose --samples instead"
        )


def _check_maps(maps: int | None, method: str, stream: bool | None) -> None:
    if maps is None:
        return
    if maps < 1:
        raise CalibrationError(f"--maps {maps}: expected the largest rank, e.g. 16")
    if method in null_models.METHODS:
        raise CalibrationError(f"--maps needs text, which --method {method} does not read")
    if stream is False:
        raise CalibrationError("--maps works on one layer at a time: leave out --no-stream")


def _check_name(output: Path) -> None:
    if output.suffix == ".safetensors" and (output.parent / "config.json").exists():
        raise CalibrationError(
            f"{output}: engines load every .safetensors file in a model's folder as weights; "
            f"name it {output.parent / FILE_NAME}"
        )


def _check_untuned(output: str | Path) -> None:
    try:
        policy = stored_policy(output)
        brief = policy.brief() if policy else None
    except PolicyError:
        brief = "of another version of sere"
    if brief is not None:
        raise CalibrationError(
            f"{output} holds a policy of `sere tune` ({brief}), which would be lost: name another "
            "output, or add --overwrite and tune again"
        )


def _texts(folder: str, data: str | Path | None, samples: int, seed: int) -> Sequence[Text]:
    if data is not None:
        return read_texts(data)
    if folder != str(demo_model.PATH):
        raise CalibrationError(
            "--data FILE is needed: only the bundled demo model has texts of its own"
        )
    drawn = examples(samples, seed=seed, split="train")
    return [example.prompt + example.answer for example in drawn]


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
    if model.config.is_encoder_decoder:
        inputs |= {f"decoder_{name}": value for name, value in inputs.items()}
    return inputs


def _about(corpus: Corpus, data: str | Path | None, found: _Found) -> dict[str, Any]:
    about: dict[str, Any] = {
        "corpus": corpus.source,
        "corpus_hash": corpus.hash,
        "file_hash": file_hash(data) if data else None,
        "text_hashes": list(corpus.text_hashes),
        "sequences": len(corpus.sequences),
        "tokens": corpus.tokens,
        "length": corpus.length,
        "seed": corpus.seed,
    }
    if found.maps:
        rank = next(iter(found.maps.values())).R
        about["maps"] = {"rank": rank, "identity": identity_of(found.maps)}
    return about


def _table(name: str, folder: str, found: _Found, method: str, text: dict[str, Any]) -> Table:
    indices = tuple(layer.index for layer in found.layers)
    E = found.layers[0].E
    router_hash, experts_hash = weight_hashes(folder, indices, E)
    fingerprint = Fingerprint(
        (found.model.config.architectures or [type(found.model).__name__])[0],
        E,
        found.K,
        indices,
        router_hash,
        experts_hash,
    )
    return Table(
        fingerprint,
        found.statistics,
        method,
        {
            "model": Path(name).name,
            "layer_names": [layer.name for layer in found.layers],
            **text,
            "versions": _versions(),
        },
    )


def _versions() -> dict[str, str]:
    return {
        "sere": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers")},
    }
