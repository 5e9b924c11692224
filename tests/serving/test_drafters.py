"""Speculative decoding: the target is re-routed, the drafter beside it is left alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sere import demo_model
from sere.checkpoint import Fingerprint
from sere.demo_model.tasks import examples
from sere.serving import drafters
from sere.serving.session import ServingError, Session
from sere.table import LayerStatistics, Table
from tests.conftest import enlarge_experts
from tests.engine_script import RESULT
from tests.engines import OPTIONS, environment, run_engine, run_program
from tests.serving.test_rows import session as new_session

pytestmark = [pytest.mark.engine, pytest.mark.modes]

E, K = 8, 2
S1 = {"S": 1, "min_active": 1}
SMALL = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}
EXPERTS = {"moe_intermediate_size": 32, "num_experts_per_tok": K, "num_nextn_predict_layers": 1}
SHARED = {
    "num_hidden_layers": 3,
    "n_routed_experts": E,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
LATENT = dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "kv_lora_rank"), 8)
LINEAR = dict.fromkeys(("linear_num_value_heads", "linear_num_key_heads"), 2)
# model_type -> architecture, its configuration
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_next": (
        "Qwen3NextForCausalLM",
        {"num_hidden_layers": 4, "num_experts": E, "head_dim": 32, **LINEAR}
        | {"shared_expert_intermediate_size": 32}
        | dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 32),
    ),
    "glm4_moe": ("Glm4MoeForCausalLM", {**SHARED, "head_dim": 32}),
    "deepseek_v3": ("DeepseekV3ForCausalLM", {**SHARED, **LATENT, "q_lora_rank": 16}),
}
MTP = {"method": "mtp", "num_speculative_tokens": 1}


def configured(family: str, folder: Path) -> Any:
    """The configuration of a tiny model of a family, in a folder with the demo's tokenizer."""
    from transformers import AutoConfig

    architecture, own = FAMILIES[family]
    settings = {**SMALL, **EXPERTS, **own}
    config = AutoConfig.for_model(family, architectures=[architecture], **settings)
    config.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_model.PATH / name, folder)
    return config


def random_table(family: str, layers: tuple[int, ...], path: Path) -> str:
    random = torch.Generator().manual_seed(0)
    similarity = 0.2 + 0.6 * torch.rand(E, E, generator=random)
    similarity = ((similarity + similarity.T) / 2).fill_diagonal_(1)
    known = Fingerprint(FAMILIES[family][0], E, K, layers)
    statistics = {index: LayerStatistics.without_text(similarity) for index in layers}
    Table(known, statistics, "random").save(path)
    return str(path)


# --- what becomes of the layers, in vLLM's own worker ---------------------------------------------

NAMES = "model.layers.{}.mlp.experts"
# By target: the decoder layers that are re-routed; of its drafter the MoE layers, whose indices
# are those of the target's, or what comes next.
TARGETS: dict[str, tuple[tuple[int, ...], list[str]]] = {
    "qwen3_next": ((0, 1, 2, 3), ["mtp.layers.0.mlp.experts"]),
    "glm4_moe": ((1, 2), [NAMES.format(3)]),
    "deepseek_v3": ((1, 2), [NAMES.format(3)]),
    "demo, dense draft": ((0, 1, 2, 3), []),
    "demo, itself": ((0, 1, 2, 3), ["draft_model." + NAMES.format(i) for i in range(4)]),
}


