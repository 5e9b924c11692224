"""Every MoE family that vLLM serves has a row in docs/architectures.md, or a reason."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from sere.calibration.calibrate import calibrate
from tests.conftest import save_tokenizer
from tests.tiny_models import ARCHITECTURES, tiny_model

DOC = (Path(__file__).parents[2] / "docs/architectures.md").read_text("utf-8")
SPEC = find_spec("vllm")
_LISTS = re.compile(r"_(TEXT_GENERATION|MULTIMODAL|TRANSFORMERS_SUPPORTED)_MODELS")


def families(vllm: Path) -> set[str]:
    """Names in vLLM's registry whose module makes MoE layers, or that say so themselves."""
    tree = ast.parse((vllm / "model_executor/models/registry.py").read_text("utf-8"))
    found = set()
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict)):
            continue
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target
        if not _LISTS.fullmatch(ast.unparse(target)):
            continue
        for name, place in ast.literal_eval(node.value).items():
            module = place[0]
            parts = module.split(".")[1:] if "." in module else ["model_executor/models", module]
            path = vllm.joinpath(*parts)
            files = [*path.rglob("*.py"), *(f for f in [path.with_suffix(".py")] if f.is_file())]
            text = "" if module == "transformers" else "".join(f.read_text() for f in files)
            if re.search(r"FusedMoE|fused_moe", text) or re.search(r"(?i)moe|mixtral", name):
                found.add(name)
    return found


def rows() -> set[str]:
    """Class names of the transformers modules that the matrix has rows for."""
    found = set()
    for architecture in ARCHITECTURES:
        folder = Path(transformers.__file__).parent / "models" / architecture
        text = (folder / f"modeling_{architecture}.py").read_text("utf-8")
        found |= set(re.findall(r"^class (\w+)\(", text, re.MULTILINE))
    return found


@pytest.mark.skipif(SPEC is None, reason="vLLM is not installed")
def test_every_moe_family_of_vllm_has_a_row_or_a_reason() -> None:
    assert SPEC is not None and SPEC.submodule_search_locations
    served = families(Path(SPEC.submodule_search_locations[0]))
    assert len(served) > 60  # the registry was read
    assert {"Qwen3MoeForCausalLM", "DeepseekV3ForCausalLM", "MixtralForCausalLM"} <= served
    assert sorted(name for name in served - rows() if f"`{name}`" not in DOC) == []


def internvl(text: Any) -> Any:
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"intermediate_size": 16, "image_size": [28, 28], "patch_size": [14, 14]}
    return transformers.InternVLForConditionalGeneration(
        transformers.InternVLConfig(text_config=text.to_dict(), vision_config=vision)
    )


def kimi_k25(text: Any) -> Any:
    from transformers.models.kimi_k25 import configuration_kimi_k25, modeling_kimi_k25

    config: Any = configuration_kimi_k25.Kimi_K25Config(text_config=text.to_dict())
    config.vision_config.update(
        {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    )
    config.vision_config.intermediate_size = 32
    return modeling_kimi_k25.Kimi_K25ForConditionalGeneration(config)


@pytest.mark.parametrize(
    ("around", "architecture"), [(internvl, "qwen3_moe"), (kimi_k25, "deepseek_v3")]
)
def test_a_language_model_within_a_model_of_images_is_calibrated_as_it_is_alone(
    around: Callable[[Any], Any], architecture: str, corpus_file: Path, tmp_path: Path
) -> None:
    """Whichever of its kind is within: no row of the matrix has this pair of models."""
    alone = tiny_model(architecture)
    whole = around(alone.config).float().eval()
    whole.model.language_model.load_state_dict(alone.model.state_dict())
    tables = []
    for name, model in (("alone", alone), ("whole", whole)):
        model.save_pretrained(tmp_path / name)
        save_tokenizer(tmp_path / name)
        for stream in (False, True):
            settings: dict[str, Any] = {"samples": 20, "length": 16, "progress": False}
            output = tmp_path / f"{name}-{stream}"
            settings |= {"data": corpus_file, "stream": stream}
            tables.append(calibrate(str(tmp_path / name), output, **settings))
    for table in tables[1:]:
        assert table.fingerprint.router_hash == tables[0].fingerprint.router_hash
        assert table.fingerprint.experts_hash == tables[0].fingerprint.experts_hash
        assert table.fingerprint.layers == tables[0].fingerprint.layers
        for index, layer in tables[0].layers.items():
            assert torch.equal(table.layers[index].similarity, layer.similarity)
            assert torch.equal(table.layers[index].gram, layer.gram)
