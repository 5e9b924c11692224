"""Is the model that vLLM will serve one that the table re-routes? Judged by vLLM's own configs."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sere import demo_model
from sere.calibration.calibrate import calibrate
from sere.checkpoint import Fingerprint
from sere.doctor import examine
from sere.serving.model_fit import check_kind
from sere.serving.refusal import ServingError
from sere.serving.vllm_plugin import register
from sere.table import LayerStatistics, Table
from tests.conftest import enlarge_experts, save_tokenizer
from tests.engines import OPTIONS, environment, run_engine, run_program
from tests.tiny_models import ARCHITECTURES, _class_and_config

pytestmark = pytest.mark.engine


def configure(sere: dict[str, Any] | None, **options: Any) -> Any:
    """What `LLM(...)` and `vllm serve` do first, before anything is loaded."""
    from vllm.engine.arg_utils import EngineArgs

    register()
    additional = {} if sere is None else {"sere": sere}
    return EngineArgs(**{**OPTIONS, **options}, additional_config=additional).create_engine_config()


def linked(folder: Path, **changes: Any) -> Path:
    """The demo model under another config.json."""
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        (folder / name).symlink_to(demo_model.PATH / name)
    config = json.loads((demo_model.PATH / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


# --- what a config says, overridden or not --------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"num_experts_per_tok": 2}, "experts per token: the table has 4, the model has 2"),
        ({"num_local_experts": 16}, "experts per layer: the table has 32, the model has 16"),
        ({"num_hidden_layers": 3}, r"MoE layers that the model lacks: \[3\]"),
    ],
    ids=str,
)
def test_an_overridden_model_is_another_model(
    change: dict[str, int], reason: str, table_path: Path, tmp_path: Path
) -> None:
    """In vLLM's flag and in the folder's own config.json; only the first is told how to go on."""
    sere = {"table": str(table_path)}
    with pytest.raises(Exception, match=reason) as refusal:
        configure(sere, hf_overrides=change)
    assert "--hf-overrides is part of the model" in str(refusal.value)
    with pytest.raises(Exception, match=reason) as refusal:
        configure(sere, model=str(linked(tmp_path / "model", **change)))
    assert "hf-overrides" not in str(refusal.value)


def test_the_remedy_for_an_overridden_model_works(tmp_path: Path) -> None:
    """A table of linked files under a config.json that says the same serves the override."""
    two = {"num_experts_per_tok": 2}
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"add {i}+{7 * i}:{8 * i}" for i in range(16)))
    folder, table = linked(tmp_path / "two", **two), tmp_path / "two.table"
    calibrate(str(folder), table, data=text, samples=16, progress=False)
    steps = [["rpc", "sere_record", True], ["generate", ["add 1+2:"] * 2, 3]]
    *_, recording = run_engine(
        [*steps, ["rpc", "sere_recording"]],
        sere={"table": str(table), "S": 1},
        options={"hf_overrides": two},
    )
    (ids, *_), *_ = recording[0]["0"]
    assert len(ids[0]) == 2


def test_layers_that_the_table_lacks_are_noticed_before_loading(
    table_path: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    model = linked(tmp_path / "model", num_hidden_layers=5)
    weights = load_file(model / "model.safetensors")
    more = {n.replace("layers.3.", "layers.4."): w.clone() for n, w in weights.items()}
    (model / "model.safetensors").unlink()
    save_file({**more, **weights}, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(Exception, match=r"MoE layers of the model that the table lacks: \[4\]"):
        configure({"table": str(table_path)}, model=str(model))
    # A layer of a drafter, numbered as a further one, is no layer of the model.
    (model / "config.json").write_text((demo_model.PATH / "config.json").read_text())
    configure({"table": str(table_path)}, model=str(model))


def test_the_doctor_asks_the_layers_themselves(table_path: Path, tmp_path: Path) -> None:
    """Where neither config nor files tell: without weights, a layer is known once it is built."""
    model = linked(tmp_path / "model", num_hidden_layers=5)
    (model / "model.safetensors").unlink()
    answers = {check.name: check for check in examine(str(model), str(table_path))}
    assert not answers["start-up"].passed
    assert "the table has no layer 4" in answers["start-up"].answer


@pytest.mark.matrix
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_vllm_counts_experts_as_calibration_does(architecture: str) -> None:
    """Or says that it does not know: no model is refused for a word that is read otherwise."""
    import vllm.config  # noqa: F401 - the converters cannot be imported before it
    from vllm.transformers_utils.model_arch_config_convertor import (
        MODEL_ARCH_CONFIG_CONVERTORS,
        ModelArchConfigConvertorBase,
    )

    from sere.calibration.null_models import experts_per_token
    from sere.models.moe import moe_layers

    model_class, config = _class_and_config(architecture)
    with torch.device("meta"):
        model = model_class(config)
    layers = moe_layers(model)
    convertor = MODEL_ARCH_CONFIG_CONVERTORS.get(config.model_type, ModelArchConfigConvertorBase)
    read = convertor(config, config.get_text_config())
    assert read.get_num_experts() in (0, layers[0].E)
    if architecture != "switch_transformers":  # which vLLM does not serve: two stacks, K unsaid
        assert read.get_num_experts_per_token() in (0, experts_per_token(model))
        assert layers[-1].index < read.get_num_hidden_layers()


# --- kinds of models that are refused -------------------------------------------------------------


def test_an_engine_without_decode_steps_is_refused(table_path: Path) -> None:
    with pytest.raises(Exception, match="pooling engine has none; start without") as refusal:
        configure({"table": str(table_path)}, runner="pooling")
    assert "--runner generate" in str(refusal.value)
    configure(None, runner="pooling")
    configure({"table": str(table_path)}, runner="generate")


DECLARED = {"expert_substitution": {"version": 1, "targets": {}}}


@pytest.mark.parametrize(
    "declared",
    [
        {"approximate_experts": {"0": [3, 5]}},
        {"compression_config": {"transform_config": DECLARED}},
    ],
    ids=["approximate_experts", "compression_config"],
)
def test_experts_that_are_constants_are_refused(
    declared: dict[str, Any], table_path: Path, tmp_path: Path
) -> None:
    """A MoNE checkpoint, as vLLM 0.33 reads it from its config."""
    model = str(linked(tmp_path / "model", **declared))
    with pytest.raises(Exception, match=r"by constants \(MoNE\).*serve the checkpoint that it was"):
        configure({"table": str(table_path), "fingerprint": "shape"}, model=model)
    configure(None, model=model)


def test_other_compressed_checkpoints_are_not_taken_for_such() -> None:
    config = SimpleNamespace(compression_config={"transform_config": {}})
    model = SimpleNamespace(runner_type="generate", hf_config=config, hf_text_config=config)
    check_kind(SimpleNamespace(model_config=model))
    config.compression_config["transform_config"] = DECLARED
    with pytest.raises(ServingError, match="MoNE"):
        check_kind(SimpleNamespace(model_config=model))


# --- two models in one process --------------------------------------------------------------------

# Engines one after the other, then the first again: [[texts, active experts before and after], ...]
TWO_ENGINES = """
import gc, json, sys
from vllm import LLM, SamplingParams
found = []
for options in json.load(sys.stdin):
    llm = LLM(**options)
    sampling = SamplingParams(temperature=0, max_tokens=6)
    prompts = [{"prompt_token_ids": [5 + i, 9 + i, 20 + 3 * i]} for i in range(8)]
    tokens = [list(r.outputs[0].token_ids) for r in llm.generate(prompts, sampling, use_tqdm=False)]
    found.append([tokens, llm.collective_rpc("sere_stats")[0]])
    del llm
    gc.collect()
