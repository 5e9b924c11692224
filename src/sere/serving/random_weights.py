"""Random weights that behave: an engine without a checkpoint, for measuring speed.

vLLM's own load format "dummy" fills all tensors of one shape with the same tiny numbers: all layers
have one router, the output matrix is the embedding, and experts are too small to be seen in the
tokens that are written. Load format `sere_random` draws every weight anew, as
models are initialised, and shapes routers so that experts are as unequally loaded as asked for.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from sere.serving.symbols import symbol

LOAD_FORMAT = "sere_random"
_STD = 0.02  # how transformers initialises matrices
_ROUTER = re.compile(r"(?:^|\.)(?:gate|router)\.weight$")
_SAMPLE = 4096  # imagined tokens that routers are shaped with


def register() -> None:
    """Make the load format known to vLLM in this process."""
    base: Any = symbol("BaseModelLoader")

    class RandomLoader(base):  # type: ignore[misc]
        """`model_loader_extra_config`: {"seed", "K", "load": expected shares or None}."""

        def download_model(self, model_config: Any) -> None:
            pass

        def load_weights(self, model: nn.Module, model_config: Any) -> None:
            fill(model, **self.load_config.model_loader_extra_config)

    symbol("model_loaders")[LOAD_FORMAT] = RandomLoader


@torch.no_grad()
def fill(model: nn.Module, *, seed: int, K: int, load: Sequence[float] | None = None) -> None:
    """Draw every parameter of a model.

    Vectors called weight (norms) become ones, other vectors (biases) zeros. load: [E] expected
    share of the routers' choices by expert, the same curve in every layer with experts in an order
    of its own; None loads all alike.
    """
    for name, parameter in model.named_parameters():
        own = seed ^ zlib.crc32(name.encode())
        generator = torch.Generator(parameter.device).manual_seed(own)
        if parameter.ndim < 2:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
        elif _ROUTER.search(name):
            parameter.normal_(0, parameter.shape[1] ** -0.5, generator=generator)
            if load is not None:
                order = torch.randperm(len(load), generator=torch.Generator().manual_seed(own))
                size = row_sizes(tuple(load), K)[order].to(parameter)
                parameter.mul_(size[:, None])
        else:
            # Uniform, of the same deviation: much faster to draw.
            bound = 3**0.5 * (1.0 if "embed" in name else _STD)
            parameter.uniform_(-bound, bound, generator=generator)


@lru_cache
def row_sizes(load: tuple[float, ...], K: int) -> Tensor:
    """[E] norms of a router's rows under which top-K choices are shared out as `load`, nearly.

    A longer row has logits that spread more, and is chosen more often. By iteration on imagined
    tokens. An expert that more than half of the tokens would have to choose is out of reach.
    """
    wanted = torch.tensor(load) / sum(load)
    logits = _imagined(len(load), seed=0)
    size = torch.ones(len(load))
    for _ in range(200):
        size = (size * ((wanted + 1e-4) / (chosen(logits * size, K) + 1e-4)) ** 0.2).clamp(0.02, 50)
        size /= size.mean()
    return size


def reached(load: tuple[float, ...], K: int) -> Tensor:
    """[E] shares that routers so shaped really give, on other imagined tokens."""
    return chosen(_imagined(len(load), seed=1) * row_sizes(load, K), K)


def _imagined(E: int, seed: int) -> Tensor:
    return torch.randn(_SAMPLE, E, generator=torch.Generator().manual_seed(seed))


def chosen(logits: Tensor, K: int) -> Tensor:
    """[E] share of top-K choices by expert: logits [n, E]."""
    ids = logits.topk(K, dim=1).indices.flatten()
    return ids.bincount(minlength=logits.shape[1]) / len(ids)
