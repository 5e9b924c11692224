"""Tables made without text: what a measurement of outputs has to beat.

`weights`: the cosine of two experts' flattened parameters, mapped to [0, 1]. Experts whose hidden
neurons are permuted compute the same and have nothing in common here.
`random`: a symmetric matrix of uniform noise. `LayerStatistics.imagined` is all that a table holds,
for models whose weights are random, too.
"""

from __future__ import annotations

import torch
from torch import Tensor
from tqdm import tqdm

from sere.models.fit import PER_TOKEN
from sere.models.moe import MoELayer
from sere.models.skeleton import Skeleton

METHODS = ("weights", "random")


class NullModelError(ValueError):
    """A model that tells too little without being run, and what to do instead."""


def similarities(
    skeleton: Skeleton, method: str, seed: int, progress: bool = True
) -> dict[int, Tensor]:
    """By decoder layer index: [E, E] float32 in [0, 1], symmetric, diagonal 1."""
    if method == "random":
        return {layer.index: _random(layer.E, seed + layer.index) for layer in skeleton.layers}
    found = {}
    for layer in tqdm(skeleton.layers, "weights", unit="layer", disable=not progress):
        unit = next(name for name in skeleton.units if layer.name.startswith(f"{name}."))
        with skeleton.filled(unit):
            found[layer.index] = _of_weights(layer)
    return found


def experts_per_token(model: torch.nn.Module) -> int:
    """K as the model's configuration states it."""
    text = model.config.get_text_config()  # type: ignore[operator, union-attr]
    for config in (text, getattr(text, "ffn_config", None)):
        for name in PER_TOKEN:
            K = getattr(config, name, None)
            if isinstance(K, list) and K:  # hunyuan_v1_moe: of every layer, and refused if uneven
                K = max(K)
            if isinstance(K, int):
                return K
    raise NullModelError(
        f"{type(model).__name__}: its configuration does not say how many experts a token has "
        f"({', '.join(PER_TOKEN)}); calibrate on text"
    )


def _random(E: int, seed: int) -> Tensor:
    noise = torch.rand(E, E, generator=torch.Generator().manual_seed(seed)).triu(1)
    return (noise + noise.T).fill_diagonal_(1)


def _of_weights(layer: MoELayer) -> Tensor:
    gram = torch.zeros(layer.E, layer.E, dtype=torch.float64)
    for name, weight in layer.experts.named_parameters():
        if weight.shape[0] % layer.E:
            raise NullModelError(
                f"{layer.name}.{name} {list(weight.shape)} is not one part for each of "
                f"{layer.E} experts; use --method random or calibrate on text"
            )
        flat = weight.detach().reshape(layer.E, -1)
        for part in torch.split(flat, 2**20, dim=1):
            double = part.double()
            gram += (double @ double.T).cpu()
    norm = gram.diagonal().clamp(min=torch.finfo(torch.float64).tiny).sqrt()
    cosine = gram / (norm[:, None] * norm[None, :])
    return ((cosine + 1) / 2).clamp(0, 1).fill_diagonal_(1).float()
