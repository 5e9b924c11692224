"""An engine that calibrates itself: the table that `sere calibrate` makes, from the engine's own
kernels, and a start that needs nothing else."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sere.calibration.calibrate import calibrate
from sere.demo_model.tasks import examples
from sere.evaluation.arms import Arm
from sere.evaluation.decoding import Passage
from sere.evaluation.passes import Pass, Stock, Sums
from sere.fitting.mapping import Rows
from sere.models.loading import load_model, load_tokenizer
from sere.models.moe import moe_layers
from sere.policy import Policy, in_words
from sere.serving import each_expert, observing, trial
from sere.serving.metrics import families
from sere.serving.observing import Observation
from sere.serving.own_table import sere_take_maps
from sere.serving.refusal import ServingError
from sere.serving.remote import refusing_once
from sere.serving.settings import Settings
from sere.similarity.sums import LayerSums
from sere.statistics import TENSORS
from sere.table import Table
from sere.text.corpus import Corpus, encoder, read_texts
from sere.text.pieces import pieces
from tests.conftest import enlarge_experts, save_tokenizer
from tests.engines import EXPERT_MAP, OPTIONS, Starting, environment, run_engine, run_program
from tests.serving import self_calibration_script as script
from tests.serving.test_serving import configure

pytestmark = pytest.mark.engine
LENGTH = 100

# Head dimensions that vLLM's CPU attention takes.
_COMMON = {
    "vocab_size": 98,
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "num_experts_per_tok": 2,
    "eos_token_id": 0,
    "pad_token_id": 1,
    "bos_token_id": None,
}
# Routing by softmax; by softmax, beside shared experts; by sigmoid with a bias, in groups, beside
# shared experts, behind a dense layer.
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 8},
    "qwen2_moe": {"num_experts": 8, "shared_expert_intermediate_size": 32},
    "glm4_moe": {
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 4,
        "topk_group": 2,
    },
}
LAYERS = {"qwen3_moe": (0, 1, 2), "qwen2_moe": (0, 1, 2), "glm4_moe": (1, 2)}


TEXTS, LONG, RANK = 120, 8, 4
LINEAR = {"S": 1, "min_active": 1, "fill": "linear"}
LARGER = {"S": 1, "min_active": 2, "pool": None}
TUNED = {"S": 1, "min_active": 1, "pool": 4, "batches": {"4": LARGER}}


def checkpoint(family: str, folder: Path) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**_COMMON, **FAMILIES[family]})
    model = AutoModelForCausalLM.from_config(config).float()
    enlarge_experts(model)
    for name, tensor in (*model.named_buffers(), *model.named_parameters()):
        if "correction_bias" in name:  # of zeros at first, which would hide that it is left out
            tensor.data.normal_(0, 0.05)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@dataclass
class Runs:
    """folder: of the engines' tables, by name. said: by each engine. models: by family. answered:
    by those that were asked, by name. text: of those that fit maps."""

    folder: Path
    said: dict[str, list[str]]
    models: dict[str, Path]
    answered: dict[str, dict[str, Any]]
    text: Path

    def table(self, name: str) -> Table:
        return Table.load(self.folder / f"{name}.table")

    def kept(self, family: str) -> Path:
        """The one table in the cache that engines of a family have kept."""
        (found,) = (self.folder / "cache").glob(f"{family}-*.table")
        return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, corpus_file: Path) -> Runs:
    """Engines of all families, which keep nothing; and of one that keeps its table, a first and a
    second start."""
    folder = tmp_path_factory.mktemp("engines")
    models = {family: checkpoint(family, folder / family) for family in FAMILIES}
    auto = {"data": str(corpus_file), "length": LENGTH}
    options = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 128,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 128,  # fewer rows than experts times a chunk's
    }

    def job(name: str, model: Path, **more: Any) -> dict[str, Any]:
        own = {"sere": {"auto": {**auto, **more}}}
        engine = {"model": str(model), "additional_config": own, **options}
        return {"options": engine, "output": str(folder / f"{name}.table")}

    jobs = {family: job(family, model, cache=False) for family, model in models.items()}
    long = passages(folder / "long.jsonl")
    for start in ("first", "second"):
        jobs[start] = job(start, models["qwen3_moe"], data=str(long))
    (folder / "nothing.jsonl").touch()
    nothing = {"data": str(folder / "nothing.jsonl"), "otherwise": "stock", "cache": False}
    jobs["stock"] = job("stock", models["qwen3_moe"], **nothing)
    jobs["traffic"] = watching(job("traffic", models["qwen2_moe"]), corpus_file)
    text = tasks(folder / "tasks.jsonl", long)
    jobs |= mapping(lambda name: job(name, models["glm4_moe"]), text)
    jobs["tuned"] = {**job("tuned", models["qwen3_moe"], data=str(long)), "policy": TUNED}
    for name in ("second", "tuned"):
        jobs[name]["tier"] = "independent"
    kill_in_the_middle(jobs["first"]["options"], folder / "cache")
    found = run_program(
        "from tests.serving.self_calibration_script import main; main()",
        given=json.dumps(list(jobs.values())),
        env=environment(SERE_CACHE=str(folder / "cache"), VLLM_LOGGING_LEVEL="INFO"),
    )
    lines = found.stdout.splitlines()
    said, answered = (
        [json.loads(line[len(mark) :]) for line in lines if line.startswith(mark)]
        for mark in (script.RESULT, script.ANSWERED)
    )
    assert said and answered, f"{said}\n{found.stderr[-4000:]}"
    asked = [name for name, each in jobs.items() if "prompts" in each]
    told, answers = (dict(zip(*pair, strict=True)) for pair in ((jobs, said[0]), (asked, answered)))
    return Runs(folder, told, models, answers, text)


def passages(path: Path) -> Path:
    """Texts that are longer than what a table is made of, so that there is something to decode."""
    drawn = [example.prompt + example.answer for example in examples(240, seed=5, split="train")]
    texts = ["".join(drawn[i : i + 12]) for i in range(0, len(drawn), 12)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def tasks(path: Path, long: Path) -> Path:
    """A text that is enough for maps of most experts, and some to decode."""
    drawn = [
        example.prompt + example.answer for example in examples(TEXTS - LONG, seed=3, split="train")
    ]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in drawn))
    with path.open("a") as file:
        file.writelines(long.read_text().splitlines(keepends=True)[:LONG])
    return path


def mapping(job: Callable[[str], dict[str, Any]], text: Path) -> dict[str, dict[str, Any]]:
    """Jobs of engines that fit maps and let them answer: a first and a second start, and of one
    that is given their table."""
    own = {"auto": {"data": str(text), "length": LENGTH, "maps": RANK}, **LINEAR}
    given = {"maps": own, "maps found": own, "maps named": dict(LINEAR)}
    made = {name: job(name) for name in given}
    encode = encoder(load_tokenizer(made["maps"]["options"]["model"]), LENGTH)
    prompts = [encode(example.prompt) for example in examples(16, seed=7, split="held_out")]
    for name, sere in given.items():
        made[name]["options"]["additional_config"] = {"sere": sere}
        made[name]["prompts"] = prompts
    made["maps named"]["named"] = "glm4_moe-*.table"
    return made


def kill_in_the_middle(options: dict[str, Any], cache: Path) -> None:
    """Start an engine, and kill it once it is at work on its table."""
    engine = Starting(
        sere=options["additional_config"]["sere"], options=options, env={"SERE_CACHE": str(cache)}
    )
    while not (locks := list(cache.glob("*.lock"))):
        assert engine.is_alive()
        time.sleep(0.01)
    engine.kill()
    assert locks and not list(cache.glob("*.table"))


def watching(job: dict[str, Any], text: Path) -> dict[str, Any]:
    """The job of an engine that is asked for answers to the texts that others calibrate on, and
    measures its experts on every row of these prompts."""
    options = job["options"]
    encode = encoder(load_tokenizer(options["model"]), LENGTH)
    drawn = Corpus.from_texts(
        read_texts(text), encode, source="", samples=20, length=LENGTH, seed=0, allow_fewer=True
    )
    asked = {"share": 1, "rows": 128, "tokens": drawn.tokens, "stable": 1}
    own = {"sere": {"auto": {"traffic": asked}, "S": 1, "min_active": 1}}
    options = {**options, "additional_config": own, "enable_prefix_caching": False}
    return {**job, "options": options, "prompts": drawn.sequences}


def assert_equal(mine: Table, reference: Table) -> None:
    """To rounding, of the same tokens."""
    assert mine.fingerprint == reference.fingerprint
    for index, layer in reference.layers.items():
        own = mine.layers[index]
        assert own.tokens == layer.tokens == reference.provenance["tokens"]
        for name in TENSORS:
            expected, found = getattr(layer, name), getattr(own, name)
            assert (found - expected).abs().max() < 2e-6 * expected.abs().max(), name


@pytest.mark.modes
@pytest.mark.parametrize("family", FAMILIES)
def test_an_engines_own_table_is_that_of_sere_calibrate(
    runs: Runs, corpus_file: Path, tmp_path: Path, family: str
) -> None:
    mine, reference = (
        runs.table(family),
        calibrate(
            str(runs.models[family]),
            tmp_path / "table",
            data=corpus_file,
            samples=20,
            length=LENGTH,
            progress=False,
        ),
    )
    assert mine.fingerprint.layers == LAYERS[family]
    for fact in ("corpus_hash", "text_hashes", "tokens", "sequences", "length", "seed"):
        assert mine.provenance[fact] == reference.provenance[fact]
    assert_equal(mine, reference)
    for index, layer in reference.layers.items():
        assert mine.layers[index].stability == layer.stability


# --- from what is served -----------------------------------------------------------------------


@pytest.mark.modes
def test_the_table_of_served_prompts_is_that_of_their_text(runs: Runs) -> None:
    mine, reference = runs.table("traffic"), runs.table("qwen2_moe")
    assert mine.provenance["text_hashes"] == []
    assert_equal(mine, reference)
    assert all(layer.stability is not None for layer in mine.layers.values())
    assert (runs.folder / "traffic.table").read_bytes() == runs.kept("qwen2_moe").read_bytes()


@pytest.mark.modes
def test_an_engine_is_stock_until_it_knows_its_traffic_and_then_goes_live(runs: Runs) -> None:
    answered = runs.answered["traffic"]
    before, after, moved = (answered[when] for when in ("before", "after", "moved"))
    assert before["inert"].startswith(script.WATCHING) and after["inert"] is None
    assert answered["watched"] == answered["stock"] != answered["live"]
    tokens = runs.table("traffic").provenance["tokens"]
    assert set(before["observed"].values()) == {0} and len(before["observed"]) == 3
    assert set(after["observed"].values()) == set(moved["observed"].values()) == {tokens}
    assert all(layer["slots_rerouted"] > 0 for layer in moved["layers"].values())
    # As it travels between processes, where keys are numbers.
    numbered = {
        part: {int(index): figures for index, figures in after[part].items()}
        for part in ("layers", "observed", "shadow")
    }
    (exported,) = (
        family
        for family in families({0: [{**after, **numbered}]}, up=True)
        if family.name == "sere_observed_rows"
    )
    assert [sample.value for sample in exported.samples] == [tokens] * 3
    said = "\n".join(runs.said["traffic"])
    assert f"LIVE from now on with the table of {tokens} rows of traffic" in said


# --- linear maps ----------------------------------------------------------------------------------


def assert_maps_equal(mine: Table, reference: Table) -> None:
    """To rounding, of the same rows. In float32 an expert's outputs differ in their last bits by
    how many rows a kernel is given; what is fitted to them is stored in bf16, where two such fits
    are the same or neighbours."""
    assert mine.maps is not None and reference.maps is not None
    rows = torch.randn(64, _COMMON["hidden_size"], generator=torch.Generator().manual_seed(0))
    fitted = 0
    for index in reference.layers:
        own, their = mine.maps.layer(index), reference.maps.layer(index)
        for name in ("tokens", "ranks"):
            assert torch.equal(getattr(own, name), getattr(their, name)), name
        for name in ("left", "affine"):
            torch.testing.assert_close(getattr(own, name), getattr(their, name), atol=2e-5, rtol=0)
        for u, rank in enumerate(their.ranks.tolist()):
            asked = (rows, torch.full((len(rows), 1), u), torch.ones(len(rows), 1))
            mapped, expected = own.answers(*asked), their.answers(*asked)
            assert (mapped - expected).norm() <= 2**-8 * expected.norm()
            fitted += rank == RANK and their.left[u, -1].item() < 0.9
    assert fitted >= 8  # of 16 experts


@pytest.mark.modes
def test_an_engines_own_maps_are_those_of_sere_calibrate(runs: Runs, tmp_path: Path) -> None:
    path = tmp_path / "table"
    settings = {"samples": TEXTS, "length": LENGTH, "maps": RANK, "progress": False}
    calibrate(str(runs.models["glm4_moe"]), path, data=runs.text, **settings)
    mine, reference = Table.load(runs.kept("glm4_moe")), Table.load(path)
    assert_equal(mine, reference)
    assert_maps_equal(mine, reference)


@pytest.mark.modes
def test_maps_that_an_engine_has_fitted_answer_as_those_that_it_is_given(runs: Runs) -> None:
    first, second, named = (runs.answered[name] for name in ("maps", "maps found", "maps named"))
    assert first["live"] != first["stock"] == named["stock"]
    assert first["live"] == second["live"] == named["live"]
    for answered in (first, second, named):
        assert all(layer["slots_rerouted"] > 0 for layer in answered["moved"]["layers"].values())
    said, later = ("\n".join(runs.said[name]) for name in ("maps", "maps found"))
    assert "linear maps of rank 4 in 2 layers" in said and "reserved with the model" in said
    assert "too few for a map" in said
    assert "calibrated at an earlier start" in later and "calibrating on" not in later


# --- a start that needs nothing else --------------------------------------------------------------


@pytest.mark.modes
def test_a_second_start_finds_the_table_of_the_first(runs: Runs) -> None:
    kept = runs.kept("qwen3_moe")
    data = kept.read_bytes()
    assert (runs.folder / "first.table").read_bytes() == data
    assert (runs.folder / "second.table").read_bytes() == data
    first, second = ("\n".join(runs.said[start]) for start in ("first", "second"))
    assert f"kept for later starts: {kept}" in first
    assert f"calibrated at an earlier start: {kept}" in second
    assert "calibrating on" in first and "calibrating on" not in second


@pytest.mark.modes
def test_an_engine_that_was_killed_at_work_leaves_its_table_to_the_next(runs: Runs) -> None:
    """`runs` killed one before the first of these started."""
    first = "\n".join(runs.said["first"])
    assert "kept for later starts" in first and "waiting for it" not in first
    files = sorted(path.suffix for path in (runs.folder / "cache").glob("qwen3_moe-*"))
    assert files == [".json", ".lock", ".table"]
    assert not list((runs.folder / "cache").glob(".*"))  # nor a file that is half written


@pytest.mark.modes
def test_a_later_start_takes_what_was_tuned_meanwhile(runs: Runs) -> None:
    first, tuned = ("\n".join(runs.said[start]) for start in ("first", "tuned"))
    assert f"S=1 tau=0.02, table {runs.kept('qwen3_moe')}" in first  # a row has two experts
    chosen = in_words(Policy.from_dict(TUNED))
    assert f"the policy is the choice of `sere tune`: {chosen}" in tuned
    assert f"{chosen}, table {runs.folder / 'tuned.cache'}" in tuned
    assert "too little text" in tuned and "from enough text" in first


def decoded(folder: Path, drawn: list[list[int]], table: Table) -> Sums:
    """What a table's policy does to these texts, decoded together."""
    model = load_model(str(folder))
    layers = moe_layers(model)
    read = [Passage(tokens, trial.PROMPT) for tokens in drawn]
    own = Pass(model, layers, read, Arm("", table.policy, table))
    (found,) = own.finished(*own.run(), Stock(*Pass(model, layers, read).run()))
    return found