def jobs(table_path: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """For each target the arguments of an engine that drafts."""
    from transformers import Qwen3Config

    found = {}
    for family in FAMILIES:
        home = folder / family
        configured(family, home)
        table = random_table(family, TARGETS[family][0], home / "t.table")
        found[family] = {"model": str(home), "speculative_config": MTP, "table": table}
    dense = Qwen3Config(
        num_hidden_layers=2, head_dim=32, architectures=["Qwen3ForCausalLM"], **SMALL
    )
    dense.save_pretrained(folder / "dense")
    for name, drafter in {"dense draft": folder / "dense", "itself": demo_model.PATH}.items():
        spec = {"method": "draft_model", "num_speculative_tokens": 2, "model": str(drafter)}
        found[f"demo, {name}"] = {"speculative_config": spec, "table": str(table_path)}
    return found


@pytest.fixture(scope="module")
def loaded(table_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """By target: its layers and its drafter's, as one process's workers have loaded them."""
    wanted = jobs(table_path, tmp_path_factory.mktemp("loaded"))
    common = {**OPTIONS, "load_format": "dummy", "skip_tokenizer_init": True, "max_model_len": 64}
    arguments = []
    for job in wanted.values():
        sere = {"table": job.pop("table"), "fingerprint": "shape"}
        arguments.append({**common, **job, "additional_config": {"sere": sere}})
    done = run_program(
        "from tests.serving.load_workers import main; main()",
        given=json.dumps(arguments),
        env=environment(),
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith(RESULT)]
    assert lines, (done.stdout + done.stderr)[-4000:]
    return dict(zip(wanted, json.loads(lines[0][len(RESULT) :]), strict=True))


@pytest.mark.parametrize("target", TARGETS)
def test_the_target_is_rerouted_and_its_drafter_is_not(
    target: str, loaded: dict[str, dict[str, Any]]
) -> None:
    layers, drafted = TARGETS[target]
    own = {NAMES.format(index): ["ReroutingCPURouter", index] for index in layers}
    others = {name: ["CPURouter", None] for name in drafted}
    assert loaded[target] == {**own, **others}


def test_two_sets_of_experts_in_one_layer_are_refused(table: Table) -> None:
    """As two modules of one model may have them, or a drafter of a kind that nobody knows."""
    own: Session = new_session(table)
    own.bind(1, "model.layers.1.text_experts", E=E, K=K)
    with pytest.raises(ServingError, match=r"calls itself layer 1, as does model\.layers\.1\.text"):
        own.bind(1, "model.layers.1.vision_experts", E=E, K=K)


@pytest.mark.parametrize("place", ["drafter", "speculator"])
def test_whatever_the_runner_lets_draft_is_marked_while_it_loads(place: str) -> None:
    """Model runner V2 keeps it elsewhere than V1; nothing is asked of its class."""
    seen = []
    second = SimpleNamespace(load_model=lambda target: seen.append(drafters.is_loading()))
    worker = SimpleNamespace(model_runner=SimpleNamespace(**{place: second}))

    def load_model(worker: Any, *, load_dummy_weights: bool = False) -> None:
        seen.append(drafters.is_loading())
        getattr(worker.model_runner, place).load_model("the target")
        seen.append(drafters.is_loading())

    drafters.telling_apart(load_model)(worker, load_dummy_weights=True)
    assert seen == [False, True, False]


# --- in the real engine ---------------------------------------------------------------------------

PROMPTS = [e.prompt for e in examples(8, seed=7, split="held_out")]
GENERATE = ["generate", PROMPTS, 12]
STATS, RESET = ["rpc", "sere_stats"], ["rpc", "sere_reset"]
NOTHING_MOVES = ["rpc", "sere_policy", {**S1, "rho": 1.0}]  # no two experts are as similar
STEPS = [["capture"], GENERATE, STATS, NOTHING_MOVES, RESET, GENERATE, STATS, ["captured"]]


@pytest.fixture(scope="module")
def glm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random GLM-4.5 with a draft layer of its own."""
    from transformers import Glm4MoeForCausalLM

    folder = tmp_path_factory.mktemp("glm")
    torch.manual_seed(0)
    model = Glm4MoeForCausalLM(configured("glm4_moe", folder)).float()
    enlarge_experts(model)
    model.save_pretrained(folder)
    weights, last = load_file(folder / "model.safetensors"), "model.layers.3."
    H = SMALL["hidden_size"]
    drafter = {k.replace(".2.", ".3.", 1): t.clone() for k, t in weights.items() if "layers.2" in k}
    drafter |= {last + name: torch.ones(H) for name in ("enorm.weight", "hnorm.weight")}
    drafter |= {
        last + "eh_proj.weight": torch.randn(H, 2 * H) * 0.1,
        last + "shared_head.norm.weight": torch.ones(H),
        last + "shared_head.head.weight": weights["lm_head.weight"].clone(),
        last + "embed_tokens.weight": weights["model.embed_tokens.weight"].clone(),
    }
    save_file({**weights, **drafter}, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("target", ["demo, 2 tokens", "demo, 1 token", "glm4_moe"])
def test_counters_and_policies_are_the_targets(target: str, table_path: Path, glm: Path) -> None:
    """Drafts under verification are decode rows; the drafter's own steps, of fewer rows, are none
    of ours."""
    if target == "glm4_moe":
        table = random_table(target, (1, 2), glm / "t.table")
        options: dict[str, Any] = {"model": str(glm), "speculative_config": MTP}
    else:
        table = str(table_path)
        spec = {"method": "draft_model", "model": str(demo_model.PATH)}
        options = {"speculative_config": {**spec, "num_speculative_tokens": int(target[6])}}
    sere = {"table": table, "fingerprint": "shape", **S1}
    run, (first,), _, _, _, (second,), captured = run_engine(STEPS, sere=sere, options=options)[1:]
    assert len(first) == len(second) == (2 if target == "glm4_moe" else 4)
    decoded, prompts = sum(len(tokens) - 1 for tokens, _ in run), sum(map(len, PROMPTS))
    for index, layer in first.items():
        assert layer["rows_exact"] == second[index]["rows_exact"] == prompts
        assert layer["rows_fast"] > decoded  # not all drafts are accepted
        assert layer["slots_rerouted"] > 0 == second[index]["slots_rerouted"]
        rows = sum(map(len, captured[NAMES.format(index)]))  # what vLLM gave the target's layer
        assert rows == layer["rows_fast"] + second[index]["rows_fast"] + 2 * prompts
