"""What a model's outline tells: built from its configuration alone, without a weight or a text."""

from __future__ import annotations

import torch

from sere.models.fit import PER_TOKEN, check_configured, check_even
from sere.models.hub import described, located
from sere.models.loading import config_of, model_class_of
from sere.models.moe import UNIT, MoELayer, moe_layers


def check_described(model: str) -> str:
    """Refuse by its configuration alone what no table can be made of, before any text is read and
    any weight is downloaded. The folder that the configuration is in.

    Raises `LoadError` and `NoExpertsError`.
    """
    check_configured(folder := described(model))
    check_outline(folder)
    return folder


def fetched(model: str) -> str:
    """The model's folder, downloaded if need be, once its configuration has been looked through."""
    check_described(model)
    return located(model)


def check_outline(folder: str) -> None:
    """Refuse what no table can be made of, by the model's own modules: configurations say how many
    experts a layer has in too many ways.

    Raises `NoExpertsError` for dense models, those that cannot be calibrated, and layers with
    different numbers of experts, `LoadError` for layers with different numbers of them per token.
    """
    try:
        made_from = model_class_of(folder)
        with torch.device("meta"):
            build = getattr(made_from, "_from_config", None) or made_from.from_config
            model = build(config_of(made_from, folder))
    except Exception:  # whatever it is, loading says it in its own words
        return
    found = {layer.index: K for layer in moe_layers(model) if (K := _per_token(model, layer))}
    check_even(folder, "experts per token", found)


def _per_token(model: torch.nn.Module, layer: MoELayer) -> int | None:
    """K as the layer's router has it, else as anything in its decoder layer has; None if unsaid."""
    block = layer.name.rpartition(".")[0] if layer.adapter.hooked is layer.experts else layer.name
    unit = UNIT.match(layer.name)
    for place in (block, unit.group() if unit else block):
        said = {
            value
            for part in model.get_submodule(place).modules()
            for name in PER_TOKEN
            if isinstance(value := vars(part).get(name), int)
        }
        if len(said) == 1:
            return said.pop()
    return None
