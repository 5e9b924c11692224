"""A quantised checkpoint in the real engine, with the table of the original: int8 experts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sere import demo_model
from sere.calibration.calibrate import calibrate
from sere.demo_model.tasks import examples, is_correct
from sere.models.loading import load_tokenizer
from sere.similarity.agreement import same_nearest
from sere.table import Table
from tests.engines import INT8_EXPERTS, environment, run_engine, run_program

pytestmark = [
    pytest.mark.engine,
    pytest.mark.modes,
    pytest.mark.skipif(
        not torch.cpu._is_avx512_supported(), reason="vLLM's int8 experts need AVX-512"
    ),
]

TASKS = examples(32, seed=7, split="held_out")
PROMPTS = [task.prompt for task in TASKS]
TIERS = ["exact", None] * 16
TOKENS = 24
S1 = {"S": 1, "min_active": 1}
ON, OFF = ["rpc", "sere_policy", S1], ["rpc", "sere_policy", None]


@pytest.fixture(scope="module")
def int8_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model with int8 experts, one scale a row, as llm-compressor saves them."""
    folder = tmp_path_factory.mktemp("int8")
    shutil.copytree(demo_model.PATH, folder, dirs_exist_ok=True)
    tensors = {}
    for name, weight in load_file(demo_model.PATH / "model.safetensors").items():
        if ".experts." in name:
            scale = weight.float().abs().amax(1, keepdim=True) / 127
            tensors[name] = (weight / scale).round().to(torch.int8)
            tensors[f"{name}_scale"] = scale
        else:
            tensors[name] = weight
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    numbers = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**numbers, "strategy": "channel", "dynamic": False},
        "input_activations": {**numbers, "strategy": "token", "dynamic": True},
    }
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*self_attn.*", "re:.*mlp.gate$"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def runs(int8_folder: Path, table_path: Path) -> dict[str, Any]:
    steps: dict[str, list[Any]] = {
        "off": OFF,
        "stock": ["generate", PROMPTS, TOKENS],
        "on": ON,
        "reset": ["rpc", "sere_reset"],
        "mixed": ["generate", PROMPTS, TOKENS, TIERS],
        "stats": ["rpc", "sere_stats"],
    }
    results = run_engine(
        list(steps.values()),
        sere={"table": str(table_path), "fingerprint": "router", **S1},
        options={"model": str(int8_folder), "dtype": "bfloat16"},
        paths=(INT8_EXPERTS,),
    )
    return dict(zip(steps, results, strict=True))


def test_quantised_experts_are_rerouted_by_the_table_of_the_original(runs: dict[str, Any]) -> None:
    tokenizer = load_tokenizer(str(demo_model.PATH))
    answers = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens, _ in runs["stock"]]
    right = [is_correct(task, answer) for task, answer in zip(TASKS, answers, strict=True)]
    assert sum(right) >= 0.9 * len(TASKS)  # the experts were loaded, and as what they are
    same = [mine == stock for mine, stock in zip(runs["mixed"], runs["stock"], strict=True)]
    assert all(same[0::2])  # exact requests: tokens and logprobs, to the bit
    assert not all(same[1::2])
    (stats,) = runs["stats"]
    for layer in stats.values():
        assert layer["slots_rerouted"] > 0
        assert layer["active_after"] < layer["active_before"]


def test_an_engine_measures_int8_experts_as_transformers_does_with_their_scales(
    int8_folder: Path, tmp_path: Path
) -> None:
    """By the verb, which starts an engine. vLLM's kernel also rounds what the experts are given."""
    text, output = tmp_path / "text.jsonl", tmp_path / "engine.table"
    drawn = examples(24, seed=0, split="train")
    text.write_text("".join(json.dumps({"text": e.prompt + e.answer}) + "\n" for e in drawn))
    program = f"import sys; sys.path.insert(0, {str(INT8_EXPERTS)!r}); from sere.cli import main; "
    words = ["calibrate", str(int8_folder), "--engine", "vllm", "--data", str(text)]
    words += ["--allow-fewer", "--maps", "4", "-o", str(output), "--", "--dtype", "bfloat16"]
    ran = run_program(
        f"{program}raise SystemExit(main())",
        *[*words, "--max-model-len", "128"],
        env=environment(),
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    reference = calibrate(
        str(int8_folder), tmp_path / "table", data=text, allow_fewer=True, progress=False
    )
    mine = Table.load(output)
    assert mine.provenance["text_hashes"] == reference.provenance["text_hashes"]
    assert mine.maps is not None and mine.maps.R == 4
    for index, layer in reference.layers.items():
        own = mine.layers[index]
        assert own.tokens == layer.tokens
        assert mine.maps.layer(index).tokens.sum() == mine.fingerprint.K * layer.tokens
        assert (own.similarity - layer.similarity).abs().max() < 0.02
        assert (own.gram - layer.gram).abs().max() < 0.03 * layer.gram.abs().max()
        assert same_nearest(own.similarity, layer.similarity) > 0.9
