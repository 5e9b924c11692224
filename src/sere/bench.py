"""`sere bench`: how fast the real vLLM engine decodes, stock and re-routed taking turns.

First the gate: with S=K the engine does all of the work and moves nothing, and must write the same
tokens as stock, or no speed is reported. Then every round decodes one batch of random prompts under
each policy in one engine, so that ratios do not depend on what else the machine was doing. Beside
each measured time stands the time that the bytes read would take (`sere.roofline`).
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any, Protocol

import torch
from tqdm import tqdm

from sere import demo_model, report
from sere.bench_result import as_text, plot, summary
from sere.files import check_writable
from sere.journal import Journal
from sere.policy import Policy, PolicyError
from sere.roofline import Sizes
from sere.serving.engine import Batch, Engine
from sere.serving.random_weights import LOAD_FORMAT
from sere.shapes import SHAPES, Shape, shape_named
from sere.table import FILE_NAME, Table, stored_policy

TUNED = "tuned"
_WARM_TOKENS = 4


class BenchError(RuntimeError):
    """No speed can be reported, and why."""


@dataclass(frozen=True)
class Contender:
    """A policy and how it is served; None is stock routing."""

    name: str
    policy: Policy | None
    merge: bool = False


@dataclass(frozen=True)
class Load:
    """How a batch is made: lengths in tokens, rounds that count."""

    batches: tuple[int, ...]
    input_len: int = 128
    output_len: int = 32
    rounds: int = 5
    seed: int = 0

    def prompts(self, batch: int, turn: int, vocabulary: int) -> list[list[int]]:
        """Random token ids, others in every round."""
        random = Random(f"{self.seed}/{batch}/{turn}")
        return [[random.randrange(vocabulary) for _ in range(self.input_len)] for _ in range(batch)]


class Switchable(Protocol):
    """What is needed of an engine (`sere.serving.engine.Engine`)."""

    def set_policy(self, policy: Policy | None) -> None: ...
    def set_merge(self, on: bool) -> None: ...
    def reset_stats(self) -> None: ...
    def stats(self) -> dict[int, dict[str, int]]: ...
    def generate(
        self, prompts: Sequence[list[int]], max_tokens: int, *, to_the_end: bool
    ) -> Batch: ...


def run(
    model: str,
    table: str | None,
    output: str,
    *,
    policies: Sequence[str],
    load: Load,
    layers: int | None = None,
    skew: float = 0.0,
    trace: str | None = None,
    dtype: str | None = None,
    eager: bool = False,
) -> dict[str, Any]:
    """Measure, print, write `output` (JSON) and a plot beside it.

    model: a shape's name, or as for `calibrate`. table: of a shape by default random. layers: cuts
    a shape. skew, trace: how unequally a shape's experts are loaded, see `experts_load`.
    Raises `BenchError` if the gate fails.
    """
    check_writable(output)
    on_gpu = torch.cuda.is_available()
    dtype = dtype or ("bfloat16" if on_gpu else "float32")
    with _served(model, table, layers, load.seed) as (folder, table_path, shape):
        known = Table.load(table_path)
        E, K = known.fingerprint.E, known.fingerprint.K
        contenders = [Contender("stock", None), *(_contender(t, table_path) for t in policies)]
        _check(contenders, E, K)
        expected = experts_load(E, skew, trace) if shape else None
        if not shape and (skew or trace):
            raise BenchError(f"{model} has a router of its own: skew and trace are for shapes")
        sizes = Sizes.of(folder)
        options = _options(load, dtype, eager or not on_gpu)
        if shape:
            _check_memory(sizes, dtype, on_gpu)
            options |= {
                "load_format": LOAD_FORMAT,
                "model_loader_extra_config": {"seed": load.seed, "K": K, "load": expected},
            }
        settings = {
            "model": model,
            "layers": shape.layers if shape else sizes.layers,
            "of_layers": shape.of_layers if shape else sizes.layers,
            "vocabulary": _vocabulary(folder),
            "table": known.method,
            "E": E,
            "K": K,
            "dtype": dtype,
            "graphs": not options["enforce_eager"],
            "load": {**vars(load), "batches": None},
            "skew": {"skew": skew, "trace": trace, "busiest": max(expected or [1 / E])},
            "machine": report.provenance()["machine"],
        }
        pieces = {**settings, "policies": [c.name for c in contenders], "seed": load.seed}
        with Journal(f"{output}.unfinished", json.loads(json.dumps(pieces))) as journal:
            _measure(folder, table_path, contenders, load, options, journal, settings)
            result = {
                "provenance": report.provenance(),
                **settings,
                "table": {"method": known.method, **known.provenance},
                "load": {**vars(load), "batches": list(load.batches)},
                **summary(contenders, load, journal, sizes, K, getattr(torch, dtype).itemsize),
            }
            report.save_json(output, result)
    picture = Path(output).with_suffix(".png")
    plot(result, picture)
    print(as_text(result))
    print(f"\nwritten: {output}, {picture}")
    return result


@contextmanager
def _served(
    model: str, table: str | None, layers: int | None, seed: int
) -> Iterator[tuple[str, Path, Shape | None]]:
    """Folder and table of what is measured; of a shape they exist as long as this does."""
    shape = shape_named(model)
    if shape is None:
        if layers is not None:
            raise BenchError(f"--layers cuts shapes ({', '.join(SHAPES)}), not {model}")
        folder = demo_model.resolve(model)
        yield folder, Path(table or Path(folder) / FILE_NAME).absolute(), None
        return
    shape = shape.cut(layers)
    with tempfile.TemporaryDirectory() as temporary:
        shape.write(temporary)
        path = Path(table).absolute() if table else Path(temporary) / FILE_NAME
        if table is None:
            shape.table(seed).save(path)
        yield temporary, path, shape


def _contender(text: str, table: Path) -> Contender:
    """From JSON: settings of a policy, "merge" and a "name"; or the word `tuned`."""
    if text == TUNED:
        policy = stored_policy(table)
        if policy is None:
            raise PolicyError(f"{table} carries no policy: run `sere tune`, or give JSON")
        return Contender(TUNED, policy)
    try:
        settings = json.loads(text)
    except json.JSONDecodeError as error:
        raise PolicyError(f"policy {text!r}: not JSON ({error})") from error
    if not isinstance(settings, Mapping):
        raise PolicyError(f'policy {text!r}: expected settings such as {{"S": 1}}')
    rest = dict(settings)
    merge, name = rest.pop("merge", False), rest.pop("name", None)
    if not isinstance(merge, bool):
        raise PolicyError(f"policy {text!r}: merge={merge!r}: expected true or false")
    policy = Policy.from_dict(rest)
    return Contender(name or policy.brief() + (" merge" if merge else ""), policy, merge)


def _check(contenders: Sequence[Contender], E: int, K: int) -> None:
    names = [contender.name for contender in contenders]
    for name in names:
        if names.count(name) > 1:
            raise PolicyError(f"two policies are called {name}: give one of them a name")
    for contender in contenders:
        if contender.policy:
            contender.policy.check_against(K, E)


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
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if not torch.cuda.is_available():
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    longest = load.input_len + load.output_len
    return {
        "dtype": dtype,
        "enforce_eager": eager,
        "max_model_len": longest,
        "max_num_batched_tokens": max(max(load.batches) * load.input_len, longest, 2048),
    }


def _check_memory(sizes: Sizes, dtype: str, on_gpu: bool) -> None:
    """Refuse before minutes of filling memory; a GPU's engine says so itself."""
    if on_gpu:
        return
    import psutil

    needed = sizes.total * getattr(torch, dtype).itemsize
    free = psutil.virtual_memory().available
    if needed > 0.85 * free:
        raise BenchError(
            f"{needed / 1e9:.0f} GB of weights, {free / 1e9:.0f} GB of memory: take fewer layers "
            "with --layers"
        )


