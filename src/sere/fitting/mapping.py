"""What calibration keeps of one layer to fit linear maps (`sere.maps`): the experts' inputs.

The rows that the experts get wait, in the model's own dtype, until all text is read; then one
expert after the other is asked for its outputs on its own rows. Beside the rows there are never
more than the sums of one expert, a dozen matrices [H, H] of float64, whatever E is. Every fourth
sequence is held out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from sere.fitting.regression import ENOUGH, Fit, LinearMap, Moments, fit
from sere.maps import LayerMaps

HELD_OUT = 4
"""One sequence in so many decides, and does not fit."""


def is_held_out(sequence: int) -> bool:
    """Whether a text's sequence of this number is one that the fit does not see."""
    return sequence % HELD_OUT == HELD_OUT - 1


class Rows:
    """Inputs and choices of one layer, batch after batch; and the pairs' mean outputs.

    means: [E, E, H] float32, on the outputs' device: the sum over the tokens of u of E_v(x).
    """

    def __init__(self) -> None:
        self._hidden: list[Tensor] = []
        self._chosen: list[Tensor] = []
        self._held: list[Tensor] = []
        self.means: Tensor | None = None

    def add(self, hidden: Tensor, chosen: Tensor, held: Tensor) -> None:
        """hidden: [n, H]. chosen: [n, E] bool. held: [n] bool, rows that the fit does not see."""
        self._hidden.append(hidden.cpu())
        self._chosen.append(chosen.cpu())
        self._held.append(held.cpu())

    def add_outputs(self, outputs: Tensor, chosen: Tensor) -> None:
        """outputs: [E, n, H] of some of the rows; chosen: [n, E]."""
        E, _, H = outputs.shape
        if self.means is None:
            self.means = outputs.new_zeros(E, E, H)
        sent = chosen.T.to(outputs.dtype)
        for v, output in enumerate(outputs):
            self.means[:, v] += sent @ output

    @property
    def chosen(self) -> Tensor:
        """[n, E] bool, of all rows."""
        return torch.cat(self._chosen)

    def maps(
        self,
        output: Callable[[Tensor, int], Tensor],
        rank: int,
        cross: Tensor,
        energy: Tensor,
        *,
        device: torch.device | str,
        chosen: Tensor | None = None,
    ) -> LayerMaps:
        """The layer's maps. cross, energy: [E, E], the means over the tokens of u of
        <E_u(x), E_v(x)> and |E_v(x)|^2.

        output: what expert u makes of rows [n, H] on the device. chosen: in place of its own, where
        several ranks ask for the same rows (`ask`). Raises once all experts were asked.
        """
        chosen = self.chosen if chosen is None else chosen
        H, tokens = self._hidden[0].shape[1], chosen.sum(0)
        rank, fits, failed = min(rank, H), list[Fit](), None
        for rows, outputs, apart in self.ask(output, device, chosen):
            try:
                seen, unseen = (Moments.of(rows[part], outputs[part]) for part in (~apart, apart))
                fits.append(fit(seen, unseen, rank))
            except RuntimeError as error:  # other ranks are in step
                failed = error
        if failed is not None:
            raise failed
        assert self.means is not None
        means = self.means.cpu() / tokens.clamp(min=1)[:, None, None]
        return _layer_maps(fits, rank, H, tokens, _affine(means, cross, energy))

    def ask(
        self,
        output: Callable[[Tensor, int], Tensor],
        device: torch.device | str,
        chosen: Tensor,
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Of one expert after the other: its rows and outputs [n, H], and which are held out."""
        hidden, held = torch.cat(self._hidden), torch.cat(self._held)
        for u, mine in enumerate(chosen.unbind(1)):
            rows = hidden[mine].to(device)
            yield rows, output(rows, u) if len(rows) else rows, held[mine].to(device)


def shortcomings(maps: Mapping[int, LayerMaps]) -> Iterator[str]:
    """Where experts got no map, or one of a lower rank than others, a line each."""
    for index, layer in maps.items():
        thin = (layer.tokens < HELD_OUT * ENOUGH).nonzero().flatten().tolist()
        if thin:
            yield (
                f"layer {index}: {len(thin)} experts saw fewer than {HELD_OUT * ENOUGH} tokens, "
                f"too few for a map ({', '.join(map(str, thin[:8]))}): calibrate on more text"
            )
        if (lowered := int((layer.ranks < layer.R).sum()) - len(thin)) > 0:
            yield f"layer {index}: {lowered} experts got a lower rank"


def _affine(means: Tensor, cross: Tensor, energy: Tensor) -> Tensor:
    """[E, E]: the share of u's energy that is left when v answers with the best factor and the best
    constant, over the tokens of u."""
    means, cross, energy = means.double(), cross.double(), energy.double()
    own = means.diagonal(dim1=0, dim2=1).T  # [E, H], the mean of E_u over its own tokens
    covariance = cross - torch.einsum("uh,uvh->uv", own, means)
    variance = (energy - means.square().sum(-1)).clamp(min=1e-12 * energy.max())
    full = cross.diagonal()[:, None]
    lost = full - own.square().sum(-1, keepdim=True) - covariance.square() / variance
    return torch.where(full > 0, lost.clamp(min=0) / full, 1.0).float()


def _layer_maps(fits: list[Fit], rank: int, H: int, tokens: Tensor, affine: Tensor) -> LayerMaps:
    E = len(fits)
    down, up = (torch.zeros(E, rank, H, dtype=torch.bfloat16) for _ in range(2))
    centre, constant = torch.zeros(E, rank), torch.zeros(E, H)
    for u, found in enumerate(fits):
        if found.map is not None:
            _write(found.map, down[u], up[u], centre[u], constant[u])
    return LayerMaps(
        down,
        up,
        centre,
        constant,
        torch.stack([found.left for found in fits]).float().cpu(),
        torch.tensor([found.rank for found in fits], dtype=torch.int32),
        tokens,
        affine,
    )


def _write(found: LinearMap, down: Tensor, up: Tensor, centre: Tensor, constant: Tensor) -> None:
    """Round to what is stored; what the rounded matrix makes of the mean input is taken off."""
    r = len(found.down)
    down[:r], up[:r] = found.down.to(down.dtype), found.up.to(up.dtype)
    centre[:r] = (down[:r].double() @ found.m.cpu()).float()
    constant.copy_(found.c)