print("RESULT", json.dumps(found))
"""


def test_two_architectures_in_one_process(table_path: Path, tmp_path: Path) -> None:
    """Each engine has its own table, layers and counters, whatever was there before."""
    other, table = olmoe(tmp_path / "olmoe"), tmp_path / "olmoe.table"
    random_table(E=6, K=2, layers=(0, 1), architecture="OlmoeForCausalLM").save(table)

    def options(folder: Path, path: Path) -> dict[str, Any]:
        sere = {"table": str(path), "S": 1, "min_active": 1, "fingerprint": "shape"}
        return {**OPTIONS, "model": str(folder), "additional_config": {"sere": sere}}

    def run(*engines: dict[str, Any]) -> list[Any]:
        done = run_program(TWO_ENGINES, given=json.dumps(engines), env=environment())
        assert done.returncode == 0, done.stderr[-3000:]
        line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))
        found: list[Any] = json.loads(line.removeprefix("RESULT"))
        return found

    first, second = options(demo_model.PATH, table_path), options(other, table)
    one, two, again = run(first, second, first)
    assert one == again
    assert [two] == run(second)
    assert set(one[1]) == {"0", "1", "2", "3"} and set(two[1]) == {"0", "1"}
    for _, stats in (one, two):
        assert all(s["active_after"] < s["active_before"] for s in stats.values())


def olmoe(folder: Path) -> Path:
    """A random checkpoint of another architecture than the demo model's."""
    from transformers import OlmoeConfig, OlmoeForCausalLM

    torch.manual_seed(0)
    model = OlmoeForCausalLM(
        OlmoeConfig(
            vocab_size=98,
            hidden_size=64,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_experts=6,
            num_experts_per_tok=2,
            max_position_embeddings=128,
            eos_token_id=0,
            pad_token_id=1,
        )
    )
    enlarge_experts(model)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def random_table(*, E: int, K: int, layers: tuple[int, ...], architecture: str) -> Table:
    """A table that moves much, of a model with random weights."""
    generator = torch.Generator().manual_seed(0)
    statistics = {}
    for index in layers:
        similarity = 0.2 + 0.6 * torch.rand(E, E, generator=generator)
        symmetric = ((similarity + similarity.T) / 2).fill_diagonal_(1)
        statistics[index] = LayerStatistics.without_text(symmetric)
    return Table(Fingerprint(architecture, E, K, layers), statistics, "random")
