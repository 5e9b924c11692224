"""The time that a decode step cannot undercut: all that it reads, at the speed of this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sere.models.moe import moe_layers


@dataclass(frozen=True)
class Sizes:
    """Of one model, in parameters. expert: one routed expert. layers: how many have experts. dense:
    all that every step reads (not the embedding, whose rows are looked up)."""

    total: int
    expert: float
    layers: int
    dense: int

    @classmethod
    def of(cls, folder: str) -> Sizes:
        """Of the model in `folder`, from its configuration alone."""
        from transformers import AutoConfig, AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
        layers = moe_layers(model)
        total = sum(p.numel() for p in model.parameters())
        experts = sum(p.numel() for layer in layers for p in layer.experts.parameters())
        words, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        looked_up = words.numel() if words is not head else 0
        expert = experts / sum(layer.E for layer in layers)
        return cls(total, expert, len(layers), total - experts - looked_up)


@dataclass(frozen=True)
class Roofline:
    """A model on a machine whose memory is the limit.

    itemsize: bytes of a parameter as it is served. bandwidth: bytes/s. kv_bytes: that a row's
    attention reads, on average.
    """

    sizes: Sizes
    itemsize: int
    bandwidth: float
    kv_bytes: float

    def seconds(self, active: float, rows: int) -> float:
        """Of reading what one decode step needs; active: distinct experts, a mean over layers."""
        parameters = self.sizes.layers * active * self.sizes.expert + self.sizes.dense
        return (parameters * self.itemsize + rows * self.kv_bytes) / self.bandwidth

    def __str__(self) -> str:
        expert, dense = (x * self.itemsize / 1e6 for x in (self.sizes.expert, self.sizes.dense))
        return (
            f"reading {expert:.3g} MB an expert, {dense:.4g} MB of all else, at the "
            f"{self.bandwidth / 1e9:.3g} GB/s measured here"
        )


def beaten(results: Sequence[dict[str, Any]]) -> str | None:
    """What of a bench's results was faster than its bound, in words: a bound that is beaten is
    none, and must not be shown. None where it holds."""
    steps = [
        (min(arm["tpot_ms_by_round"]), found["batch"], arm)
        for found in results
        for arm in found["arms"]
    ]
    fastest, batch, arm = max(steps, key=lambda step: step[2]["predicted_ms"] / step[0])
    if fastest >= arm["predicted_ms"]:
        return None
    return (
        f"at batch {batch} {arm['name']} took {fastest:.2f} ms where reading "
        f"would have taken {arm['predicted_ms']:.2f}: the probe read slower than the engine does"
    )


def unbound(results: Sequence[dict[str, Any]]) -> str | None:
    """The step that is farthest from its bound, in words, where that is more than twice the bound:
    what else it does, and a bound leaves out, weighs more than reading. Else None."""
    steps = [
        (arm["tpot_ms"] / arm["predicted_ms"], found["batch"], arm)
        for found in results
        for arm in found["arms"]
    ]
    factor, batch, arm = max(steps, key=lambda step: step[0])
    if factor <= 2:
        return None
    return (
        f"at batch {batch} {arm['name']} took {arm['tpot_ms']:.2f} ms, {factor:.3g} times what "
        "reading takes: there computing and calls, which the prediction leaves out, are the limit"
    )