@pytest.mark.modes
def test_a_start_says_what_its_policy_does_to_quality(runs: Runs) -> None:
    """The reference decodes the same texts in transformers, all steps in one pass."""
    (kept,) = (runs.folder / "tuned.cache").glob("*.table")
    table, folder = Table.load(kept), runs.models["qwen3_moe"]
    (size,) = json.loads(kept.with_suffix(".report.json").read_text())["sizes"]
    texts, encode = read_texts(runs.folder / "long.jsonl"), encoder(load_tokenizer(str(folder)))
    read = set(table.provenance["text_hashes"])
    found = pieces(
        texts, encode, source="", read=read, cut=LENGTH, length=trial.LENGTH, count=8, seed=0
    )
    drawn = found.tokens
    assert (found.later, found.read) == (8, 0)
    behind = [encode(text)[LENGTH:] for text in texts]
    assert all(any(piece == own[: len(piece)] for own in behind) for piece in drawn)
    expected = decoded(folder, drawn, table)
    steps = trial.LENGTH - trial.PROMPT - 1
    assert (size["requests"], expected.steps, expected.tokens) == (8, steps, 8 * steps)
    assert sum(size["kl"]) / 8 == pytest.approx(expected.kl / expected.tokens, rel=1e-3)
    assert expected.kl / expected.tokens > 1e-3
    nll = sum(size["stock_loss"]) + sum(size["loss"])
    assert nll / 8 == pytest.approx(expected.nll / expected.tokens, rel=1e-4)
    assert size["same"] == pytest.approx(expected.top1 / expected.tokens, abs=1e-6)
    for name, active in (("before", expected.before), ("after", expected.after)):
        assert size[name] == pytest.approx(sum(active.values()) / steps / 3, rel=0.02)
    assert size["after"] < 0.9 * size["before"]
    assert len(size["ms"]) == len(size["stock_ms"]) == trial.TURNS and min(size["ms"]) > 0


