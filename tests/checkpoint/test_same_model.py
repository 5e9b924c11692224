"""The same model has one fingerprint, however its files came to be; a quantised one is known."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sere.calibration.calibrate import calibrate
from sere.checkpoint import hashes as hash_module
from sere.checkpoint import quantised, weight_hashes
from sere.checkpoint.quantised import method
from sere.models.loading import LoadError, load_model
from sere.models.moe import NoExpertsError
from sere.models.skeleton import load_skeleton
from sere.serving import model_fit
from sere.table import Table, TableError
from tests.conftest import LAYERS, E

Tensors = dict[str, Tensor]


def hashes(folder: Path) -> tuple[str | None, str | None]:
    return weight_hashes(folder, range(LAYERS), E)


def copied(model_dir: Path, folder: Path, change: Callable[[Tensors], Tensors]) -> Path:
    shutil.copytree(model_dir, folder)
    tensors = change(load_file(folder / "model.safetensors"))
    stored = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def prefixed(prefix: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {n.replace("model.", prefix, 1): t for n, t in tensors.items()}


def stacked(tensors: Tensors) -> Tensors:
    """As transformers 5 holds experts: one tensor for all, gate and up in one."""
    found = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for layer in range(LAYERS):
        stem = f"model.layers.{layer}.mlp.experts"
        gate, up, down = (
            torch.stack([tensors[f"{stem}.{e}.{part}_proj.weight"] for e in range(E)])
            for part in ("gate", "up", "down")
        )
        found |= {f"{stem}.gate_up_proj": torch.cat([gate, up], 1), f"{stem}.down_proj": down}
    return found


def transposed(tensors: Tensors) -> Tensors:
    """As llama4 and qwen3_vl_moe are on the hub: [E, H, 2I] and [E, I, H]."""
    return {n: t.mT if t.ndim == 3 else t for n, t in stacked(tensors).items()}


def interleaved(tensors: Tensors) -> Tensors:
    """As gpt_oss: gate and up in turn."""
    found = stacked(tensors)
    for name in [n for n in found if n.endswith("gate_up_proj")]:
        gate, up = found[name].chunk(2, 1)
        found[name] = torch.stack([gate, up], 2).flatten(1, 2).mT
    return found


def with_others(tensors: Tensors) -> Tensors:
    """Beside a drafter, a tower for images and a talker, which have experts of their own."""
    more = {n: -t for n, t in tensors.items() if "layers.0" in n}
    parts = ("mtp.", "model.visual.", "talker.model.", "vision_tower.")
    renamed = {n.replace("model.", part, 1): t for part in parts for n, t in more.items()}
    return tensors | {name: tensor.clone() for name, tensor in renamed.items()}


def renamed_router(tensors: Tensors) -> Tensors:
    return {n.replace("mlp", "block_sparse_moe"): t for n, t in tensors.items()}


SAME: dict[str, Callable[[Tensors], Tensors]] = {
    "model.language_model.": prefixed("model.language_model."),
    "language_model.model.": prefixed("language_model.model."),
    "text_model.": prefixed("text_model."),
    "thinker.model.": prefixed("thinker.model."),
    "stacked": stacked,
    "transposed": transposed,
    "interleaved": interleaved,
    "others beside": with_others,
    "renamed router": renamed_router,
    "more bits": lambda tensors: {n: t.double() for n, t in tensors.items()},
}


@pytest.mark.parametrize("how", SAME)
def test_a_copy_saved_by_another_tool_is_the_same_model(
    model_dir: Path, tmp_path: Path, how: str
) -> None:
    before = hashes(model_dir)
    assert None not in before
    assert hashes(copied(model_dir, tmp_path / "copy", SAME[how])) == before


def test_float16_and_float32_copies_of_bf16_are_the_same_model(
    model_dir: Path, tmp_path: Path
) -> None:
    found = {
        hashes(
            copied(
                model_dir,
                tmp_path / str(kind),
                lambda tensors, kind=kind: {n: t.bfloat16().to(kind) for n, t in tensors.items()},  # type: ignore[misc]
            )
        )
        for kind in (torch.bfloat16, torch.float16, torch.float32)
    }
    assert len(found) == 1


@pytest.mark.parametrize("layout", [dict, stacked, transposed], ids=["apart", "stacked", "mT"])
@pytest.mark.parametrize("expert", [0, 5])
def test_one_weight_of_an_expert_makes_another_model(
    model_dir: Path, tmp_path: Path, layout: Callable[[Tensors], Tensors], expert: int
) -> None:
    def changed(tensors: Tensors) -> Tensors:
        weight = tensors[f"model.layers.1.mlp.experts.{expert}.up_proj.weight"]
        weight[-1, -1] *= 1 + 2**-12
        return layout(tensors)

    before = hashes(model_dir)
    after = hashes(copied(model_dir, tmp_path / "copy", changed))
    assert after[0] == before[0]
    assert after[1] != before[1]


def test_experts_of_two_layers_cannot_change_places(model_dir: Path, tmp_path: Path) -> None:
    def swapped(tensors: Tensors) -> Tensors:
        new = {"layers.0.mlp.experts": "layers.1.mlp.experts"}
        new |= {there: here for here, there in new.items()}
        return {
            next((n.replace(a, b) for a, b in new.items() if a in n), n): t
            for n, t in tensors.items()
        }

    assert hashes(copied(model_dir, tmp_path / "copy", swapped))[1] != hashes(model_dir)[1]


# --- quantised copies -----------------------------------------------------------------------------


def packed(tensors: Tensors, dtype: torch.dtype, scale: str | None) -> Tensors:
    found: Tensors = {}
    for name, weight in tensors.items():
        if ".experts." not in name:
            found[name] = weight.bfloat16()
            continue
        step = weight.abs().max() / (127 if dtype == torch.int8 else 448)
        found[name] = (weight / step).round().to(dtype)
        if scale:
            found[f"{name}{scale}"] = step
    return found


def at_the_top(folder: Path, settings: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": settings}))


def in_its_text_part(folder: Path, settings: object) -> None:
    path = folder / "config.json"
    part = {"text_config": {"quantization_config": settings}}
    path.write_text(json.dumps(json.loads(path.read_text()) | part))


def beside(folder: Path, _settings: object) -> None:
    said = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4"}}
    (folder / "hf_quant_config.json").write_text(json.dumps(said))


def nowhere(_folder: Path, _settings: object) -> None:
    pass


PLACES = [at_the_top, in_its_text_part, beside, nowhere]


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_a_quantised_copy_is_known_as_one_wherever_it_says_so(
    model_dir: Path,
    corpus_file: Path,
    tmp_path: Path,
    place: Callable[[Path, object], None],
    dtype: torch.dtype,
) -> None:
    copy = copied(model_dir, tmp_path / "copy", lambda t: packed(t, dtype, "_scale"))
    place(copy, {"quant_method": "modelopt"})
    router, experts = hashes(copy)
    assert (router, experts) == (hashes(model_dir)[0], None)
    table = calibrate(
        str(model_dir), tmp_path / "table", data=corpus_file, samples=20, progress=False
    )
    assert table.check_made_for(copy)  # the original's table serves it
    assert quantised.method(copy) == ("" if place is nowhere else "modelopt")
    reason = r"stored as (I8|F8_E4M3)" if place is nowhere else "modelopt experts cannot"
    unread = tmp_path / "none.jsonl"
    with pytest.raises(LoadError, match=reason):
        calibrate(str(copy), tmp_path / "wrong", data=unread, progress=False)


def test_what_a_tool_left_beside_plain_weights_does_not_count(
    model_dir: Path, tmp_path: Path
) -> None:
    copy = copied(model_dir, tmp_path / "copy", dict)
    beside(copy, None)
    assert method(copy) == ""
    assert hashes(copy) == hashes(model_dir)


@pytest.mark.parametrize("load", [load_model, load_skeleton])
@pytest.mark.parametrize("scale", [None, "_scale"])
def test_fp8_experts_without_a_scale_that_is_applied_are_refused(
    model_dir: Path, tmp_path: Path, load: Callable[[str], object], scale: str | None
) -> None:
    """Transformers' fp8 knows `weight_scale_inv`; any other scale it would leave out."""
    dtype = torch.float8_e4m3fn
    copy = copied(model_dir, tmp_path / "copy", lambda t: packed(t, dtype, scale))
    at_the_top(copy, {"quant_method": "fp8", "weight_block_size": None})
    why = "no scale is beside them" if scale is None else r"\d+ scales would not be applied"
    with pytest.raises(LoadError, match=why):
        load(str(copy))


