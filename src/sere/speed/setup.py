"""What `sere bench` compares, and on what: policies, batches, a model or a shape."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch

from sere.models.hub import located
from sere.policy import Policy, PolicyError, settings_from_json
from sere.results import provenance
from sere.results.names import check_names
from sere.serving.random_weights import LOAD_FORMAT, reached
from sere.serving.settings import merge_is_asked
from sere.speed.shapes import SHAPES, Shape, shape_named
from sere.step_cost.roofline import Sizes
from sere.table import FILE_NAME, TUNED, Table


class BenchError(RuntimeError):
    """No speed can be reported, and why."""


@dataclass(frozen=True)
class Contender:
    """A policy; None is stock routing."""

    name: str
    policy: Policy | None


@dataclass(frozen=True)
class Load:
    """How a batch is made: lengths in tokens, rounds that count. Batch sizes ascend, whatever the
    order in which they are given."""

    batches: tuple[int, ...]
    input_len: int = 128
    output_len: int = 32
    rounds: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "batches", tuple(sorted(set(self.batches))))

    def prompts(self, batch: int, turn: int, vocabulary: int) -> list[list[int]]:
        """Random token ids, others in every round."""
        random = Random(f"{self.seed}/{batch}/{turn}")
        return [[random.randrange(vocabulary) for _ in range(self.input_len)] for _ in range(batch)]


@dataclass(frozen=True)
class Subject:
    """What is served: a model and its table.

    options: for `vllm.LLM`. facts: what a reader of the result has to know, and what a run that
    resumes must find unchanged. itemsize: bytes of a parameter.
    """

    folder: str
    table: Path
    sizes: Sizes
    K: int
    vocabulary: int
    options: dict[str, Any]
    facts: dict[str, Any]
    itemsize: int


@contextmanager
def subject(
    model: str,
    table: str | None,
    load: Load,
    *,
    layers: int | None = None,
    skew: float = 0.0,
    trace: str | None = None,
    dtype: str | None = None,
    eager: bool = False,
    rank: int | None = None,
) -> Iterator[Subject]:
    """A model, or a shape with random weights, which exists as long as the block does.

    model: a shape's name, or as for `calibrate`. table: of a shape by default random. layers: cuts
    a shape. skew, trace: how unequally a shape's experts are loaded, see `experts_load`. dtype: by
    default float32 on CPUs, bfloat16 on GPUs. eager: no CUDA graphs.
    rank: a shape's table gets random linear maps of it; None: no maps.
    """
    on_gpu = torch.cuda.is_available()
    dtype = dtype or ("bfloat16" if on_gpu else "float32")
    itemsize = getattr(torch, dtype).itemsize
    with _served(model, table, layers, load.seed, rank) as (folder, path, shape):
        known = Table.load(path)
        E, K = known.fingerprint.E, known.fingerprint.K
        sizes, options = Sizes.of(folder), _options(load, dtype, eager or not on_gpu)
        expected = experts_load(E, skew, trace) if shape else None
        if shape:
            if not on_gpu:  # a GPU's engine says so itself
                _check_memory(sizes.total * itemsize)
            own = {"seed": load.seed, "K": K, "load": expected}
            options |= {"load_format": LOAD_FORMAT, "model_loader_extra_config": own}
        elif skew or trace:
            raise BenchError(f"{model} has a router of its own: --skew and --trace are for shapes")
        vocabulary = _vocabulary(folder)
        facts = {
            "model": model,
            "layers": shape.layers if shape else sizes.layers,
            "of_layers": shape.of_layers if shape else sizes.layers,
            "vocabulary": vocabulary,
            "E": E,
            "K": K,
            "dtype": dtype,
            "graphs": not options["enforce_eager"],
            "skew": {"skew": skew, "trace": trace, **_busiest(expected, E, K)},
            "table": {"method": known.method, **known.provenance},
            "machine": provenance.provenance()["machine"],
        }
        yield Subject(folder, path, sizes, K, vocabulary, options, facts, itemsize)


@contextmanager
def _served(
    model: str, table: str | None, layers: int | None, seed: int, rank: int | None
) -> Iterator[tuple[str, Path, Shape | None]]:
    """Folder and table of what is measured; of a shape they exist as long as this does."""
    shape = shape_named(model)
    if shape is None:
        if layers is not None:
            raise BenchError(f"--layers cuts shapes ({', '.join(SHAPES)}), not {model}")
        folder = located(model)
        yield folder, Path(table or Path(folder) / FILE_NAME).absolute(), None
        return
    shape = shape.cut(layers)
    with tempfile.TemporaryDirectory() as temporary:
        shape.write(temporary)
        path = Path(table).absolute() if table else Path(temporary) / FILE_NAME
        if table is None:
            shape.save_table(path, seed, rank)
        yield temporary, path, shape


def contender_of(text: str, table: Path) -> Contender:
    """From JSON: settings of a policy and a "name"; or the word `tuned`."""
    if text == TUNED:
        return Contender(TUNED, Table.load(table).tuned())
    rest = dict(settings_from_json(text))
    merge, name = rest.pop("merge", False), rest.pop("name", None)
    if not isinstance(merge, bool):
        raise PolicyError(f"policy {text!r}: merge={merge!r}: expected true or false")
    policy = Policy.from_dict(rest)
    if merge:  # its name stays its own, as it may stand beside the same policy without
        merge_is_asked()
    return Contender(name or policy.brief() + (" merge" if merge else ""), policy)


def rank_of_maps(policies: Sequence[str]) -> int | None:
    """The rank that policies as JSON ask of linear maps, 16 where they do not say; None if none
    has any."""
    given = (contender_of(text, Path()).policy for text in policies if text != TUNED)
    each = ((p, *map(p.for_layer, p.layers)) for p in given if p)
    return max((own.rank or 16 for layers in each for own in layers if own.frees), default=None)


def contenders_of(policies: Sequence[str], table: Path) -> list[Contender]:
    """Stock and what was asked for. Raises `PolicyError` for what cannot be meant."""
    contenders = [Contender("stock", None), *(contender_of(text, table) for text in policies)]
    check_names(["off", *(contender.name for contender in contenders)])
    known = Table.load(table)
    for contender in contenders:
        if contender.policy:
            known.check_policy(contender.policy)
    return contenders


def experts_load(E: int, skew: float, trace: str | None) -> list[float] | None:
    """[E] expected shares of the choices, descending; None: all alike.

    skew: the share falls with rank as rank^-skew. trace: a calibrated table, whose recorded loads
    (a mean over layers, by rank; stretched to E experts) are taken.
    """
    if trace:
        if skew:
            raise BenchError("give --skew or --trace, not both")
        layers = [layer.load for layer in Table.load(trace).layers.values()]
        curve = torch.stack([load.sort(descending=True).values for load in layers]).double().mean(0)
        if not curve.sum():
            raise BenchError(f"{trace}: a table made without text records no load")
        ranks = torch.linspace(0, 1, E, dtype=torch.double)[None, None]
        stretched = torch.nn.functional.interpolate(
            curve[None, None], ranks.shape[2], mode="linear", align_corners=True
        )[0, 0]
        return [float(x) for x in stretched / stretched.sum()]
    if not skew:
        return None
    shares = [rank**-skew for rank in range(1, E + 1)]
    return [share / sum(shares) for share in shares]


def _options(load: Load, dtype: str, eager: bool) -> dict[str, Any]:
    """For `vllm.LLM`: a batch's prompts are read in one step, so that decoding begins together."""
    if not torch.cuda.is_available():
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    longest = load.input_len + load.output_len
    return {
        "dtype": dtype,
        "enforce_eager": eager,
        "max_model_len": longest,
        "max_num_batched_tokens": max(max(load.batches) * load.input_len, longest, 2048),
    }


def _busiest(load: list[float] | None, E: int, K: int) -> dict[str, float]:
    """The busiest expert's share of the choices, as wanted and as a random router gives it."""
    if load is None:
        return {"wanted": 1 / E, "reached": 1 / E}
    return {"wanted": max(load), "reached": float(reached(tuple(load), K).max())}


def _check_memory(needed: float) -> None:
    """Refuse before minutes of filling memory."""
    import psutil

    free = psutil.virtual_memory().available
    if needed > 0.85 * free:
        raise BenchError(
            f"{needed / 1e9:.0f} GB of weights, {free / 1e9:.0f} GB of memory: take fewer layers "
            "with --layers"
        )


def _vocabulary(folder: str) -> int:
    from transformers import AutoConfig

    return int(AutoConfig.from_pretrained(folder).get_text_config().vocab_size)
