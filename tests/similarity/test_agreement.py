"""Stability: how much of a table is the text's and how much is chance."""

from __future__ import annotations

import torch

from sere.similarity.agreement import same_choice, same_nearest, stability
from sere.similarity.measures import METHODS, Measure, pooled

E, H = 12, 16


def folds(
    noise: float, *, tokens: int = 64, seed: int = 0, more_seed: int | None = None
) -> list[Measure]:
    """Eight parts of text; experts come in pairs, told apart the less the more noise there is.

    seed: of the experts; more_seed: of the text, if it is to be another one.
    """
    random = torch.Generator().manual_seed(seed)
    base = torch.randn(E // 2, H, generator=random).repeat_interleave(2, 0)
    base += 0.3 * torch.randn(E, H, generator=random)
    if more_seed is not None:
        random.manual_seed(more_seed)
    parts = [METHODS["frobenius"](E) for _ in range(8)]
    for part in parts:
        outputs = base[:, None, :] + noise * torch.randn(E, tokens, H, generator=random)
        part.update(outputs, torch.ones(tokens, E, dtype=torch.bool))
    return parts


def test_clear_experts_are_stable_and_noisy_ones_are_not() -> None:
    clear, vague, noise = (stability(folds(level)) for level in (0.1, 5.0, 100.0))
    assert clear is not None and vague is not None and noise is not None
    assert clear > 0.99 > vague > noise


def test_more_text_is_more_stable() -> None:
    few, many = stability(folds(3.0, tokens=4)), stability(folds(3.0, tokens=400))
    assert few is not None and many is not None and few < many - 0.05


def test_one_fold_tells_nothing() -> None:
    empty = METHODS["frobenius"](E)
    assert stability([folds(0.1)[0], empty]) is None
    assert stability([empty, empty]) is None


def test_stability_foretells_what_other_text_chooses() -> None:
    """The bootstrap's promise: close to the agreement of two calibrations on different text."""
    for level in (0.1, 1.0, 3.0):
        one, other = folds(level, seed=0), folds(level, seed=0, more_seed=1)
        foretold = stability(one)
        seen = same_choice(pooled(one).result(), pooled(other).result())
        assert foretold is not None and abs(foretold - seen) < 0.06


def test_agreement_is_of_the_lists_that_serving_walks() -> None:
    similarity = torch.eye(4)
    similarity[0, 1] = similarity[1, 0] = 0.9
    other = similarity.clone()
    other[2, 3] = other[3, 2] = 0.5
    assert same_nearest(similarity, similarity) == same_choice(similarity, similarity) == 1
    # ties go to the lowest id: 2 and 3 had 0 as nearest
    assert same_nearest(similarity, other) == 0.5
    assert same_nearest(torch.eye(1), torch.eye(1)) == same_choice(torch.eye(1), torch.eye(1)) == 1