def _vocabulary(folder: str) -> int:
    from transformers import AutoConfig

    return int(AutoConfig.from_pretrained(folder).get_text_config().vocab_size)


def _measure(
    folder: str,
    table: Path,
    contenders: Sequence[Contender],
    load: Load,
    options: dict[str, Any],
    journal: Journal,
    settings: Mapping[str, Any],
) -> None:
    """Everything that the journal lacks."""
    wanted = [f"{batch}/{turn}" for batch in load.batches for turn in range(load.rounds)]
    if journal.get("machine") and all(journal.get(piece) for piece in wanted):
        return
    engine = Engine(folder, table, batch=max(load.batches), **options)
    if not journal.get("machine"):
        journal.add("machine", engine.probe())
    measure(engine, contenders, load, journal, K=settings["K"], vocabulary=settings["vocabulary"])


def measure(
    engine: Switchable,
    contenders: Sequence[Contender],
    load: Load,
    journal: Journal,
    *,
    K: int,
    vocabulary: int,
) -> None:
    """Gate, warm-up and rounds of every batch size. Raises `BenchError` if the gate fails."""
    total = len(load.batches) * load.rounds
    with tqdm(total=total, desc="bench", unit="round") as progress:
        for batch in load.batches:
            if journal.get(f"{batch}/gate") is None:
                journal.add(f"{batch}/gate", _gate(engine, load, batch, K, vocabulary))
            warm = False
            for turn in range(load.rounds):
                if journal.get(f"{batch}/{turn}") is None:
                    prompts = load.prompts(batch, turn, vocabulary)
                    if not warm:
                        brief = replace(load, output_len=_WARM_TOKENS)
                        for contender in contenders:
                            _timed(engine, contender, prompts, brief)
                        warm = True
                    first = turn % len(contenders)
                    order = [*contenders[first:], *contenders[:first]]
                    found = {c.name: _timed(engine, c, prompts, load) for c in order}
                    journal.add(f"{batch}/{turn}", found)
                progress.update()


