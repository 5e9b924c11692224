"""What maps are asked for: the router's weight of every slot whose expert is not read."""

from __future__ import annotations

import pytest
import torch

from sere.kernels import Plan, RowClass, freed_weights, keeping, reroute
from sere.kernels.plan import Substitution
from sere.policy import Policy

E, K, T = 16, 4, 12


def plan(**settings: object) -> Plan:
    policy = Policy(fill="linear", min_active=1, **settings)  # type: ignore[arg-type]
    after = (torch.arange(E)[None, :] - torch.arange(E)[:, None]) % E
    lost = torch.linspace(0.1, 1, E)[:, None].expand(E, E)
    return Plan.build(
        (E - after).double(), policy, K=K, substitution=Substitution(lost, torch.zeros(E, E))
    )


@pytest.mark.parametrize("settings", [{"S": 1}, {"S": 2}, {"S": 1, "tau": 0.02}, {"S": K}])
@pytest.mark.parametrize("seed", range(4))
def test_every_slot_is_answered_by_its_expert_or_by_its_map(
    settings: dict[str, float], seed: int
) -> None:
    """Each row's weight is whole: what is freed, and what its own experts carry on."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(E, generator=g)[:K] for _ in range(T)]).int()
    weights = torch.rand(T, K, generator=g) + 0.01
    weights[0, 1] = 0  # an empty slot is nobody's
    ids[1, 2] = -1  # padding
    rows = torch.full((T,), int(RowClass.FAST), dtype=torch.int8)
    rows[2], rows[3], rows[4] = RowClass.EXACT, RowClass.VOID, keeping(2)
    new_ids, new_weights = reroute(ids, weights, plan(**settings), rows)
    freed = freed_weights(ids, weights, new_ids, rows)
    read = torch.unique(new_ids[(new_weights != 0) & (rows != RowClass.VOID)[:, None]])
    for t in range(T):
        carried = dict.fromkeys(range(E), 0.0)
        for expert, weight in zip(new_ids[t].tolist(), new_weights[t].tolist(), strict=True):
            if expert >= 0:
                carried[expert] += weight
        for k, expert in enumerate(ids[t].tolist()):
            whole = weights[t, k].item()
            if expert < 0 or rows[t] == RowClass.VOID or whole == 0:
                assert freed[t, k] == 0
            elif freed[t, k] == 0:
                assert carried[expert] == pytest.approx(whole)
            else:
                assert freed[t, k] == weights[t, k] and carried[expert] == 0
                assert expert not in read or settings["S"] == 1
    assert not freed[2].any()  # an exact row is stock's
    if settings["S"] == K:
        assert not freed.any()
    else:
        assert freed.any()


def test_what_a_map_leaves_decides_what_tau_loads() -> None:
    """Whatever else is loaded: expert 1's map leaves little, expert 9's much."""
    others = [[3, 4, 5, 6], [4, 3, 5, 6]]  # so that there are four to name
    ids = torch.tensor([[0, 1, 9, 2]] * 2 + others, dtype=torch.int32)
    weights = torch.tensor([[0.4, 0.2, 0.2, 0.2]] * 2 + [[0.97, 0.01, 0.01, 0.01]] * 2)
    lost = torch.full((E,), 0.9)
    lost[1] = 0.1
    lost[2] = 0.3
    after = (torch.arange(E)[None, :] - torch.arange(E)[:, None]) % E
    policy = Policy(S=1, min_active=1, fill="linear", tau=0.02)  # 0.2^2 times 0.5
    built = Plan.build(
        (E - after).double(),
        policy,
        K=K,
        substitution=Substitution(lost[:, None].expand(E, E), torch.zeros(E, E)),
    )
    new_ids, new_weights = reroute(ids, weights, built)
    freed = freed_weights(ids, weights, new_ids)
    assert freed[:2].tolist() == [[0, pytest.approx(0.2), 0, pytest.approx(0.2)]] * 2
    kept = {e: w for e, w in zip(new_ids[0].tolist(), new_weights[0].tolist(), strict=True) if w}
    assert kept == {0: pytest.approx(0.4), 9: pytest.approx(0.2)}
