"""Linear maps against the same mathematics on whole data matrices, with numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from sere.fitting.regression import RIDGES, LinearMap, Moments, fit

H = 12


def data(n: int, *, rank: int = 3, noise: float = 0.3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs of very different variances and means, outputs a noisy map of low rank of them."""
    g = torch.Generator().manual_seed(7)
    matrix = torch.randn(H, rank, generator=g) @ torch.randn(rank, H, generator=g)
    spread = torch.logspace(-1.5, 1, H)
    mix, shift = torch.randn(H, H, generator=g), torch.randn(H, generator=g)
    g.manual_seed(100 + seed)
    x = (torch.randn(n, H, generator=g) * spread) @ mix + 5 * shift
    return x, x @ matrix + 3 + noise * torch.randn(n, H, generator=g)


def best_of_rank(x: Tensor, y: Tensor, r: int) -> np.ndarray:
    """Least squares, then the fitted outputs cut to rank r by their own SVD: [n, H] answers."""
    X, Y = x.double().numpy(), y.double().numpy()
    Xc, Yc = X - X.mean(0), Y - Y.mean(0)
    fitted = Xc @ np.linalg.lstsq(Xc, Yc, rcond=None)[0]
    U, s, V = np.linalg.svd(fitted, full_matrices=False)
    return Y.mean(0) + U[:, :r] * s[:r] @ V[:r]


def answers(found: LinearMap, x: Tensor, r: int) -> Tensor:
    return found.c + (x.double() - found.m) @ found.down[:r].T @ found.up[:r]


@pytest.mark.parametrize("r", [0, 1, 2, 5])
def test_each_rank_is_the_least_loss_of_the_fitted_outputs(r: int) -> None:
    x, y = data(400, rank=6)
    found = LinearMap.fitted(Moments.of(x, y), 8, ridge=1e-12)
    np.testing.assert_allclose(answers(found, x, r).numpy(), best_of_rank(x, y, r), atol=1e-5)


def test_what_is_left_is_counted_on_other_tokens() -> None:
    x, y = data(300)
    other, theirs = data(200, seed=1)
    found = LinearMap.fitted(Moments.of(x, y), 5, ridge=0.1)
    left = found.left(Moments.of(other, theirs))
    for r in range(6):
        lost = (answers(found, other, r) - theirs.double()).square().sum()
        assert left[r] == pytest.approx((lost / theirs.double().square().sum()).item(), rel=1e-6)


def test_moments_add_up() -> None:
    x, y = data(90)
    whole, parts = Moments.of(x, y), Moments.of(x[:30], y[:30]) + Moments.of(x[30:], y[30:])
    torch.testing.assert_close(parts.xy, whole.xy)
    assert (parts.n, parts.yy) == (90, pytest.approx(whole.yy))


def test_unseen_tokens_choose_rank_and_ridge_and_all_of_them_fit() -> None:
    """60 tokens for a noisy map of rank 1 in 12 dimensions: more ranks would fit noise."""
    x, y = data(45, rank=1, noise=60.0)
    other, theirs = data(400, rank=1, noise=60.0, seed=1)
    seen, unseen = Moments.of(x, y), Moments.of(other, theirs)
    found = fit(seen, unseen, 8)
    curves = [LinearMap.fitted(seen, 8, ridge).left(unseen) for ridge in RIDGES]
    assert found.left.min() == min(curve.min() for curve in curves)
    assert found.rank == int(found.left.argmin()) < 8
    assert (found.left[found.rank :] == found.left[found.rank]).all()
    assert found.map is not None and len(found.map.down) == found.rank
    torch.testing.assert_close(found.map.c, torch.cat([y, theirs]).double().mean(0))


def test_an_expert_that_cannot_be_foretold_or_was_hardly_seen_is_dropped() -> None:
    g = torch.Generator().manual_seed(0)
    noise, more = (torch.randn(200, H, generator=g) for _ in range(2))
    x, _ = data(200)
    for seen, unseen in (
        (Moments.of(x, noise), Moments.of(x, more)),  # no relation
        (Moments.of(*data(200)), Moments.of(*data(5, seed=1))),  # nothing to decide by
        (Moments.of(*data(5)), Moments.of(*data(200, seed=1))),
        (Moments.of(x[:0], noise[:0]), Moments.of(x[:0], noise[:0])),
    ):
        found = fit(seen, unseen, 4)
        assert found.map is None and found.rank == 0 and (found.left == 1).all()


def test_large_layers_find_the_same_leading_ranks_by_iteration() -> None:
    g = torch.Generator().manual_seed(0)
    wide = 64
    x = torch.randn(600, wide, generator=g) * torch.logspace(-1, 0.5, wide)
    y = x @ torch.randn(wide, wide, generator=g) / 8 + torch.randn(600, wide, generator=g)
    found = LinearMap.fitted(Moments.of(x, y), 4, ridge=1e-12)  # 4 + 8 < 64 / 2
    exact = LinearMap.fitted(Moments.of(x, y), 30, ridge=1e-12)
    torch.testing.assert_close(answers(found, x, 4), answers(exact, x, 4), atol=2e-2, rtol=0)