@pytest.mark.parametrize("load", [load_model, load_skeleton])
def test_an_unexpected_scale_beside_plain_weights_is_refused(
    model_dir: Path, tmp_path: Path, load: Callable[[str], object]
) -> None:
    def scaled(tensors: Tensors) -> Tensors:
        name = "model.layers.1.mlp.experts.3.up_proj.weight"
        return tensors | {f"{name}_scale": torch.ones(1)}

    copy = copied(model_dir, tmp_path / "copy", scaled)
    with pytest.raises(LoadError, match=r"1 scales would not be applied.*layers\.1\.mlp\.experts"):
        load(str(copy))


@pytest.mark.parametrize("load", [load_model, load_skeleton])
def test_scales_of_activations_and_of_unused_parts_are_none_of_a_weights(
    model_dir: Path, tmp_path: Path, load: Callable[[str], object]
) -> None:
    def more(tensors: Tensors) -> Tensors:
        drafter = "model.layers.2.mlp.experts.0.up_proj.weight"
        return tensors | {
            "model.layers.0.self_attn.k_proj.k_scale": torch.ones(1),
            "model.layers.0.self_attn.q_proj.input_scale": torch.ones(1),
            drafter: torch.ones(4, 4),
            f"{drafter}_scale_inv": torch.ones(1),
        }

    load(str(copied(model_dir, tmp_path / "copy", more)))


