"""What the names of a checkpoint's tensors say: of which layer, a router's, an expert's?"""

from __future__ import annotations

import re
from pathlib import Path

from sere.checkpoint.stored import Stored, stored_tensors

# `model.layers.3.mlp.gate.weight`, `transformer.blocks.3...`, `backbone.h.3...`
LAYER = re.compile(r"(?:^|\.)(?:layers?|blocks?|h)\.(\d+)\.")
# A routed expert's weight, of a layer that decodes text.
_ROUTED = re.compile(r"^(?!.*(?:shared|vision|visual|mtp)).*expert")
# Parts of a model that decode no text, or are other models beside it.
_OTHER_PART = re.compile(r"(?:^|\.)(?:vision\w*|visual|audio\w*|mtp\w*|talker|code2wav)\.")
_ATTENTION = re.compile(r"attn|attention")
_ONE_EXPERT = re.compile(r"experts?\.(\d+)\.")
_ABOUT_A_WEIGHT = re.compile(
    r"bias|scale|zeros?\b|zero_point|absmax|g_idx|quant_map|quant_state|_shape"
)
# Other matrices of a layer, which may happen to have E rows.
_NOT_A_ROUTER = re.compile(r"_proj\b|shared|conv")
_ROUTER = re.compile(r"\.(?:gate|router)\.")


def layer_index(name: str) -> int:
    """Decoder layer index in a parameter or module name; ValueError if it has none."""
    match = LAYER.search(name + ".")
    if match is None:
        raise ValueError(f"{name!r} names no decoder layer (expected e.g. 'layers.3.')")
    return int(match.group(1))


def text_layer(name: str) -> int | None:
    """Of a tensor, the decoder layer of the model that reads text; None for all others."""
    match = None if _OTHER_PART.search(name) else LAYER.search(name)
    return int(match.group(1)) if match else None


def is_expert_weight(name: str) -> bool:
    """Whether a tensor called so is a routed expert's matrix, or all of a layer's in one; packed
    ones are, what is said about them (scales, biases) is not."""
    routed = "expert" in name and "shared" not in name and not _ATTENTION.search(name)
    return routed and not _ABOUT_A_WEIGHT.search(name)


def one_of_them(name: str) -> int | None:
    """Which expert a tensor is of, where each has its own."""
    match = _ONE_EXPERT.search(name)
    return int(match.group(1)) if match else None


def is_stacked(name: str, shape: tuple[int, ...], E: int) -> bool:
    """Whether a tensor holds the matrices of all E experts one after the other."""
    if not shape or shape[0] % E:
        return False
    if is_expert_weight(name):
        return len(shape) == 3 or (len(shape) == 2 and shape[0] > E)  # dbrx: [E*I, H]
    # granite, jetmoe: `input_linear`
    alone = not (_ATTENTION.search(name) or _ABOUT_A_WEIGHT.search(name) or "conv" in name)
    return len(shape) == 3 and shape[0] == E and alone and "expert" not in name


def is_router(name: str, shape: tuple[int, ...], E: int) -> bool:
    """Whether a tensor of a MoE layer is a matrix [E, *] outside its experts and its attention."""
    if len(shape) != 2 or "expert" in name or _NOT_A_ROUTER.search(name):
        return False
    if _ATTENTION.search(name) or _ABOUT_A_WEIGHT.search(name):
        return False
    return shape[0] == E or bool(_ROUTER.search(name))  # longcat_flash: identity experts besides


def experts_by_layer(tensors: dict[str, Stored]) -> dict[int, int]:
    """How many routed experts each decoder layer has tensors of, where names or shapes tell."""
    apart: dict[int, set[int]] = {}
    stacked: dict[int, int] = {}
    for name, tensor in tensors.items():
        layer = text_layer(name)
        if layer is None or not is_expert_weight(name):
            continue
        if (expert := one_of_them(name)) is not None:
            apart.setdefault(layer, set()).add(expert)
        elif len(tensor.shape) >= 3:
            stacked[layer] = tensor.shape[0]
    return dict(sorted((stacked | {layer: len(own) for layer, own in apart.items()}).items()))


def expert_layers(folder: str | Path) -> tuple[int, ...]:
    """Decoder layers that the checkpoint in `folder` has routed experts for, ascending.

    Those of drafters (MTP), which some models number as further layers, are among them; empty where
    there are no safetensors, or none that is called an expert's.
    """
    names = (name for name in stored_tensors(folder) if _ROUTED.search(name))
    return tuple(sorted({int(match.group(1)) for name in names if (match := LAYER.search(name))}))
