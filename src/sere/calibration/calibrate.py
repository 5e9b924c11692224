"""`sere calibrate`: run a model over a little text and write down how alike its experts are.

In memory where the model fits, else streamed from the checkpoint, one decoder layer at a time; the
result is the same to the bit. Padding never counts.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sere import demo_model
from sere.calibration import null_models
from sere.calibration.reading import CalibrationError as CalibrationError
from sere.calibration.reading import (
    Found,
    check_experts,
    in_memory,
    streamed,
    streamed_until,
    versions,
)
from sere.calibration.saved import save
from sere.checkpoint import Fingerprint, weight_hashes
from sere.checkpoint.configured import configured
from sere.checkpoint.names import experts_by_layer
from sere.checkpoint.stored import stored_tensors
from sere.demo_model.tasks import examples
from sere.files import check_writable
from sere.maps import beside, identity_of
from sere.models.fit import check_stored
from sere.models.hub import check_name, located
from sere.models.loading import exceeds_memory, load_tokenizer
from sere.models.outline import check_described, fetched
from sere.models.skeleton import load_skeleton
from sere.policy import PolicyError
from sere.similarity.measures import METHODS
from sere.table import FILE_NAME, LayerStatistics, Table, carried
from sere.text.corpus import Corpus, Text, encoder, read_texts
from sere.text.records import kind_of

DEMO_TEXT = "the demo model's own task generator"


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
    check_output(output, data, overwrite)
    _check_ways(maps, method, stream, until_stable)
    if method in null_models.METHODS:
        table = _without_text(model_name, fetched(model_name), method, seed, progress)
        save(table, None, Path(output))
        return table
    _check_model(named := demo_model.resolve(model_name), data, method)
    texts = texts_of(named, data, samples, seed)
    _check_weights(folder := located(named), method)
    corpus = Corpus.from_texts(
        texts,
        encoder(load_tokenizer(folder), length),
        source=str(data) if data else DEMO_TEXT,
        samples=samples,
        length=length,
        seed=seed,
        allow_fewer=allow_fewer,
    )
    by_layer = (maps is not None or exceeds_memory(folder)) if stream is None else stream
    if by_layer and until_stable is not None:
        found = streamed_until(folder, corpus, method, batch, until_stable, output, progress)
    elif by_layer:
        found = streamed(folder, corpus, method, batch, maps, output, progress)
    else:
        found = in_memory(folder, corpus, method, batch, until_stable, progress)
    table = _table(model_name, folder, found, method, _about(corpus, data, found))
    _say_unless_stable(table, until_stable)
    save(table, found.maps, Path(output))
    found.clean_up()
    return table


@torch.inference_mode()
def _without_text(name: str, folder: str, method: str, seed: int, progress: bool) -> Table:
    skeleton = load_skeleton(folder)
    alike = null_models.similarities(skeleton, method, seed, progress)
    statistics = {i: LayerStatistics.without_text(each) for i, each in alike.items()}
    K = null_models.experts_per_token(skeleton.model)
    about = {"corpus": "no text", "tokens": 0, "seed": seed}
    return _table(
        name, folder, Found(skeleton.model, skeleton.layers, statistics, K, []), method, about
    )


def _say_unless_stable(table: Table, wanted: float | None) -> None:
    """Where the text ended before that."""
    if wanted is None:
        return
    known = {i: layer.stability for i, layer in table.layers.items()}
    index, lowest = min(known.items(), key=lambda pair: pair[1] or 0)
    if lowest is None or lowest < wanted:
        reached = "not known" if lowest is None else f"{lowest:.1%}"
        print(
            f"NOT STABLE YET: layer {index} reached {reached} of the {wanted:.1%} that were asked "
            "for when the text ended; bring more text, or raise --samples or --length",
            file=sys.stderr,
        )


def check_output(output: str | Path, data: str | Path | None, overwrite: bool) -> None:
    """Raise now what would be in the way of a table at the end."""
    check_writable(output, data, kind="table")
    check_writable(beside(output), data, kind="maps")
    _check_name(Path(output))
    if not overwrite:
        _check_untuned(output)


def _check_method(method: str) -> None:
    if method not in (*METHODS, *null_models.METHODS):
        known = ", ".join((*METHODS, *null_models.METHODS))
        raise CalibrationError(f"method {method!r}: expected one of {known}")


def _check_model(model: str, data: str | Path | None, method: str) -> None:
    """Look through all of it that is there before any text is read; weights that have to be
    downloaded wait until it was."""
    check_name(model)
    if not Path(model).is_dir():  # before the hub is asked
        _check_data(model, data)
    E, _ = configured(check_described(model))
    check_experts(E or 0, method)
    if Path(model).is_dir():
        _check_weights(model, method)


def _check_weights(folder: str, method: str) -> None:
    check_stored(folder)
    if counts := experts_by_layer(stored_tensors(folder)).values():
        check_experts(max(counts), method)  # a drafter behind the last layer may have fewer


def _check_ways(
    maps: int | None, method: str, stream: bool | None, until_stable: float | None
) -> None:
    _check_method(method)
    if maps is None:
        return
    if until_stable is not None:
        raise CalibrationError(
            "--until-stable and --maps exclude each other: maps are fitted to all text of a layer "
            "at once; choose --samples instead"
        )
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
        found = carried(output)
        brief = found[0].brief() if found and found[0] else None
    except PolicyError:
        brief = "of another version of sere"
    if brief is not None:
        raise CalibrationError(
            f"{output} holds a policy of `sere tune` ({brief}), which would be lost: name another "
            "output, or add --overwrite and tune again"
        )


def _check_data(folder: str, data: str | Path | None) -> None:
    """Whether there is such text, which is not read yet."""
    if data is not None:
        kind_of(data)
    elif folder != str(demo_model.PATH):
        raise CalibrationError(
            "--data FILE is needed: some 400 texts like those which the model serves (the bundled "
            "demo model alone has texts of its own)"
        )


def texts_of(folder: str, data: str | Path | None, samples: int, seed: int) -> Sequence[Text]:
    """Those of a file, or of the demo model's own task."""
    _check_data(folder, data)
    if data is not None:
        return read_texts(data)
    drawn = examples(samples, seed=seed, split="train")
    return [example.prompt + example.answer for example in drawn]


def _about(corpus: Corpus, data: str | Path | None, found: Found) -> dict[str, Any]:
    about = corpus.first(len(found.sequences)).about(data)
    if found.maps:
        rank = next(iter(found.maps.values())).R
        about["maps"] = {"rank": rank, "identity": identity_of(found.maps)}
    return about


def _table(name: str, folder: str, found: Found, method: str, text: dict[str, Any]) -> Table:
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
            "versions": versions(),
        },
    )