@pytest.mark.modes
def test_a_report_is_made_once_for_each_policy(runs: Runs) -> None:
    path = runs.kept("qwen3_moe").with_suffix(".report.json")
    first, second, tuned = ("\n".join(runs.said[n]) for n in ("first", "second", "tuned"))
    assert "trying S=1 tau=0.02" in first and "S=1 tau=0.02 beside stock routing, here" in first
    assert "none of them calibrated on; 8 are later parts of texts that were" in first
    assert f"Measured at an earlier start: {path}" in second and "trying" not in second
    assert f"trying {in_words(Policy.from_dict(TUNED))}" in tuned


@pytest.mark.modes
def test_requests_may_ask_for_what_the_policy_that_was_found_has(runs: Runs) -> None:
    """Be independent, where it has a pool: the engine's config names no policy at all."""
    second, tuned = ("\n".join(runs.said[start]) for start in ("second", "tuned"))
    assert 'independent: "sere": "independent" is not to be had here: such rows know' in second
    assert "independent: [3, 3, 3] rows" in tuned


@pytest.mark.modes
def test_an_engine_that_cannot_calibrate_serves_stock_if_that_was_chosen(runs: Runs) -> None:
    said = "\n".join(runs.said["stock"])
    assert "NOTHING IS RE-ROUTED: no table, and stock was asked for then" in said
    assert "nothing.jsonl: no text in it" in said
    assert not (runs.folder / "stock.table").exists()