# --- tables of before -----------------------------------------------------------------------------


def test_a_table_of_format_2_is_read_and_compared_by_its_own_hash(
    model_dir: Path, make_table: Callable[..., Table], tmp_path: Path
) -> None:
    router, experts = weight_hashes(model_dir, range(LAYERS), E, hashing=1)
    old = make_table(router_hash=router, experts_hash=experts, hashing=1)
    path = tmp_path / "old.table"
    old.save(path)
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        said = json.loads(file.metadata()["sere"])
    assert said["format"] == 2
    assert "hashing" not in said["fingerprint"]  # as an earlier version reads it
    again = Table.load(path)
    assert again.check_made_for(model_dir)
    other = copied(model_dir, tmp_path / "copy", lambda t: {n: -w for n, w in t.items()})
    with pytest.raises(TableError, match=r"router weights: hash"):
        again.check_made_for(other)
    new = make_table()  # of the same model, as of today: hashes of two kinds say nothing
    new.check_against(replace(again.fingerprint, layers=new.fingerprint.layers))


# --- layers that differ ---------------------------------------------------------------------------


def test_layers_with_different_numbers_of_experts_are_refused_before_text_is_read(
    model_dir: Path, tmp_path: Path
) -> None:
    def pruned(tensors: Tensors) -> Tensors:
        gone = tuple(f"layers.1.mlp.experts.{expert}." for expert in (6, 7))
        found = {n: t for n, t in tensors.items() if not any(part in n for part in gone)}
        router = "model.layers.1.mlp.gate.weight"
        return found | {router: tensors[router][:6]}

    copy = copied(model_dir, tmp_path / "copy", pruned)
    with pytest.raises(LoadError, match=r"different numbers of experts .layer 0: 8, layer 1: 6."):
        calibrate(str(copy), tmp_path / "table", data=tmp_path / "none.jsonl", progress=False)


@pytest.mark.parametrize(
    ("said", "what"),
    [
        ({"num_experts_per_tok": [2, 3]}, "experts per token .layer 0: 2, layer 1: 3"),
        (
            {"per_layer_config": {"1": {"num_experts_per_tok": 3}}},
            "experts per token .layer 0: 2, layer 1: 3",
        ),
        ({"per_layer_config": {"1": {"num_experts": 6}}}, "experts .layer 0: 8, layer 1: 6"),
        (
            {"block_configs": [{"num_experts_per_tok": 2}, {"num_experts_per_tok": 1}]},
            "experts per token .layer 0: 2, layer 1: 1",
        ),
    ],
)
def test_layers_that_differ_by_the_config_are_refused_before_text_is_read(
    model_dir: Path, tmp_path: Path, said: dict[str, object], what: str
) -> None:
    copy = copied(model_dir, tmp_path / "copy", dict)
    path = copy / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | said))
    with pytest.raises(LoadError, match=f"different numbers of {what}. are not"):
        calibrate(str(copy), tmp_path / "table", data=tmp_path / "none.jsonl", progress=False)


def test_a_dense_model_is_refused_before_text_is_read(model_dir: Path, tmp_path: Path) -> None:
    copy = copied(model_dir, tmp_path / "copy", dict)
    path = copy / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mlp_only_layers": [0, 1]}))
    with pytest.raises(NoExpertsError, match="has no routed experts"):
        calibrate(str(copy), tmp_path / "table", data=tmp_path / "none.jsonl", progress=False)


def test_hashes_are_made_on_one_thread_and_waited_for_with_a_word(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Beside other programs, threads that spin made a server wait for a minute (issue 21)."""
    monkeypatch.setattr(model_fit, "_PATIENCE", 0.0)
    used: list[int] = []
    count = hash_module._histogram

    def counted(parts: list[Tensor]) -> Tensor:
        used.append(torch.get_num_threads())
        time.sleep(0.02)
        return count(parts)

    expected, threads = hashes(model_dir), torch.get_num_threads()
    monkeypatch.setattr(hash_module, "_histogram", counted)
    torch.set_num_threads(2)
    try:
        with caplog.at_level(logging.INFO, "vllm.sere"):
            assert model_fit.hashes_of(model_dir, range(LAYERS), E) == expected
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert set(used) == {1}
    assert [record.getMessage() for record in caplog.records] == [
        model_fit._HASHING % model_dir,
    ]
