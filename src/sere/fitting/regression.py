"""What an expert does to the tokens that the router sends it, as a linear map of few ranks.

`E_u(x) ~ c + B A (x - m)`: ridge regression of the outputs on the inputs, in closed form, cut to
rank r by least loss of the *fitted outputs* (reduced-rank regression), not by the matrix's own SVD.
Only sums over tokens are kept (`Moments`), in float64. Tokens that the fit has not seen decide the
ridge and the rank; the map itself is then fitted on all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RIDGES = (0.01, 0.1, 1.0, 10.0)
"""Those that are tried, in units of the mean of the diagonal of `xx`."""
ENOUGH = 16
"""Fewer tokens than this on either side can decide nothing: such an expert gets no map."""
# Beyond the rank, what the subspace iteration carries along and how often it repeats.
_SPARE, _ROUNDS = 8, 12


@dataclass
class Moments:
    """Sums over tokens x [H] and outputs y [H] of one expert, float64.

    xx: [H, H], sum of x x^T. xy: [H, H], sum of x y^T. yy: sum of |y|^2.
    """

    n: int
    x: Tensor
    y: Tensor
    xx: Tensor
    xy: Tensor
    yy: float

    @classmethod
    def of(cls, x: Tensor, y: Tensor) -> Moments:
        """x, y: [n, H], a row each token."""
        x, y = x.double(), y.double()
        return cls(len(x), x.sum(0), y.sum(0), x.T @ x, x.T @ y, y.square().sum().item())

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.n + other.n,
            self.x + other.x,
            self.y + other.y,
            self.xx + other.xx,
            self.xy + other.xy,
            self.yy + other.yy,
        )

    def centred(self, m: Tensor, c: Tensor) -> tuple[Tensor, Tensor, float]:
        """xx, xy and yy of (x - m) and (y - c)."""
        xx = self.xx - torch.outer(m, self.x) - torch.outer(self.x, m) + self.n * torch.outer(m, m)
        xy = self.xy - torch.outer(m, self.y) - torch.outer(self.x, c) + self.n * torch.outer(m, c)
        yy = self.yy - 2 * (c @ self.y).item() + self.n * (c @ c).item()
        return xx, xy, yy


@dataclass(frozen=True)
class LinearMap:
    """x -> c + up^T (down (x - m)), float64.

    m, c: [H]. down: [R, H]. up: [R, H], orthonormal rows, the one that explains most first: the
    first r of both are the best map of rank r.
    """

    m: Tensor
    c: Tensor
    down: Tensor
    up: Tensor

    @classmethod
    def fitted(cls, on: Moments, rank: int, ridge: float) -> LinearMap:
        """The least-squares map of that rank; ridge: see `RIDGES`."""
        m, c = on.x / on.n, on.y / on.n
        xx, xy, _ = on.centred(m, c)
        whole = _ridge_solution(xx, xy, ridge)
        up = _leading(whole.T @ xx @ whole, rank)
        return cls(m, c, (whole @ up).T, up.T)

    def left(self, on: Moments) -> Tensor:
        """[R + 1]: by rank, the energy of the outputs that the map does not reproduce, as a share
        of their energy."""
        xx, xy, yy = on.centred(self.m, self.c)
        explained = 2 * (self.down @ xy * self.up).sum(1) - (self.down @ xx * self.down).sum(1)
        lost = yy - torch.cat([explained.new_zeros(1), explained.cumsum(0)])
        return lost.clamp(min=0) / max(on.yy, torch.finfo(torch.float64).tiny)


@dataclass(frozen=True)
class Fit:
    """A map and how good it is.

    map: of `rank` ranks, fitted on all tokens. left: [R + 1], by rank, on tokens that an equal fit
    had not seen; beyond `rank` it is that of `rank`. map is None, rank 0 and all of it left, 1,
    where nothing is better than no answer.
    """

    map: LinearMap | None
    rank: int
    left: Tensor


def fit(train: Moments, held: Moments, rank: int) -> Fit:
    """The best map of at most `rank` ranks, by what it leaves of the held-out tokens."""
    nothing = Fit(None, 0, torch.ones(rank + 1, dtype=torch.float64))
    if min(train.n, held.n) < ENOUGH or not train.yy * held.yy > 0:
        return nothing
    tried = [(ridge, LinearMap.fitted(train, rank, ridge).left(held)) for ridge in RIDGES]
    ridge, left = min(tried, key=lambda each: each[1].min().item())
    if left.min() >= 1:
        return nothing
    best = int(left.argmin())
    left = torch.cat([left[:best], left[best].expand(len(left) - best)])
    return Fit(LinearMap.fitted(train + held, best, ridge), best, left)


def _ridge_solution(xx: Tensor, xy: Tensor, ridge: float) -> Tensor:
    """[H, H]: W of least |y - W^T x|^2 + ridge |W|^2."""
    unit = xx.diagonal().mean().clamp(min=torch.finfo(xx.dtype).tiny)
    loaded = xx + ridge * unit * torch.eye(len(xx), dtype=xx.dtype, device=xx.device)
    solution: Tensor = torch.cholesky_solve(xy, torch.linalg.cholesky(loaded))
    return solution


def _leading(square: Tensor, rank: int) -> Tensor:
    """[H, rank]: the leading eigenvectors of a positive matrix [H, H], the largest first."""
    H = len(square)
    if rank + _SPARE >= H // 2:
        exact: Tensor = torch.linalg.eigh(square).eigenvectors.flip(1)[:, :rank]
        return exact
    seeded = torch.Generator().manual_seed(0)
    basis = torch.randn(H, rank + _SPARE, generator=seeded, dtype=square.dtype).to(square.device)
    for _ in range(_ROUNDS):
        basis = torch.linalg.qr(square @ basis).Q
    inner = torch.linalg.eigh(basis.T @ square @ basis).eigenvectors.flip(1)
    leading: Tensor = basis @ inner[:, :rank]
    return leading
