"""From a checkpoint and a text file to a table: reproducible, blind to padding, all or nothing."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import sere.calibration.reading
from sere.calibration.calibrate import CalibrationError, calibrate
from sere.calibration.observation import Observer, UnfitError
from sere.calibration.reading import in_memory
from sere.checkpoint import weight_hashes
from sere.models.loading import LoadError, load_model, load_tokenizer
from sere.models.moe import MoELayer, NoExpertsError, moe_layers, observed
from sere.policy import Policy
from sere.similarity.sums import FOLDS
from sere.table import Table
from sere.text.corpus import Corpus, CorpusError, read_texts
from tests.conftest import LAYERS, E, K, enlarge_experts, save_tokenizer

STATISTICS = ("similarity", "load", "gram", "cosine", "directed", "directed_energy")


def run(model: Path, data: Path | None, output: Path, **settings: Any) -> Table:
    settings = {"samples": 20, "length": 24, "batch": 8, "progress": False, **settings}
    return calibrate(str(model), output, data=data, **settings)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "table.safetensors"


def same(one: Table, other: Table) -> bool:
    return all(
        torch.equal(getattr(one.layers[i], name), getattr(other.layers[i], name))
        for i in one.layers
        for name in STATISTICS
    )


def test_the_table_of_a_checkpoint(model_dir: Path, corpus_file: Path, output: Path) -> None:
    run(model_dir, corpus_file, output, seed=3)
    table = Table.load(output)
    mine = table.fingerprint
    assert (mine.architecture, mine.E, mine.K) == ("Qwen3MoeForCausalLM", E, K)
    assert mine.layers == tuple(range(LAYERS))
    assert (mine.router_hash, mine.experts_hash) == weight_hashes(model_dir, mine.layers, E)
    texts = [json.loads(line)["text"] for line in corpus_file.read_text().splitlines()]
    tokens = sum(min(len(text), 24) for text in texts)  # one token a character
    about = table.provenance
    assert (about["tokens"], about["sequences"], about["seed"]) == (tokens, 20, 3)
    assert about["corpus"] == str(corpus_file)
    assert about["layer_names"][1] == "model.layers.1.mlp.experts"
    for layer in table.layers.values():
        assert layer.tokens == tokens
        assert layer.load.sum() == pytest.approx(1)


@torch.inference_mode()
def test_the_statistics_are_those_of_the_models_own_hidden_states(
    model_dir: Path, corpus_file: Path, output: Path
) -> None:
    """One text at a time, nothing streamed: distances and loads from the definition."""
    table = run(model_dir, corpus_file, output)
    model, tokenizer = load_model(str(model_dir)), load_tokenizer(str(model_dir))
    hidden: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    chosen: dict[int, list[int]] = {0: [], 1: []}

    def keep(layer: MoELayer, x: torch.Tensor, ids: torch.Tensor, _: torch.Tensor) -> None:
        hidden[layer.index].append(x)
        chosen[layer.index] += ids.flatten().tolist()

    layers = moe_layers(model)
    with observed(layers, keep):
        for line in corpus_file.read_text().splitlines():
            ids = tokenizer(json.loads(line)["text"])["input_ids"][:24]
            model(input_ids=torch.tensor([ids]))
    for layer in layers:
        outputs = layer.outputs(torch.cat(hidden[layer.index])).double().flatten(1)
        distance = torch.tensor([[(u - v).norm() for v in outputs] for u in outputs])
        found = table.layers[layer.index]
        torch.testing.assert_close(
            found.similarity, (1 - distance / distance.max()).float(), atol=1e-4, rtol=0
        )
        load = torch.bincount(torch.tensor(chosen[layer.index]), minlength=E).float()
        torch.testing.assert_close(found.load, load / load.sum(), atol=2e-3, rtol=0)


def test_the_same_seed_gives_the_same_bytes(
    model_dir: Path, corpus_file: Path, output: Path
) -> None:
    settings = {"samples": 10, "seed": 1}
    first = run(model_dir, corpus_file, output, **settings)
    bytes_of_first = output.read_bytes()
    run(model_dir, corpus_file, output, **settings)
    assert output.read_bytes() == bytes_of_first
    other = run(model_dir, corpus_file, output, **{**settings, "seed": 2})
    assert not same(first, other)
    assert first.provenance["corpus_hash"] != other.provenance["corpus_hash"]


@pytest.mark.parametrize("method", ["frobenius", "cosine"])
def test_padding_does_not_count(
    model_dir: Path, corpus_file: Path, output: Path, method: str
) -> None:
    """Texts of 3 to 50 characters: in batches of 20 more than half of the rows are padding."""
    settings = {"length": 64, "method": method}
    padded = run(model_dir, corpus_file, output, batch=20, **settings)
    alone = run(model_dir, corpus_file, output, batch=1, **settings)
    longest = max(len(json.loads(line)["text"]) for line in corpus_file.read_text().splitlines())
    assert padded.provenance["tokens"] < 0.6 * 20 * longest
    for index, layer in padded.layers.items():
        assert layer.tokens == alone.layers[index].tokens
        for name in STATISTICS:
            torch.testing.assert_close(
                getattr(layer, name), getattr(alone.layers[index], name), atol=1e-4, rtol=1e-4
            )


@pytest.mark.parametrize("method", ["frobenius", "cosine", "cka-linear"])
def test_what_stands_in_padded_rows_does_not_matter(model_dir: Path, method: str) -> None:
    model = load_model(str(model_dir))
    layer = moe_layers(model)[0]
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, 32, generator=random)
    ids = torch.randint(0, E, (40, K), generator=random)
    real = torch.rand(40, generator=random) < 0.5

    def similarity(junk: float, mask: torch.Tensor) -> torch.Tensor:
        observer = Observer(method)
        observer.begin(0, mask[None])
        padded = torch.where(real[:, None], hidden, torch.tensor(junk))
        observer(layer, padded, ids, torch.ones(40, K))
        return observer.finish(layer)[0].similarity

    everything = torch.ones(40, dtype=torch.bool)
    with torch.inference_mode():
        assert torch.equal(similarity(9.0, real), similarity(-1.0, real))
        assert not torch.equal(similarity(9.0, everything), similarity(-1.0, everything))


def test_stability_is_stored_and_ends_calibration_early(
    model_dir: Path, corpus_file: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(model_dir, corpus_file, output, batch=1)
    whole = Table.load(output)
    found = [layer.stability for layer in whole.layers.values()]
    assert all(share is not None and 0 < share <= 1 for share in found)
    assert len(set(found)) == len(found)
    early = run(model_dir, corpus_file, output, batch=1, until_stable=0.01)
    assert early.provenance["sequences"] == FOLDS
    assert early.provenance["corpus_hash"] != whole.provenance["corpus_hash"]
    assert "NOT STABLE YET" not in capsys.readouterr().err
    never = run(model_dir, corpus_file, output, batch=1, until_stable=1.01)
    assert "of the 101.0% that were asked for when the text ended" in capsys.readouterr().err
    assert same(never, whole)


def test_one_batch_says_nothing_about_stability(
    model_dir: Path, corpus_file: Path, output: Path
) -> None:
    table = run(model_dir, corpus_file, output, batch=20)
    assert {layer.stability for layer in table.layers.values()} == {None}


def test_bundled_texts_are_only_for_the_bundled_model(model_dir: Path, output: Path) -> None:
    with pytest.raises(CalibrationError, match="--data FILE is needed"):
        run(model_dir, None, output)


def test_a_dense_model_is_refused(tmp_path: Path, corpus_file: Path, output: Path) -> None:
    folder = tmp_path / "dense"
    settings = {"vocab_size": 98, "hidden_size": 16, "intermediate_size": 16}
    config = LlamaConfig(**settings, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder)
    with pytest.raises(NoExpertsError, match="has no routed experts"):
        run(folder, corpus_file, output)
    assert not output.exists()


@pytest.mark.parametrize("made", [False, True])
def test_a_folder_without_a_model_is_named(
    tmp_path: Path, corpus_file: Path, output: Path, made: bool
) -> None:
    folder = tmp_path / "absent"
    if made:
        folder.mkdir()
    with pytest.raises(LoadError, match=r"absent(: no such folder| is empty: expected a model's)"):
        run(folder, corpus_file, output)


@pytest.mark.parametrize("part", ["mlp.experts.", "layers.1.mlp.gate."])
def test_a_checkpoint_without_some_weights_is_refused(
    model_dir: Path, tmp_path: Path, corpus_file: Path, output: Path, part: str
) -> None:
    folder = Path(shutil.copytree(model_dir, tmp_path / "holes"))
    weights = folder / "model.safetensors"
    kept = {name: t for name, t in load_file(weights).items() if part not in name}
    save_file(kept, weights, metadata={"format": "pt"})
    with pytest.raises(LoadError, match=r"missing from the checkpoint.*would be random"):
        run(folder, corpus_file, output)
    assert not output.exists()


@pytest.mark.parametrize("part", ["experts.5.", "experts.5.gate_proj."])
def test_a_checkpoint_without_one_expert_is_refused(
    model_dir: Path, tmp_path: Path, corpus_file: Path, output: Path, part: str
) -> None:
    folder = Path(shutil.copytree(model_dir, tmp_path / "hole"))
    weights = folder / "model.safetensors"
    kept = {n: t for n, t in load_file(weights).items() if f"layers.1.mlp.{part}" not in n}
    save_file(kept, weights, metadata={"format": "pt"})
    with pytest.raises(
        LoadError, match=r"hole: .*(of another shape|cannot be loaded|numbers of experts)"
    ):
        run(folder, corpus_file, output)
    assert not output.exists()


def test_nan_weights_are_refused(
    model_dir: Path, tmp_path: Path, corpus_file: Path, output: Path
) -> None:
    folder = Path(shutil.copytree(model_dir, tmp_path / "nan"))
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    name = min(name for name in tensors if "layers.1.mlp.experts" in name)
    tensors[name].view(-1)[0] = torch.nan
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(UnfitError, match=r"layers\.1\.mlp\.experts: .*NaN"):
        run(folder, corpus_file, output)
    assert not output.exists()


@pytest.mark.parametrize("old", [False, True], ids=["nothing there", "an older table"])
def test_ctrl_c_in_the_middle_writes_nothing(
    model_dir: Path,
    corpus_file: Path,
    output: Path,
    old: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if old:
        calibrate(str(model_dir), output, method="random", progress=False)
    before = output.read_bytes() if old else None
    model = load_model(str(model_dir))
    passes = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        passes.append(1)
        if len(passes) == 2:
            raise KeyboardInterrupt
        return type(model).forward(model, *args, **kwargs)

    model.forward = forward
    monkeypatch.setattr(sere.calibration.reading, "load_model", lambda _: model)
    with pytest.raises(KeyboardInterrupt):
        run(model_dir, corpus_file, output)
    assert len(passes) == 2
    assert [p.read_bytes() for p in output.parent.iterdir()] == ([] if before is None else [before])


def test_what_cannot_end_well_is_refused_before_the_model_is_loaded(
    model_dir: Path, corpus_file: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(_: str) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(sere.calibration.reading, "load_model", load)
    with pytest.raises(FileNotFoundError, match="absent does not exist"):
        run(model_dir, corpus_file, output.parent / "absent" / "t.safetensors")
    beside = model_dir / "table.safetensors"
    with pytest.raises(CalibrationError, match=r"engines load every .*; name it .*sere\.table"):
        run(model_dir, corpus_file, beside)
    with pytest.raises(CalibrationError, match="method 'euclid': expected one of frobenius"):
        run(model_dir, corpus_file, output, method="euclid")
    with pytest.raises(CorpusError, match=r"absent\.txt: no such file"):
        run(model_dir, output.parent / "absent.txt", output)


def test_a_tuned_table_is_not_lost_without_a_word(
    model_dir: Path, corpus_file: Path, output: Path, tmp_path: Path
) -> None:
    """Refused before any work: the policy was chosen for that table. An untuned one is replaced."""
    table = run(model_dir, corpus_file, output)
    replace(table, policy=Policy(S=1, tau=0.02)).save(output)
    tuned = output.read_bytes()
    for method in ("cosine", "random"):
        with pytest.raises(CalibrationError, match=r"policy of `sere tune` \(S=1 tau=0.02\)"):
            run(model_dir, tmp_path / "no text", output, method=method)
    assert output.read_bytes() == tuned
    run(model_dir, corpus_file, output, overwrite=True, method="cosine")
    assert Table.load(output).policy is None
    run(model_dir, corpus_file, output)
    assert Table.load(output).method == "frobenius"


def test_a_policy_of_another_version_is_kept_too(
    model_dir: Path, corpus_file: Path, output: Path
) -> None:
    run(model_dir, corpus_file, output)
    with safe_open(output, framework="pt") as file:
        document = json.loads(file.metadata()["sere"])
    document["policy"] = {"S": 1, "of the future": True}
    save_file(load_file(output), output, metadata={"sere": json.dumps(document)})
    with pytest.raises(CalibrationError, match=r"of another version of sere.*--overwrite"):
        run(model_dir, corpus_file, output)


def small(folder: Path, **settings: Any) -> Path:
    """A random Qwen3-MoE checkpoint like the session's, but for these settings."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 98, "hidden_size": 32, "moe_intermediate_size": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    config = Qwen3MoeConfig(**sizes, **heads, num_hidden_layers=2, **settings)
    model = Qwen3MoeForCausalLM(config).float()
    enlarge_experts(model)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def test_two_experts_need_another_measure_and_are_told_so_before_text_is_read(
    tmp_path: Path, corpus_file: Path, output: Path
) -> None:
    folder = small(tmp_path / "two", num_experts=2, num_experts_per_tok=1)
    with pytest.raises(CalibrationError, match=r"two experts per layer.*Choose --method cosine"):
        run(folder, tmp_path / "not-there.jsonl", output)
    for remedy in ("cosine", "directed"):
        table = run(folder, corpus_file, output, method=remedy)
        plan = table.plan(0, Policy(S=1, min_active=1))
        assert plan.neighbours.tolist() == [[1], [0]]


