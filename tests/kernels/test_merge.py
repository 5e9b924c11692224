"""Merging duplicates keeps every row's mixture."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sere.kernels.merge import merge_duplicates, narrow

IDS = torch.tensor([[3, 5, 3, 3], [1, 2, 2, 1], [0, 1, 2, -1], [4, 4, 4, 4]], dtype=torch.int32)
WEIGHTS = torch.tensor([[4.0, 2, 1, 1], [4, 2, 1, 1], [4, 2, 1, 9], [1, 1, 1, 1]]) / 8


def mixtures(ids: Tensor, weights: Tensor) -> Tensor:
    """Every row's weight by expert: [T, E]."""
    dense = torch.zeros(len(ids), 16, dtype=torch.float64)
    for t, k in torch.cartesian_prod(torch.arange(len(ids)), torch.arange(ids.shape[1])).tolist():
        if ids[t, k] >= 0:
            dense[t, ids[t, k]] += weights[t, k]
    return dense


def test_duplicates_fold_into_the_first_slot() -> None:
    ids, weights = merge_duplicates(IDS, WEIGHTS)
    assert ids.tolist() == [[3, 5, -1, -1], [1, 2, -1, -1], [0, 1, 2, -1], [4, -1, -1, -1]]
    assert (8 * weights).tolist() == [[6, 2, 0, 0], [5, 3, 0, 0], [4, 2, 1, 9], [4, 0, 0, 0]]


def test_narrow_is_as_wide_as_the_widest_row_and_names_no_skipped_slot() -> None:
    ids, weights = narrow(IDS[[0, 1, 3]], WEIGHTS[[0, 1, 3]])
    assert ids.tolist() == [[3, 5], [1, 2], [4, 4]]
    assert (8 * weights).tolist() == [[6, 2], [5, 3], [4, 0]]


@pytest.mark.parametrize("K", [1, 4, 8])
@pytest.mark.parametrize("T", [0, 1, 33])
def test_mixtures_stay(T: int, K: int) -> None:
    g = torch.Generator().manual_seed(T + K)
    ids = torch.randint(0, 6, (T, K), generator=g)
    weights = torch.rand(T, K, generator=g)
    kept = ids.clone(), weights.clone()
    for merge in (merge_duplicates, narrow):
        new_ids, new_weights = merge(ids, weights)
        assert new_ids.dtype == ids.dtype and new_weights.dtype == weights.dtype
        assert torch.allclose(mixtures(new_ids, new_weights), mixtures(ids, weights))
    assert torch.equal(ids, kept[0]) and torch.equal(weights, kept[1])


def test_distinct_experts_stay_as_they_are() -> None:
    ids = torch.rand(9, 16).argsort(1)[:, :4]
    weights = torch.rand(9, 4)
    assert all(map(torch.equal, merge_duplicates(ids, weights), (ids, weights)))
    assert all(map(torch.equal, narrow(ids, weights), (ids, weights)))