@pytest.mark.modes
def test_an_engine_of_its_own_process_goes_live_by_the_entry_point_alone(
    runs: Runs, tmp_path: Path
) -> None:
    """Compiled, and of two ranks with half of the experts each: its table and maps are those of one
    rank. So is the table of what it serves after that."""
    prompts = [example.prompt for example in examples(16, seed=7, split="held_out")]
    own = {"auto": {"data": str(runs.text), "length": LENGTH, "maps": RANK}, **LINEAR}
    text = Corpus.from_texts(
        read_texts(runs.text),
        encoder(load_tokenizer(str(runs.models["glm4_moe"])), LENGTH),
        source="",
        samples=TEXTS,
        length=LENGTH,
        seed=0,
    )
    told, stats, _, counted, _, _, made, _, _, _, moved = run_engine(
        [
            ["rpc", "sere_description"],
            ["rpc", "sere_stats"],
            ["generate", prompts, 12],
            ["rpc", "sere_stats"],
            ["watch", str(runs.kept("glm4_moe")), text.tokens],
            ["ask", [{"prompt": ids, "max_tokens": 1} for ids in text.sequences]],
            ["watched", str(tmp_path / "traffic.table")],
            ["rpc", "sere_policy", {"S": 1, "min_active": 1}],
            ["rpc", "sere_reset"],
            ["generate", prompts, 12],
            ["rpc", "sere_stats"],
        ],
        sere=own,
        options={
            **OPTIONS,
            "model": str(runs.models["glm4_moe"]),
            "enforce_eager": False,
            "compilation_config": {"backend": "eager"},  # traced as ever, no C++ written
            "tensor_parallel_size": 2,
            "enable_expert_parallel": True,
            "max_num_seqs": 8,
        },
        env={
            "SERE_CACHE": str(tmp_path),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
            "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # to let it watch from within this test
        },
        paths=(EXPERT_MAP,),
    )
    assert [rank["inert"] for rank in told] == [None, None]
    assert told[0]["policy"] == "S=1 min_active=1 fill=linear"
    assert not any(any(layer.values()) for layer in stats[0].values())  # nobody counts that text
    for both in (counted, moved):
        assert both[0] == both[1]
        assert all(layer["slots_rerouted"] > 0 for layer in both[0].values())
    (kept,) = tmp_path.glob("glm4_moe-*.table")
    mine, reference = Table.load(kept), Table.load(runs.kept("glm4_moe"))
    assert_equal(mine, reference)
    assert_maps_equal(mine, reference)
    sizes = [
        json.loads(path.with_suffix(".report.json").read_text())["sizes"]
        for path in (kept, runs.kept("glm4_moe"))
    ]
    (mine_tried,), (tried,) = sizes
    assert mine_tried["kl"] == pytest.approx(tried["kl"], rel=1e-2)
    assert mine_tried["after"] == tried["after"] < tried["before"]
    assert made[0] == made[1]
    assert_equal(Table.load(tmp_path / "traffic.table"), reference)


