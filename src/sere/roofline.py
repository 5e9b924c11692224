"""The time that a decode step cannot undercut: all that it reads, at the speed of this machine."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sere.moe import moe_layers


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
    """A model on a machine.

    K: experts per token. itemsize: bytes of a parameter as it is served. bandwidth: bytes/s. flops:
    per second, in the model's dtype. kv_bytes: that a row's attention reads, on average.
    """

    sizes: Sizes
    K: int
    itemsize: int
    bandwidth: float
    flops: float
    kv_bytes: float

    def seconds(self, active: float, rows: int) -> float:
        """Of one decode step; active: distinct experts, a mean over layers.

        The experts' share and the rest each take the longer of reading and multiplying.
        """
        sizes = self.sizes
        experts = self._longer(sizes.layers * active * sizes.expert, 0, rows * self.K / active)
        return experts + self._longer(sizes.dense, rows * self.kv_bytes, rows)

    def _longer(self, parameters: float, extra_bytes: float, rows: float) -> float:
        """Of parameters that are read once, each multiplied with so many rows."""
        reading = (parameters * self.itemsize + extra_bytes) / self.bandwidth
        return max(reading, 2 * parameters * rows / self.flops)

    def __str__(self) -> str:
        expert, dense = (x * self.itemsize / 1e6 for x in (self.sizes.expert, self.sizes.dense))
        return (
            f"{expert:.3g} MB an expert, {dense:.4g} MB of all else, at the "
            f"{self.bandwidth / 1e9:.3g} GB/s and {self.flops / 1e12:.3g} Tflop/s measured here"
        )
