"""Experts and output matrix with backward passes of their own, for CPU cores with bf16 units.

The experts' rows are sorted and multiplied expert after expert; how many an expert gets is rounded
up to 128, so that few shapes occur and the matrix library's kernels stay cached: every new shape
costs it 2 ms, which made training seven times slower.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

PAD = 128


@torch.compile(dynamic=True)
def _activation(h: Tensor) -> Tensor:
    gate, up = h.float().chunk(2, dim=1)
    return (F.silu(gate) * up).bfloat16()


@torch.compile(dynamic=True)
def _activation_backward(h: Tensor, da: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    gate, up = h.float().chunk(2, dim=1)
    s, d = torch.sigmoid(gate), da.float()
    a = gate * s * up
    dw, d = (a * d).sum(-1), d * w[:, None]
    dh = torch.cat([d * up * (s * (1 + gate * (1 - s))), d * gate * s], 1)
    return dw, (a * w[:, None]).bfloat16(), dh.bfloat16()


@torch.compile(dynamic=True)
def _combined(y: Tensor, w: Tensor) -> Tensor:
    return (y.view(*w.shape, -1).float() * w[:, :, None]).sum(1)


@torch.compile(dynamic=True)
def _summed(d: Tensor, K: int) -> Tensor:
    return d.view(-1, K, d.shape[1]).float().sum(1)


def _places(ids: Tensor, E: int) -> tuple[Tensor, Tensor, list[tuple[int, int, int]], int]:
    """Where every slot's row goes; which slot is where; (expert, first, end); how many rows."""
    flat = ids.reshape(-1)
    order = flat.argsort(stable=True)
    counts = flat.bincount(minlength=E)
    room = (counts + PAD - 1) // PAD * PAD
    first = room.cumsum(0) - room
    within = torch.arange(len(order)) - (counts.cumsum(0) - counts)[flat[order]]
    spans = [(e, s, s + r) for e, (s, r) in enumerate(zip(first.tolist(), room.tolist())) if r]  # noqa: B905
    return order, within + first[flat[order]], spans, int(room.sum())


class Experts(torch.autograd.Function):
    """x [n, H], w13 [E, 2 I, H], w2 [E, H, I], ids and weights [n, K] -> the mixture [n, H]."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w13: Tensor, w2: Tensor, ids: Tensor, weights: Tensor
    ) -> Tensor:
        n, K, H = len(x), ids.shape[1], x.shape[1]
        order, at, spans, total = _places(ids, len(w13))
        place = torch.empty_like(order)
        place[order] = at
        rows = torch.full((total,), n)
        rows[at] = order // K
        w = torch.zeros(total)
        w[at] = weights.reshape(-1)[order]
        padded = torch.cat([x, x.new_zeros(1, H)]).bfloat16()
        a13, a2, xs = w13.bfloat16(), w2.bfloat16(), padded[rows]
        h, y = xs.new_empty(total, w13.shape[1]), xs.new_empty(total, H)
        for e, s, t in spans:
            torch.mm(xs[s:t], a13[e].T, out=h[s:t])
        a = _activation(h)
        for e, s, t in spans:
            torch.mm(a[s:t], a2[e].T, out=y[s:t])
        ctx.save_for_backward(xs, h, a13, a2, w, rows, place)
        ctx.spans, ctx.K = spans, K
        return _combined(y[place], weights)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:
        xs, h, a13, a2, w, rows, place = ctx.saved_tensors
        ds = torch.cat([dout, dout.new_zeros(1, dout.shape[1])]).bfloat16()[rows]
        da = ds.new_empty(len(ds), a2.shape[2])
        for e, s, t in ctx.spans:
            torch.mm(ds[s:t], a2[e], out=da[s:t])
        dw, aw, dh = _activation_backward(h, da, w)
        g13, g2, dxs = torch.zeros_like(a13), torch.zeros_like(a2), torch.empty_like(xs)
        for e, s, t in ctx.spans:
            torch.mm(ds[s:t].T, aw[s:t], out=g2[e])
            torch.mm(dh[s:t].T, xs[s:t], out=g13[e])
            torch.mm(dh[s:t], a13[e], out=dxs[s:t])
        dx = _summed(dxs[place], ctx.K)
        return dx, g13.float(), g2.float(), None, dw[place].view(-1, ctx.K)


@torch.compile(dynamic=True)
def _loss_and_slope(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    z = logits.float()
    top = z.amax(1, keepdim=True)
    e = (z - top).exp()
    total = e.sum(1, keepdim=True)
    loss = (total.log() + top - z.gather(1, labels[:, None])).mean()
    hit = torch.arange(z.shape[1])[None] == labels[:, None]
    return loss, ((e / total - hit.float()) / len(z)).bfloat16()


class Head(torch.autograd.Function):
    """Cross entropy of x @ embedding.T against labels, its slope taken in the same pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, embedding: Tensor, labels: Tensor) -> Tensor:
        xb, eb = x.bfloat16(), embedding.bfloat16()
        loss, slope = _loss_and_slope(xb @ eb.T, labels)
        ctx.save_for_backward(xb, eb, slope)
        return loss

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> Any:
        xb, eb, slope = ctx.saved_tensors
        return (slope @ eb).float() * d, (slope.T @ xb).float() * d, None
