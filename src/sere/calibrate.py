"""`sere calibrate`: run a model over a little text and write down how alike its experts are.

Every MoE layer's experts all run on that layer's real hidden states, chunk by chunk; only [E, E]
statistics are kept. Padding never counts.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from sere import __version__, demo_model
from sere.agreement import stability
from sere.checkpoint import Fingerprint, weight_hashes
from sere.corpus import Corpus, read_texts
from sere.files import check_writable
from sere.moe import MoELayer, moe_layers, observed
from sere.similarity import METHODS, Frobenius, Measure, pooled
from sere.table import FILE_NAME, LayerStatistics, Table
from sere.tasks import examples

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# All experts' outputs of one chunk of tokens, in bytes; more tokens are split.
_OUTPUT_BYTES = 256 * 2**20


class CalibrationError(ValueError):
    """A model that cannot be calibrated, and why."""


# Parts of the text that are measured apart, so that a bootstrap can tell how stable the whole is.
FOLDS = 8


@dataclass
class _Statistics:
    """What accumulates for one layer."""

    folds: list[Measure]
    gram: Frobenius
    choices: Tensor  # [E] int64
    tokens: int = 0

    @property
    def measure(self) -> Measure:
        """Of all folds."""
        return pooled(self.folds)


@dataclass
class Observer:
    """Takes in one forward pass after the other; padding is masked out by `real`."""

    method: str
    statistics: dict[int, _Statistics] = field(default_factory=dict)
    real: Tensor | None = None  # [B * length] bool, of the forward pass under way
    fold: int = 0  # which part of the text it belongs to
    K: int = 0

    def __call__(self, layer: MoELayer, hidden: Tensor, ids: Tensor, weights: Tensor) -> None:
        assert self.real is not None, "set `real` before the forward pass"
        hidden, ids = hidden[self.real], ids[self.real]
        self.K = max(self.K, ids.shape[1])
        own = self.statistics.setdefault(layer.index, self._empty(layer.E))
        own.tokens += hidden.shape[0]
        chosen = ids[(ids >= 0) & (ids < layer.E)]
        own.choices += torch.bincount(chosen, minlength=layer.E).cpu()
        step = max(1, _OUTPUT_BYTES // (4 * layer.E * hidden.shape[-1]))
        for chunk in torch.split(hidden, step):
            outputs = layer.outputs(chunk)
            if not torch.isfinite(outputs).all():
                raise CalibrationError(
                    f"{layer.name}: an expert's output is NaN or infinite; is the checkpoint "
                    "intact, and its dtype fit for this device?"
                )
            own.folds[self.fold].update(outputs)
            if self.method != "frobenius":  # which sums up the Gram matrix itself
                own.gram.update(outputs)

    def _empty(self, E: int) -> _Statistics:
        folds = [METHODS[self.method](E) for _ in range(FOLDS)]
        return _Statistics(folds, Frobenius(E), torch.zeros(E, dtype=torch.int64))

    def stability(self) -> dict[int, float | None]:
        """By layer: see `sere.agreement.stability`."""
        return {index: stability(own.folds) for index, own in self.statistics.items()}


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
    progress: bool = True,
) -> Table:
    """Calibrate `model_name` (a folder, a hub name, or "demo") and save the table to `output`.

    data: .txt, .jsonl or .parquet; the bundled demo model may go without (its own generator).
    samples, length, seed: how many texts are drawn, and their maximal length in tokens.
    until_stable: stop early once a bootstrap says that every layer would choose this share of its
        replacements again on other text of the kind.
    The defaults are the paper's: 400 sequences of 128 tokens, Frobenius similarity.
    """
    check_writable(output)
    _check_name(Path(output))
    if method not in METHODS:
        raise CalibrationError(f"method {method!r}: expected one of {', '.join(METHODS)}")
    folder = demo_model.resolve(model_name)
    texts = _texts(folder, data, samples, seed)
    model, tokenizer = load_model(folder)
    layers = moe_layers(model)
    corpus = Corpus.from_texts(
        texts,
        lambda text: list(tokenizer(text, add_special_tokens=True)["input_ids"]),
        source=str(data) if data else "the demo model's own task generator",
        samples=samples,
        length=length,
        seed=seed,
        allow_fewer=allow_fewer,
    )
    observer = Observer(method)
    with torch.inference_mode(), observed(layers, observer):
        read = _observe(model, corpus, observer, batch, until_stable, progress)
    table = _table(folder, model, layers, observer, replace(corpus, sequences=read))
    table.save(output)
    return table


def _observe(
    model: Any,
    corpus: Corpus,
    observer: Observer,
    batch: int,
    until_stable: float | None,
    progress: bool,
) -> list[list[int]]:
    """Run the model over the corpus; returns the sequences that were read."""
    starts = range(0, len(corpus.sequences), batch)
    bar = tqdm(starts, "calibrate", unit="batch", disable=not progress)
    for i, start in enumerate(bar):
        ids, mask = _padded(corpus.sequences[start : start + batch], model.device)
        observer.real, observer.fold = mask.flatten().bool(), i % FOLDS
        model(input_ids=ids, attention_mask=mask, use_cache=False)
        if until_stable is not None and i % FOLDS == FOLDS - 1:
            lowest = min(found or 0 for found in observer.stability().values())
            bar.set_postfix(stability=f"{lowest:.0%}")
            if lowest >= until_stable:
                bar.close()
                return corpus.sequences[: start + batch]
    return corpus.sequences


def _check_name(output: Path) -> None:
    if output.suffix == ".safetensors" and (output.parent / "config.json").exists():
        raise CalibrationError(
            f"{output}: engines load every .safetensors file in a model's folder as weights; "
            f"name it {output.parent / FILE_NAME}"
        )


def load_model(folder: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A transformers causal model in its checkpoint's dtype, and its tokenizer.

    Refuses a checkpoint that leaves weights unset: random experts would be calibrated.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype="auto",
            device_map="auto" if torch.cuda.is_available() else None,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, with the reason
        )
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, RuntimeError) as error:
        raise CalibrationError(
            f"{folder}: cannot be loaded as a transformers model: {error}"
        ) from error
    unset = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
    if unset:
        raise CalibrationError(
            f"{folder}: {len(unset)} weights are missing from the checkpoint or of another shape "
            f"({', '.join(unset[:3])} ...) and would be random; calibrate the original, "
            "unquantised checkpoint"
        )
    if getattr(tokenizer, "pad_token_id", None) is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval(), tokenizer


def _texts(folder: str, data: str | Path | None, samples: int, seed: int) -> list[str]:
    if data is not None:
        return read_texts(data)
    if folder != str(demo_model.PATH):
        raise CalibrationError(
            "--data FILE is needed: only the bundled demo model has texts of its own"
        )
    drawn = examples(samples, seed=seed, split="train")
    return [example.prompt + example.answer for example in drawn]


def _padded(sequences: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Right-padded ids [B, length] and their mask, 1 = a real token."""
    longest = max(map(len, sequences))
    ids = [s + [0] * (longest - len(s)) for s in sequences]
    mask = [[1] * len(s) + [0] * (longest - len(s)) for s in sequences]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _table(
    folder: str, model: Any, layers: list[MoELayer], observer: Observer, corpus: Corpus
) -> Table:
    indices = tuple(layer.index for layer in layers)
    E = layers[0].E
    router_hash, experts_hash = weight_hashes(_checkpoint_folder(folder), indices, E)
    fingerprint = Fingerprint(
        (model.config.architectures or [type(model).__name__])[0],
        E,
        observer.K,
        indices,
        router_hash,
        experts_hash,
    )
    return Table(
        fingerprint,
        {layer.index: _layer_statistics(layer, observer) for layer in layers},
        observer.method,
        {
            "model": Path(folder).name,
            "layer_names": [layer.name for layer in layers],
            "corpus": corpus.source,
            "corpus_hash": corpus.hash,
            "sequences": len(corpus.sequences),
            "tokens": corpus.tokens,
            "length": corpus.length,
            "seed": corpus.seed,
            "versions": {
                "sere": __version__,
                "python": platform.python_version(),
                **{name: version(name) for name in ("torch", "transformers")},
            },
        },
    )


def _layer_statistics(layer: MoELayer, observer: Observer) -> LayerStatistics:
    """A layer that saw no token gets the identity: nothing is known, nothing is re-routed."""
    own = observer.statistics.get(layer.index)
    if own is None:
        E = layer.E
        return LayerStatistics(torch.eye(E), torch.zeros(E, E), torch.zeros(E), 0)
    load = own.choices / own.choices.sum().clamp(min=1)
    measure = own.measure
    gram = measure if observer.method == "frobenius" else own.gram
    return LayerStatistics(
        measure.result(), gram.mean(), load.float(), own.tokens, stability(own.folds)
    )


def _checkpoint_folder(name: str) -> Path:
    """Where the checkpoint's files lie: the folder itself, or the hub's local snapshot."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, local_files_only=True))
