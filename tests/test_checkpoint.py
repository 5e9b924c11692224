"""The fingerprint sees every change that makes a table wrong, and no other."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sere.checkpoint import layer_index, weight_hashes
from sere.table import Table

LAYERS, E = (0, 1), 8
ROUTER = "model.layers.1.mlp.gate.weight"


@pytest.fixture
def copy(model_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_dir, tmp_path / "copy"))


def edit(folder: Path, name: str, change: Callable[[Tensor], Tensor]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors[name] = change(tensors[name])
    save_file(tensors, path, metadata={"format": "pt"})


def one_value(tensor: Tensor) -> Tensor:
    changed = tensor.clone()
    changed.view(-1)[-1] += 1e-3
    return changed


def first_expert(folder: Path) -> str:
    return min(n for n in load_file(folder / "model.safetensors") if "layers.1.mlp.experts" in n)


def test_one_router_value_changes_the_router_hash_alone(copy: Path) -> None:
    before = weight_hashes(copy, LAYERS, E)
    assert None not in before
    edit(copy, ROUTER, one_value)
    after = weight_hashes(copy, LAYERS, E)
    assert after[0] != before[0]
    assert after[1] == before[1]


def test_an_expert_changes_the_expert_hash_alone(copy: Path) -> None:
    before = weight_hashes(copy, LAYERS, E)
    edit(copy, first_expert(copy), one_value)
    after = weight_hashes(copy, LAYERS, E)
    assert after[0] == before[0]
    assert after[1] != before[1]


def test_an_expert_stored_in_fewer_bits_changes_the_expert_hash_alone(copy: Path) -> None:
    before = weight_hashes(copy, LAYERS, E)
    edit(copy, first_expert(copy), lambda weight: weight.to(torch.bfloat16))
    after = weight_hashes(copy, LAYERS, E)
    assert after[0] == before[0]
    assert after[1] != before[1]


@pytest.mark.parametrize("name", ["q_proj", "k_proj"])
def test_attention_does_not_count_even_with_as_many_rows_as_experts(copy: Path, name: str) -> None:
    before = weight_hashes(copy, LAYERS, E)
    weight = f"model.layers.1.self_attn.{name}.weight"
    assert load_file(copy / "model.safetensors")[weight].shape[0] == E
    edit(copy, weight, one_value)
    assert weight_hashes(copy, LAYERS, E) == before


def test_only_the_named_layers_count(copy: Path) -> None:
    before = weight_hashes(copy, (0,), E)
    edit(copy, ROUTER, one_value)
    assert weight_hashes(copy, (0,), E) == before


def test_how_the_checkpoint_is_split_into_files_does_not_count(copy: Path) -> None:
    before = weight_hashes(copy, LAYERS, E)
    path = copy / "model.safetensors"
    tensors = sorted(load_file(path).items())
    path.unlink()
    save_file(dict(tensors[::2]), copy / "model-00001-of-00002.safetensors")
    save_file(dict(tensors[1::2]), copy / "model-00002-of-00002.safetensors")
    assert weight_hashes(copy, LAYERS, E) == before


def test_a_table_beside_the_model_does_not_count(copy: Path, table: Table) -> None:
    before = weight_hashes(copy, LAYERS, E)
    table.save(copy / "sere.safetensors")
    assert weight_hashes(copy, LAYERS, E) == before


def test_without_safetensors_there_is_no_hash(tmp_path: Path) -> None:
    assert weight_hashes(tmp_path, LAYERS, E) == (None, None)


def test_layer_index_of_the_usual_names() -> None:
    names = ["model.layers.17.mlp.experts", "transformer.blocks.3.ffn", "h.5", "layer.2.moe"]
    assert [layer_index(name) for name in names] == [17, 3, 5, 2]
    with pytest.raises(ValueError, match="names no decoder layer"):
        layer_index("model.experts.4")
