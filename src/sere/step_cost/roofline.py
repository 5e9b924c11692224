"""The time that a decode step cannot undercut: all that it reads, at the speed of this machine."""

from __future__ import annotations

from dataclasses import dataclass

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
