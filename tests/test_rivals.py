"""The rivals' rules against plain loops over the papers' definitions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from sere.policy import PolicyError
from sere.rivals import RULES, Rival, Routed

T, E, K = 7, 12, 3


def batch(seed: int = 0) -> Routed:
    logits = 2 * torch.randn(T, E, generator=torch.Generator().manual_seed(seed))
    scores = logits.softmax(-1)
    picked, ids = scores.topk(K)
    load = torch.rand(E, generator=torch.Generator().manual_seed(seed + 1))
    return Routed(ids, picked / picked.sum(1, keepdim=True), logits, scores, load)


def ranked(row: list[float], among: set[int]) -> list[int]:
    return sorted(among, key=lambda e: -row[e])


def by_hand(rival: str, b: Routed, **n: Any) -> list[dict[int, float]]:
    """For each token {expert: weight}."""
    p, ids = b.scores.tolist(), b.ids.tolist()
    everyone = set(range(E))
    chosen: list[list[int]]
    if rival == "top_k":
        chosen = [row[: n["k"]] for row in ids]
    elif rival == "skip":
        chosen = [
            [e for e in row if p[t][e] >= n["beta"] * p[t][row[0]]] for t, row in enumerate(ids)
        ]
    elif rival == "oea":
        base = {e for row in ids for e in row[: n["k0"]]}
        chosen = []
        for t, row in enumerate(ids):
            own = list(row[: n["k0"]])
            own += [e for e in ranked(p[t], everyone) if e in base and e not in own][: K - len(own)]
            chosen.append(own)
    else:
        if rival == "xshare":
            kept = {e for row in ids for e in row[:1]}
            utility = [sum(p[t][e] for t in range(T)) for e in everyone]
            for e in ranked(utility, everyone - kept):
                if len(kept) < n["budget"]:
                    kept.add(e)
        elif rival == "frequency":
            kept = set(ranked(b.load.tolist(), everyone)[: n["budget"]])
        else:
            logits = b.logits.tolist()
            q = [
                [min(max(math.ceil(n["alpha"] * (x - max(row))), -n["beta"]), 0) for x in row]
                for row in logits
            ]
            h = [[float(T) ** x for x in row] for row in q]
            kept = set()
            for t in range(T):
                common = [(sum(h[s][e] for s in range(T)) - h[t][e]) / T for e in everyone]
                kept |= set(ranked([q[t][e] + common[e] for e in everyone], everyone)[:K])
        chosen = [ranked(p[t], kept)[:K] for t in range(T)]
    return [{e: p[t][e] / sum(p[t][c] for c in row) for e in row} for t, row in enumerate(chosen)]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "rival",
    [
        Rival("top_k", {"k": 2}),
        Rival("skip", {"beta": 0.4}),
        Rival("oea", {"k0": 1}),
        Rival("oea", {"k0": 2}),
        Rival("xshare", {"budget": 5}),
        Rival("lynx", {"alpha": 1.0, "beta": 1.0}),
        Rival("lynx", {"alpha": 2.0, "beta": 3.0}),
        Rival("frequency", {"budget": 5}),
    ],
    ids=str,
)
def test_rules_equal_their_definition(rival: Rival, seed: int) -> None:
    b = batch(seed)
    ids, weights = rival.route(b)
    expected = by_hand(rival.name, b, **rival.numbers)
    for t in range(T):
        found: dict[int, float] = {}
        for e, w in zip(ids[t].tolist(), weights[t].tolist(), strict=True):
            if w:
                found[e] = found.get(e, 0) + w
        assert found == pytest.approx(expected[t], abs=1e-6)
        assert set(ids[t].tolist()) == set(found)  # free slots keep no expert busy


def test_every_rule_is_tested() -> None:
    assert set(RULES) == {"top_k", "skip", "oea", "xshare", "lynx", "frequency"}


def test_a_row_keeps_its_sum_of_weights() -> None:
    """Routers that multiply by a constant, or do not normalise."""
    b = batch()
    raw = Routed(b.ids, b.weights * 2.5, b.logits, b.scores, b.load)
    for rival in (Rival("oea", {"k0": 1}), Rival("top_k", {"k": 1})):
        assert torch.allclose(rival.route(raw)[1].sum(1), torch.full((T,), 2.5))


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"rival": "ooe"}, "expected one of top_k"),
        ({"rival": "oea"}, "needs k0"),
        ({"rival": "oea", "k": 1}, "unknown key 'k'; did you mean 'k0'"),
    ],
)
def test_what_nobody_would_read_is_refused(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(PolicyError, match=complaint):
        Rival.from_dict(settings)