def _gate(
    engine: Switchable, load: Load, batch: int, K: int, vocabulary: int
) -> dict[str, list[float]]:
    """Active experts of stock routing by layer, if S=K writes what stock writes."""
    prompts = load.prompts(batch, 0, vocabulary)

    def written(policy: Policy | None) -> list[list[int]]:
        engine.set_policy(policy)
        return engine.generate(prompts, load.output_len, to_the_end=True).token_ids

    engine.set_merge(False)
    stock = written(None)
    engine.reset_stats()
    exact = written(Policy(S=K))
    stats = engine.stats()
    if exact != stock:
        again = written(None)
        cause = (
            "S=K changes the tokens: please report"
            if again == stock
            else "two runs of stock vLLM differ from each other: this engine is not deterministic"
        )
        raise BenchError(f"batch {batch}: {cause}; no speed is reported")
    return _active(stats)


def _timed(
    engine: Switchable, contender: Contender, prompts: list[list[int]], load: Load
) -> dict[str, Any]:
    engine.set_policy(contender.policy)
    engine.set_merge(contender.merge)
    engine.reset_stats()
    batch = engine.generate(prompts, load.output_len, to_the_end=True)
    return {
        "tpot_ms": 1e3 * batch.decode_s / (load.output_len - 1),
        "active": _active(engine.stats()) if contender.policy else None,
    }


def _active(stats: Mapping[int, Mapping[str, int]]) -> dict[str, list[float]]:
    """[before, after] of every layer, a mean over decode steps."""
    return {
        str(index): [
            counters["active_before"] / max(counters["steps"], 1),
            counters["active_after"] / max(counters["steps"], 1),
        ]
        for index, counters in stats.items()
    }
