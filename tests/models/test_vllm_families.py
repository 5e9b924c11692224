"""Every MoE family that vLLM serves has a row in docs/architectures.md, or a reason."""

from __future__ import annotations

import ast
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import transformers

from tests.tiny_models import ARCHITECTURES

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
