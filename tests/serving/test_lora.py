"""LoRA on a re-routed model: adapters of attention and experts, in the real engine.

The experts' kernel that vLLM takes then does not run on CPUs: `tests/lora_experts` stands in for
it. All around it is vLLM's own: how adapters are loaded, and how they wrap the layers.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sere import demo_model
from sere.demo_model.tasks import examples
from sere.models.loading import load_model, load_tokenizer
from tests.engines import LORA_EXPERTS, run_engine

pytestmark = [pytest.mark.engine, pytest.mark.modes]

RANK, ALPHA, TOKENS = 4, 8, 12
PROMPTS = [task.prompt for task in examples(16, seed=7, split="held_out")]
TIERS = ["exact", None] * 8
ADAPTED = [i % 4 < 2 for i in range(16)]  # half of the exact and half of the other requests
S1 = {"S": 1, "min_active": 1}
ON, OFF = ["rpc", "sere_policy", S1], ["rpc", "sere_policy", None]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random adapter, as PEFT saves them, of every projection; and beside it, in `merged`, the
    checkpoint with it added to the weights."""
    folder = tmp_path_factory.mktemp("adapter")
    random = torch.Generator().manual_seed(0)
    weights = load_file(demo_model.PATH / "model.safetensors")
    pairs: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        if "_proj" in name:
            a = torch.randn(RANK, weight.shape[1], generator=random) * 0.1
            b = torch.randn(weight.shape[0], RANK, generator=random) * 0.1
            module = f"base_model.model.{name.removesuffix('.weight')}"
            pairs |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
            weights[name] = weight.float() + ALPHA / RANK * b @ a
    save_file(pairs, folder / "adapter_model.safetensors")
    projections = sorted({name.split(".")[-3] for name in pairs})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": projections}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    shutil.copytree(demo_model.PATH, folder / "merged")
    settings = json.loads((folder / "merged/config.json").read_text())
    (folder / "merged/config.json").write_text(json.dumps({**settings, "dtype": "float32"}))
    save_file(weights, folder / "merged/model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def runs(adapter: Path, table_path: Path) -> dict[str, Any]:
    adapters = [str(adapter) if adapted else None for adapted in ADAPTED]
    steps: dict[str, list[Any]] = {
        "off": OFF,
        "base": ["generate", PROMPTS, TOKENS],
        "stock": ["generate", PROMPTS, TOKENS, None, adapters],
        "on": ON,
        "reset": ["rpc", "sere_reset"],
        "mixed": ["generate", PROMPTS, TOKENS, TIERS, adapters],
        "stats": ["rpc", "sere_stats"],
    }
    results = run_engine(
        list(steps.values()),
        sere={"table": str(table_path), **S1},
        # A second slot, empty: for rows without an adapter vLLM's CPU operators take the last one.
        options={"enable_lora": True, "max_loras": 2, "max_lora_rank": 8},
        paths=(LORA_EXPERTS,),
    )
    return dict(zip(steps, results, strict=True))


def test_the_adapter_is_applied_where_it_was_asked_for(runs: dict[str, Any], adapter: Path) -> None:
    """As transformers computes it, of a checkpoint with the adapter merged into its weights."""
    tokenizer = load_tokenizer(str(adapter / "merged"))
    models: dict[bool, Any] = {
        True: load_model(str(adapter / "merged")).float(),
        False: load_model(str(demo_model.PATH)).float(),
    }
    for prompt, adapted, (tokens, logprobs) in zip(PROMPTS, ADAPTED, runs["stock"], strict=True):
        question = tokenizer(prompt).input_ids
        with torch.inference_mode():
            logits = models[adapted](torch.tensor([question + tokens])).logits[0]
        expected = logits.log_softmax(-1)[len(question) - 1 : -1]
        for position, best in zip(expected, logprobs, strict=True):
            for token, logprob in best.items():
                assert position[int(token)].item() == pytest.approx(logprob, abs=1e-3)
    changed = [mine != base for mine, base in zip(runs["stock"], runs["base"], strict=True)]
    assert changed == ADAPTED


def test_requests_with_an_adapter_are_rerouted(runs: dict[str, Any]) -> None:
    same = [mine == stock for mine, stock in zip(runs["mixed"], runs["stock"], strict=True)]
    for adapted in (True, False):
        own = [i for i in range(len(PROMPTS)) if ADAPTED[i] == adapted]
        assert all(same[i] for i in own if TIERS[i] == "exact")  # tokens and logprobs, to the bit
        assert not all(same[i] for i in own if TIERS[i] is None)
    (stats,) = runs["stats"]
    for layer in stats.values():
        assert layer["slots_rerouted"] > 0
        assert layer["active_after"] < layer["active_before"]