def test_one_expert_is_nothing_to_reroute(tmp_path: Path, output: Path) -> None:
    folder = small(tmp_path / "one", num_experts=1, num_experts_per_tok=1)
    with pytest.raises(CalibrationError, match="one expert per layer: there is nothing to"):
        run(folder, tmp_path / "not-there.jsonl", output, method="cosine")


def test_a_drafter_of_one_expert_behind_the_last_layer_counts_for_nothing(
    model_dir: Path, corpus_file: Path, output: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "drafted"
    shutil.copytree(model_dir, folder)
    tensors = load_file(folder / "model.safetensors")
    name = f"model.layers.{LAYERS}.mlp.experts.0.up_proj.weight"
    save_file(tensors | {name: torch.ones(4, 4)}, folder / "model.safetensors", {"format": "pt"})
    found, plain = run(folder, corpus_file, output), run(model_dir, corpus_file, tmp_path / "p")
    assert found.fingerprint == plain.fingerprint
    assert torch.equal(found.layers[0].similarity, plain.layers[0].similarity)


@pytest.mark.parametrize("stream", [False, True])
def test_dense_first_layers_and_shared_experts_are_no_routed_ones(
    tmp_path: Path, corpus_file: Path, output: Path, stream: bool
) -> None:
    """A DeepSeek-V3 as released: its first layers have none, and all others one that every token
    has; the router is the checkpoint's only hint at which tensors are meant."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=98, hidden_size=32, intermediate_size=48, moe_intermediate_size=16,
        num_hidden_layers=3, first_k_dense_replace=2, n_routed_experts=6, num_experts_per_tok=2,
        n_shared_experts=2, n_group=1, topk_group=1, num_attention_heads=4, num_key_value_heads=4,
        q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
    )  # fmt: skip
    model = DeepseekV3ForCausalLM(config).float().eval()
    enlarge_experts(model)
    model.save_pretrained(folder := tmp_path / "dense-first")
    save_tokenizer(folder)
    table = run(folder, corpus_file, output, stream=stream)
    assert table.fingerprint.layers == (2,) == tuple(table.layers)
    assert (table.fingerprint.E, table.fingerprint.K) == (6, 2)
    assert table.fingerprint.experts_hash and table.check_made_for(folder)
    routed: Any = model.model.layers[2].mlp.experts
    energy = table.layers[2].gram.diagonal()
    x: list[torch.Tensor] = []
    handle = routed.register_forward_pre_hook(lambda _, given: x.append(given[0].detach()))
    tokenizer = load_tokenizer(str(folder))
    with torch.inference_mode():
        for text in read_texts(corpus_file):
            ids = tokenizer(text, return_tensors="pt").input_ids[:, :24]
            model(input_ids=ids, use_cache=False)
    handle.remove()
    hidden = torch.cat([each.flatten(0, -2) for each in x])
    for e in range(6):
        gate, up = (hidden @ routed.gate_up_proj[e].T).chunk(2, -1)
        out = (torch.nn.functional.silu(gate) * up) @ routed.down_proj[e].T
        assert out.square().sum(1).mean().item() == pytest.approx(energy[e].item(), rel=1e-4)


def test_one_expert_per_token_is_calibrated_and_the_table_says_that_nothing_can_move(
    tmp_path: Path, corpus_file: Path, output: Path
) -> None:
    table = run(small(tmp_path / "k1", num_experts=4, num_experts_per_tok=1), corpus_file, output)
    assert table.fingerprint.K == 1
    assert not table.can_move(Policy(S=1, min_active=1))


@pytest.mark.parametrize("built", [True, False])
def test_layers_with_different_k_are_no_table(
    tmp_path: Path,
    corpus_file: Path,
    output: Path,
    built: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where neither files nor config tell, the routers as built do, before any text is read; where
    a model cannot be built without weights, the first text does."""
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter as Router

    made, build = [], Router.__init__

    def uneven(router: Any, config: Any) -> None:
        build(router, config)
        made.append(router)
        router.top_k = 1 + len(made) % 2

    monkeypatch.setattr(Router, "__init__", uneven)
    folder = small(tmp_path / "uneven", num_experts=4, num_experts_per_tok=2)
    if built:
        with pytest.raises(LoadError, match=r"experts per token .layer 0: 2, layer 1: 1. are not"):
            run(folder, tmp_path / "none.jsonl", output)
        return
    monkeypatch.setattr("sere.models.outline.check_outline", lambda _: None)
    with pytest.raises(UnfitError, match=r"layers\.1.* routes a token to . experts, layers before"):
        run(folder, corpus_file, output)


def test_a_tokenizer_of_another_model_is_refused(model_dir: Path) -> None:
    corpus = Corpus([[1, 10**6]], "text", 2, 0)
    with pytest.raises(LoadError, match="the tokenizer gives token 1000000, where the model has"):
        in_memory(str(model_dir), corpus, "frobenius", 1, None, False)
