"""What calibration knows of one MoE layer, and what is lost when experts stand in for others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sere.kernels.plan import Substitution

# An expert of so little energy, as a share of the layer's largest, counts as this much.
_SILENT = 1e-6
TENSORS = ("similarity", "load", "gram", "cosine", "directed", "directed_energy")


class TableError(ValueError):
    """A table that must not be used: names the file, the fault and what to do next."""


@dataclass(frozen=True)
class LayerStatistics:
    """What calibration knows of one MoE layer. Tensors are float32, [E, E] where nothing is said.

    similarity: in [0, 1], diagonal 1; row u tells who can stand in for expert u. The identity means
        that nothing is known: such a layer is never re-routed.
    load: [E], share of the router's choices that went to each expert; sums to 1.
    gram: mean over all tokens of <E_u(x), E_v(x)>; the diagonal is the experts' output energy.
    cosine: mean over all tokens of the cosine of E_u(x) and E_v(x).
    directed: mean over the tokens that the router sends to u of <E_u(x), E_v(x)>.
    directed_energy: mean over the same tokens of |E_v(x)|^2.
    tokens: how many tokens the layer saw; 0 in a table made without text, whose load and means are
        all zero.
    stability: share of replacements that other text of the kind would choose again, by bootstrap;
        None where it is unknown.
    """

    similarity: Tensor
    load: Tensor
    gram: Tensor
    cosine: Tensor
    directed: Tensor
    directed_energy: Tensor
    tokens: int
    stability: float | None = None

    @classmethod
    def without_text(cls, similarity: Tensor) -> LayerStatistics:
        """Of a layer that saw no token: `similarity` from elsewhere, or the identity."""
        E = len(similarity)
        empty = torch.zeros(E, E)
        return cls(similarity, torch.zeros(E), empty, empty, empty, empty, tokens=0)

    @classmethod
    def imagined(cls, E: int, seed: int) -> LayerStatistics:
        """Of E experts with random vectors for outputs, few of them, so that some are alike and
        others not; similarity is (cosine + 1) / 2."""
        outputs = torch.randn(E, 16, generator=torch.Generator().manual_seed(seed))
        gram = outputs @ outputs.T / 16
        norm = gram.diagonal().sqrt()
        cosine = gram / (norm[:, None] * norm[None, :])
        similarity = ((cosine + 1) / 2).clamp(0, 1).fill_diagonal_(1)
        energy = gram.diagonal().expand(E, E).clone()
        return cls(similarity, torch.full((E,), 1 / E), gram, cosine, gram, energy, tokens=1)

    @property
    def seen(self) -> Tensor:
        """[E] bool: whether any token chose the expert."""
        return self.directed_energy.diagonal() > 0

    @property
    def own_energy(self) -> Tensor:
        """[E]: of each expert's output over the tokens routed to it, or over all where none was."""
        return torch.where(self.seen, self.directed_energy.diagonal(), self.gram.diagonal())

    def left_over(self, left: Tensor) -> Tensor:
        """[E] float64: a share of each expert's energy in the units of `Substitution.error`."""
        own = self.own_energy.double()
        tiny = torch.finfo(torch.float64).tiny
        return left.double() * (own / max(_typical(own, self.load), tiny)).sqrt()

    def substitution(self, *, scaled: bool) -> Substitution:
        """What is lost when one expert answers for another, over the tokens routed to the latter;
        for an expert that no token chose, over all tokens."""
        seen, own, energy = self.seen[:, None], self.own_energy, self.gram.diagonal()
        return Substitution.of(
            torch.where(seen, self.directed, self.gram),
            torch.where(seen, self.directed_energy, energy[None, :]),
            own,
            typical=_typical(own, self.load),
            scaled=scaled,
        )


def _typical(energy: Tensor, load: Tensor) -> float:
    """The geometric mean of the experts' energies, each as often as it is chosen: a few experts of
    enormous output do not shift it. Both [E]."""
    energy = energy.double()
    audible = energy.clamp(min=max(energy.max().item() * _SILENT, torch.finfo(energy.dtype).tiny))
    return (load.double() * audible.log()).sum().exp().item()


def check_layer(index: int, layer: LayerStatistics, E: int) -> None:
    for name in TENSORS:
        tensor, shape = getattr(layer, name), [E] if name == "load" else [E, E]
        if list(tensor.shape) != shape:
            raise TableError(f"layer {index}: {name} is {list(tensor.shape)}, expected {shape}")
        if not torch.isfinite(tensor).all():
            raise TableError(f"layer {index}: {name} holds NaN or infinity; calibrate again")
    if layer.similarity.min() < 0 or layer.similarity.max() > 1:
        low, high = layer.similarity.min().item(), layer.similarity.max().item()
        raise TableError(f"layer {index}: similarity spans [{low:.3g}, {high:.3g}], not [0, 1]")


def is_identity(similarity: Tensor) -> bool:
    return torch.equal(
        similarity, torch.eye(len(similarity), dtype=similarity.dtype, device=similarity.device)
    )