@pytest.mark.parametrize("own", [None, "the shadow check's"])
def test_a_layer_is_left_as_it_was_found(own: str | None) -> None:
    class Experts:
        quant_config, apply_router_weight_on_input = None, False

        def forward_modular(self) -> None:
            pass

    runner = SimpleNamespace(
        layer_id=0,
        moe_config=SimpleNamespace(num_logical_experts=4),
        routed_experts=Experts(),
        routed_output_transform=None,
    )
    if own:
        runner.routed_experts.forward_modular = own  # type: ignore[method-assign]
    before = dict(vars(runner.routed_experts))
    observation = Observation([runner], "frobenius", rows=8, adds_up=True, ranks=1)
    with pytest.raises(ZeroDivisionError), observation.watching():
        assert vars(runner.routed_experts) != before
        raise ZeroDivisionError
    assert vars(runner.routed_experts) == before


def test_whatever_a_rank_cannot_do_is_an_answer_of_its_own(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """An error would leave those of later ranks to be taken for answers to the next question, such
    as to serve stock then."""

    def worker(rank: int) -> Any:
        parallel = SimpleNamespace(distributed_executor_backend="mp", world_size=2)
        session = SimpleNamespace(asleep=False, answers=SimpleNamespace(learn=full))
        compilation = SimpleNamespace(_sere_session=session)
        config = SimpleNamespace(compilation_config=compilation, parallel_config=parallel)
        return SimpleNamespace(vllm_config=config, rank=rank)

    ask = refusing_once(sere_take_maps)
    assert "no room for so many rows" in ask(worker(0), 0, None)
    with pytest.raises(ServingError, match="no room for so many rows"):
        ask(worker(1), 0, None)
    assert caplog.text.count("Traceback") == 2


class Group:
    """A tensor-parallel group as one of its two ranks sees it: the other one is as far, and well.

    waits: shapes of what they have waited for each other with."""

    def __init__(self) -> None:
        self.waits: list[tuple[int, ...]] = []

    def all_reduce(self, part: torch.Tensor) -> torch.Tensor:
        self.waits.append(tuple(part.shape))
        return part

    def broadcast_object(self, told: Any, src: int) -> Any:
        self.waits.append(())
        return told


def full(*_: Any, **__: Any) -> Any:
    raise MemoryError("no room for so many rows")


@pytest.mark.parametrize("fault", [None, "sums", "inputs", "outputs", "a kernel", "sums, serving"])
def test_a_rank_that_fails_keeps_no_other_waiting(
    fault: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes part in all that the others wait for, and the start ends with its reason on all."""

    class Layer:
        quant_config, apply_router_weight_on_input = None, False
        quant_method = SimpleNamespace()
        calls = 0

        def forward_modular(
            self, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor
        ) -> torch.Tensor:
            Layer.calls += 1
            if fault == "a kernel" and Layer.calls == 2:
                full()
            return x * (topk_weights * (topk_ids + 1)).sum(1, keepdim=True)

    runner = SimpleNamespace(
        layer_id=0,
        layer_name="layer",
        moe_config=SimpleNamespace(num_logical_experts=4, hidden_dim_unpadded=8),
        routed_experts=Layer(),
        routed_output_transform=None,
        _fused_output_is_reduced=False,
    )
    group = Group()
    for module in (each_expert, observing):
        monkeypatch.setattr(module, "symbol", lambda name: lambda: group)
    if fault and fault.startswith("sums"):
        monkeypatch.setattr(LayerSums, "add", full)
    elif fault == "inputs":
        monkeypatch.setattr(Rows, "add", full)
    elif fault == "outputs":
        monkeypatch.setattr(torch.Tensor, "new_empty", full)
    serves = fault == "sums, serving"
    observation = Observation(
        [runner], "frobenius", rows=8, adds_up=True, ranks=2, serves=serves, keeps=True
    )
    observation.expect({"a": (0, False), "b": (1, False)})
    x = torch.randn(6, 8)
    with observation.watching():
        observation.begin(["a", "b"], [4, 2], None)
        out = runner.routed_experts.forward_modular(
            x=x, topk_weights=torch.ones(6, 1), topk_ids=torch.tensor([[0, 1, 2, 3, 0, 1]]).T
        )
    assert torch.equal(out, x * torch.tensor([[1.0, 2, 3, 4, 1, 2]]).T)
    # Of the first text two experts at a time, and the layer's own mixture; all four of the second.
    assert group.waits == [(8, 8), (8, 8), (4, 8), (8, 8)]
    with nullcontext() if fault is None else pytest.raises(ServingError, match="no room for so"):
        observation.agree("cpu")


@pytest.mark.parametrize(
    ("experts", "more", "reason"),
    [
        ({"apply_router_weight_on_input": True}, {}, "weighs its experts' inputs"),
        ({}, {"routed_output_transform": object()}, "latent experts"),
    ],
    ids=["Llama 4", "latent"],
)
def test_experts_that_cannot_be_compared_by_their_outputs_are_refused(
    experts: dict[str, Any], more: dict[str, Any], reason: str
) -> None:
    own = {"apply_router_weight_on_input": False, **experts}
    runner = SimpleNamespace(
        layer_name="model.layers.0.experts",
        routed_experts=SimpleNamespace(**own),
        **{"routed_output_transform": None, **more},
    )
    with pytest.raises(ServingError, match=reason):
        Observation([runner], "frobenius", rows=8, adds_up=True, ranks=1)


# --- what the user wrote, and what is refused before weights are loaded ---------------------------


def parse(**given: Any) -> Settings:
    return Settings.parse(given, model_folder=None, model_default={})


def test_without_a_policy_the_cautious_default_is_served() -> None:
    assert parse(auto=True).policy == Policy(S=2, tau=0.02)
    assert parse(auto=True, S=1).policy == Policy(S=1)
    assert parse(auto=True).table is None


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"auto": True, "table": "t.table"}, "leave one of the two out"),
        ({"auto": 1}, "expected true, or settings"),
        ({"auto": {"date": "t"}}, "did you mean 'data'"),
        ({"auto": {"data": "/none/t.jsonl"}}, "no such file here"),
        ({"auto": {"method": "cka-linear"}}, "depend on which rows are read together"),
        ({"auto": {"otherwise": "wait"}}, 'expected "calibrate" or "stock"'),
        ({"auto": {"wait": -1}}, "expected seconds"),
        ({"auto": {"maps": 0}}, "maps=0: expected a whole number >= 1"),
        ({"auto": {"maps": 4, "traffic": True}}, "maps: of a text, and with traffic none is read"),
        ({"auto": True, "maps": True}, "fits linear maps if it is told their rank"),
        ({"auto": {"samples": 0}}, "expected a whole number >= 1"),
        ({"auto": {"traffic": {}, "samples": 9}}, "samples: of a text, and with traffic none"),
        ({"auto": {"traffic": {"share": 0}}}, "expected 0 < share <= 1"),
        ({"auto": {"traffic": {"rows": 0}}}, "expected a whole number >= 1"),
        ({"auto": {"traffic": {"token": 9}}}, "did you mean 'tokens'"),
        ({"auto": {"traffic": 1}}, "expected true, or settings"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_meant_are_refused(given: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse(**given)


@pytest.mark.parametrize(
    ("options", "sere", "reason"),
    [
        ({"data_parallel_size": 2}, {}, "data-parallel ranks run their experts in lockstep"),
        ({"pipeline_parallel_size": 2}, {}, "each pipeline stage has a part of the layers"),
        ({"skip_tokenizer_init": True}, {}, "without a tokenizer"),
        ({}, {"fill": "linear"}, "needs linear maps"),
        ({}, {"auto": {"maps": 4}, "fill": "linear", "rank": 8}, "rank=8 exceeds"),
        ({"enable_lora": True}, {"auto": {"maps": 4}}, "the maps know nothing of adapters"),
        ({}, {"layers": {"9": {"S": 1}}}, r"layers \[9\] of the policy are not among"),
    ],
    ids=str,
)
def test_what_an_engine_cannot_calibrate_is_refused_before_weights_are_loaded(
    options: dict[str, Any],
    sere: dict[str, Any],
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SERE_CACHE", str(tmp_path))
    with pytest.raises(ServingError, match=reason):
        configure(options, **{"auto": True, **sere})


def test_a_file_without_text_is_refused_before_weights_are_loaded(tmp_path: Path) -> None:
    (tmp_path / "nothing.jsonl").touch()
    with pytest.raises(ServingError, match=r"nothing\.jsonl: no text in it"):
        configure(auto={"data": str(tmp_path / "nothing.jsonl"), "cache": False})


def test_the_word_alone_is_enough_and_others_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.engine.arg_utils import EngineArgs

    configure(auto=True)
    EngineArgs(**OPTIONS, additional_config={"sere": "auto"}).create_engine_config()
    with pytest.raises(ServingError, match='write "auto" for an engine that calibrates itself'):
        EngineArgs(**OPTIONS, additional_config={"sere": "atuo"}).create_engine_config()
