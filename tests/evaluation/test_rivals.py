"""The rivals' rules against plain loops over the papers' definitions, and against the models' own
routers."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sere.checkpoint import Fingerprint
from sere.evaluation.arms import Arm, parse_arm
from sere.evaluation.decoding import Passage, RouterOutput, router_logits
from sere.evaluation.quality import Judge, figures
from sere.evaluation.rivals import RULES, Rival, Routed
from sere.models.moe import LayerChange, MoELayer, moe_layers, routed
from sere.policy import PolicyError
from sere.results.journal import Journal
from sere.table import LayerStatistics, Table
from tests.tiny_models import tiny_inputs, tiny_model

E, K = 12, 3
REGIMES = ("softmax", "sigmoid", "biased", "empty slots", "one token", "one token, biased")
ONE_SLOT = ("softmax, one slot", "sigmoid, one slot")


def said(regime: str, seed: int = 0) -> tuple[RouterOutput, Tensor, Tensor]:
    """What a router of that kind says of a batch: for all experts, and its ids and weights."""
    random = torch.Generator().manual_seed(seed)
    T = 1 if "one token" in regime else 7
    logits = 2 * torch.randn(T, E, generator=random)
    biased = "biased" in regime
    bias = 0.5 * torch.randn(E, generator=random) * biased
    scores = logits.sigmoid() if biased or "sigmoid" in regime else logits.softmax(-1)
    ids = (scores + bias).topk(1 if "one slot" in regime else K).indices
    if biased:  # such routers do not sort their slots
        ids = ids.roll(1, dims=1)
    picked = scores.gather(1, ids)
    if regime == "empty slots":  # another's id, one that no expert has, a row without any
        picked[:5, -1] = 0
        ids[:2, -1], ids[2:4, -1] = ids[:2, 0], E
        picked[5] = 0
    if "one slot" in regime:  # never normalised: that would leave nothing of what was computed
        return RouterOutput("layer 3", logits, bias), ids, picked
    weights = 2.5 * picked / picked.sum(1, keepdim=True).clamp(min=1e-9)
    return RouterOutput("layer 3", logits, bias), ids, weights


def batch(regime: str, seed: int = 0) -> Routed:
    """As an evaluation makes it."""
    router, ids, weights = said(regime, seed)
    load = torch.rand(E, generator=torch.Generator().manual_seed(seed + 1))
    scores = router.scores(ids, weights)
    return Routed(ids, weights, router.logits, scores, router.ranks(scores, ids, weights), load)


def ranked(values: list[Any], among: set[int]) -> list[int]:
    """Largest first; ties: lowest expert."""
    return sorted(among, key=lambda e: (-values[e], e))


def by_hand(rival: Rival, regime: str, seed: int) -> list[dict[int, float]]:
    """For each token {expert: weight}, by the papers' own text."""
    router, ids_, weights_ = said(regime, seed)
    n: Any = rival.numbers
    logits, bias = router.logits.tolist(), router.bias.tolist()
    T, everyone = len(logits), set(range(E))
    own = [
        {e: w for e, w in zip(*row, strict=True) if w}
        for row in zip(ids_.tolist(), weights_.tolist(), strict=True)
    ]
    slots = [len(row) for row in own]
    if "sigmoid" in regime or "biased" in regime:
        p = [[1 / (1 + math.exp(-x)) for x in row] for row in logits]
    else:
        p = [[math.exp(x) / sum(map(math.exp, row)) for x in row] for row in logits]
    wish = [[x + b for x, b in zip(row, bias, strict=True)] for row in p]
    order = [ranked(row, everyone) for row in wish]

    def top(t: int, k: int) -> list[int]:
        return order[t][: min(k, slots[t])]

    used: list[list[int]]
    if rival.name == "top_k":
        used = [top(t, n["k"]) for t in range(T)]
    elif rival.name == "skip":
        used = [[e for e in row if row[e] >= n["beta"] * max(row.values())] for row in own]
    elif rival.name == "oea":
        base = {e for t in range(T) for e in top(t, n["k0"])}
        used = []
        for t in range(T):
            S_t = top(t, n["k0"])
            for e in order[t]:
                if len(S_t) < slots[t] and e in base and e not in S_t:
                    S_t.append(e)
            used.append(S_t)
    else:
        if rival.name == "xshare":
            kept = {e for t in range(T) for e in top(t, n.get("k0", 1))}
            U = [sum(p[t][e] for t in range(T)) for e in everyone]
            for e in ranked(U, everyone - kept):
                if len(kept) < n["budget"]:
                    kept.add(e)
        elif rival.name == "frequency":
            kept = set(ranked(batch(regime, seed).load.tolist(), everyone)[: n["budget"]])
        else:
            kept = set()
            q = [
                [min(max(math.ceil(n["alpha"] * (x - max(row))), -int(n["beta"])), 0) for x in row]
                for row in logits
            ]
            h = [[Fraction(T) ** x for x in row] for row in q]
            for t in range(T):
                common = [(sum(h[s][e] for s in range(T)) - h[t][e]) / T for e in everyone]
                kept |= set(ranked([q[t][e] + common[e] for e in everyone], everyone)[: slots[t]])
        used = [[e for e in order[t] if e in kept][: slots[t]] for t in range(T)]
    found = []
    for t, row in enumerate(used):
        mass, of = sum(own[t].values()), own[t] if rival.weights == "keep" else row
        found.append({e: mass * p[t][e] / sum(p[t][c] for c in of) for e in row})
    return found


RIVALS = [
    Rival("top_k", {"k": 1}),
    Rival("top_k", {"k": 2}),
    Rival("top_k", {"k": 2}, weights="keep"),
    Rival("skip", {"beta": 0.4}),
    Rival("skip", {"beta": 0.8}, weights="keep"),
    Rival("oea", {"k0": 1}),
    Rival("oea", {"k0": 2}),
    Rival("oea", {"k0": 1}, weights="keep"),
    Rival("xshare", {"budget": 5}),
    Rival("xshare", {"budget": 8, "k0": 2}),
    Rival("xshare", {"budget": 2, "k0": 2}),  # the warm-up is over the budget already
    Rival("lynx", {"alpha": 1.0, "beta": 1.0}),
    Rival("lynx", {"alpha": 2.0, "beta": 3.0}),
    Rival("frequency", {"budget": 5}),
    Rival("frequency", {"budget": 2}),
]


def shares(ids: Tensor, weights: Tensor) -> list[dict[int, float]]:
    """For each token {expert: weight}."""
    found: list[dict[int, float]] = [{} for _ in ids]
    for row, experts, parts in zip(found, ids.tolist(), weights.tolist(), strict=True):
        for expert, weight in zip(experts, parts, strict=True):
            if weight:
                row[expert] = row.get(expert, 0) + weight
    return found


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("rival", RIVALS, ids=str)
def test_rules_equal_their_definition(rival: Rival, regime: str, seed: int) -> None:
    found = shares(*rival.route(batch(regime, seed)))
    for mine, expected in zip(found, by_hand(rival, regime, seed), strict=True):
        assert mine == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("regime", ONE_SLOT)
def test_one_expert_per_token_tells_by_its_weight_how_it_is_scored(regime: str) -> None:
    """Its share of its token's weights is 1, whatever the router computes."""
    alone = [r for r in RIVALS if r.numbers.get("k", 1) == r.numbers.get("k0", 1) == 1]
    for rival in (*alone, Rival("frequency", {"budget": 5}, weights="keep")):
        found = shares(*rival.route(batch(regime)))
        assert found == [pytest.approx(row, abs=1e-5) for row in by_hand(rival, regime, 0)], rival


def test_every_rule_is_tested() -> None:
    assert set(RULES) == {rival.name for rival in RIVALS}


@pytest.mark.parametrize("regime", ["softmax", "biased", "one token"])
def test_free_slots_keep_no_expert_busy_and_name_none_twice(regime: str) -> None:
    for rival in RIVALS:
        b = batch(regime)
        ids, weights = rival.route(b)
        used = {e for row in shares(ids, weights) for e in row}
        for row, own in zip(ids.tolist(), b.ids.tolist(), strict=True):
            assert len(set(row)) == K
            assert row == own or len(used) < K or set(row) <= used


FULL = [
    Rival("top_k", {"k": K}),
    Rival("top_k", {"k": K}, weights="keep"),
    Rival("skip", {"beta": 0}),
    Rival("oea", {"k0": K}),
    Rival("xshare", {"budget": E}),
    Rival("xshare", {"budget": 1, "k0": K}),
    Rival("frequency", {"budget": E}),
]


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("rival", FULL, ids=str)
def test_a_full_budget_is_stock_to_the_bit(rival: Rival, regime: str) -> None:
    b = batch(regime)
    ids, weights = rival.route(b)
    assert torch.equal(ids, b.ids) and torch.equal(weights, b.weights)


def test_what_the_router_chose_wins_ties() -> None:
    """Which of equal experts a router takes is its own affair, and stock must stay stock."""
    logits = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0], [1.0] * 5])
    ids = torch.tensor([[3, 0], [4, 2]])
    picked = logits.softmax(-1).gather(1, ids)
    router = RouterOutput("layer", logits, torch.zeros(5))
    scores = router.scores(ids, picked)
    ranks = router.ranks(scores, ids, picked)
    assert ranks.tolist() == [[0, 2, 3, 1, 4], [2, 3, 0, 4, 1]]
    b = Routed(ids, picked, logits, scores, ranks, torch.ones(5))
    assert torch.equal(Rival("xshare", {"budget": 5}).route(b)[0], ids)


def test_one_token_alone_gets_no_more_than_its_warm_up() -> None:
    """What the memo of every method in the field says of batches of one."""
    b = batch("one token")
    best = b.ids[:, :1].tolist()
    for rival in (Rival("oea", {"k0": 1}), Rival("xshare", {"budget": 1})):
        assert [list(row) for row in shares(*rival.route(b))] == best
    tied = Rival("lynx", {"alpha": 1e-6, "beta": 1}).route(b)  # all experts share the best bin
    assert sorted(shares(*tied)[0]) == [0, 1, 2]


def test_a_row_keeps_its_sum_of_weights_unless_told_to_keep_weights() -> None:
    b = batch("softmax")
    for rival in (Rival("oea", {"k0": 1}), Rival("top_k", {"k": 1})):
        assert torch.allclose(rival.route(b)[1].sum(1), torch.full((7,), 2.5))
    kept = shares(*Rival("top_k", {"k": 2}, weights="keep").route(b))
    assert kept == [
        pytest.approx(dict(zip(*row, strict=True)))
        for row in zip(b.ids[:, :2].tolist(), b.weights[:, :2].tolist(), strict=True)
    ]


def test_an_expert_whose_score_is_below_float32_still_answers() -> None:
    """A softmax rounds it to 0, and a token may be left with no other."""
    logits = torch.tensor([[0.0, -1.0, -200.0]])
    ids = torch.tensor([[0, 1]])
    weights = logits.softmax(-1).gather(1, ids)
    router = RouterOutput("layer", logits, torch.zeros(3))
    scores = router.scores(ids, weights)
    ranks = router.ranks(scores, ids, weights)
    b = Routed(ids, weights, logits, scores, ranks, load=torch.tensor([0.0, 0.0, 1.0]))
    assert shares(*Rival("frequency", {"budget": 1}).route(b)) == [{2: pytest.approx(1)}]


# --- routers of real models ---------------------------------------------------------------------


def sharp(architecture: str, **other: Any) -> nn.Module:
    """A tiny model whose routers prefer experts clearly, by biases where it has some."""
    model: nn.Module = tiny_model(architecture)
    random = torch.Generator().manual_seed(5)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith("bias") and tensor.numel() == 6:
            tensor.data.copy_(0.3 * torch.randn(tensor.shape, generator=random))
    for router in routers(model):
        router.weight.data.mul_(5)
        for attribute, value in other.items():
            setattr(router, attribute, value)
    return model


GROUPED = {"num_group": 3, "topk_group": 2, "topk_method": "group_limited_greedy"}


def routers(model: nn.Module) -> list[Any]:
    return [m for n, m in model.named_modules() if n.endswith((".gate", ".router"))]


def table_for(model: nn.Module) -> Table:
    """The last experts were the most popular in its calibration."""
    random = torch.Generator().manual_seed(0)
    E = moe_layers(model)[0].E
    load = torch.arange(float(E)) / sum(range(E))
    similarity = torch.rand(E, E, generator=random)
    similarity = ((similarity + similarity.T) / 2).fill_diagonal_(1)
    known = LayerStatistics.without_text(similarity)
    layers = {
        layer.index: LayerStatistics(**{**vars(known), "load": load, "tokens": 9})
        for layer in moe_layers(model)
    }
    print_ = Fingerprint(
        type(model).__name__,
        E=E,
        K=2,
        layers=tuple(layers),
        router_hash="a" * 64,
        experts_hash="b" * 64,
    )
    return Table(print_, layers, "frobenius", {})


def under(model: nn.Module, rule: str, architecture: str) -> Tensor:
    """The model's logits if every token of a forward pass is decoded in one batch."""
    layers, arm = moe_layers(model), parse_arm(rule, table_for(model))
    inputs = tiny_inputs(architecture)

    def all_rows(seen: dict[int, RouterOutput]) -> LayerChange:
        def change(
            layer: MoELayer, _hidden: Tensor, ids: Tensor, weights: Tensor
        ) -> tuple[Tensor, Tensor]:
            return arm.route(layer, ids, weights, seen[layer.index])

        return change

    with torch.no_grad(), router_logits(model, layers) as seen, routed(layers, all_rows(seen)):
        logits: Tensor = model(**inputs).logits
    return logits


def own(model: nn.Module, architecture: str) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(**tiny_inputs(architecture)).logits
    return logits


@pytest.mark.parametrize(
    ("architecture", "weights"),
    [
        ("mixtral", "renormalise"),
        ("deepseek_v3", "renormalise"),  # sigmoid and bias
        ("ernie4_5_moe", "renormalise"),  # softmax and bias, in a module of its own
        ("minimax_m2", "renormalise"),  # the block around the router has the bias
        ("qwen3_moe", "keep"),  # a configuration that does not normalise
        ("deepseek_v3 grouped", "renormalise"),  # by the two best of a group
        ("deepseek_v2 grouped", "keep"),  # by the best of a group
    ],
)
def test_fewer_experts_a_token_are_those_the_router_itself_would_choose(
    architecture: str, weights: str
) -> None:
    rule = json.dumps({"rival": "top_k", "k": 1, "weights": weights})
    architecture, *limits = architecture.split()
    more: dict[str, Any] = GROUPED if limits else {}
    stock = sharp(architecture, **more)
    found = under(stock, rule, architecture)
    assert torch.allclose(found, own(sharp(architecture, top_k=1, **more), architecture), atol=1e-4)
    assert not torch.allclose(found, own(stock, architecture), atol=1e-2)


def test_masked_experts_are_masked_for_the_router_with_its_bias() -> None:
    pruned = sharp("deepseek_v3")
    for router in routers(pruned):
        router.e_score_correction_bias[:3] = -1e3
    found = under(sharp("deepseek_v3"), '{"rival": "frequency", "budget": 3}', "deepseek_v3")
    assert torch.allclose(found, own(pruned, "deepseek_v3"), atol=1e-4)
    assert not torch.allclose(found, own(sharp("deepseek_v3"), "deepseek_v3"), atol=1e-2)


@pytest.mark.parametrize("architecture", ["qwen3_moe", "deepseek_v3", "ernie4_5_moe"])
def test_all_rivals_are_judged(architecture: str, tmp_path: Path) -> None:
    model = sharp(architecture)
    table = table_for(model)
    some = [
        Rival("top_k", {"k": 1}),
        Rival("top_k", {"k": 1}, weights="keep"),
        Rival("skip", {"beta": 1}),
        Rival("oea", {"k0": 1}),
        Rival("xshare", {"budget": 2}),
        Rival("lynx", {"alpha": 0.5, "beta": 1}),
        Rival("frequency", {"budget": 2}),
    ]
    full = [
        Rival("top_k", {"k": 2}),
        Rival("skip", {"beta": 0}),
        Rival("oea", {"k0": 2}),
        Rival("xshare", {"budget": table.fingerprint.E}),
        Rival("frequency", {"budget": table.fingerprint.E}),
    ]
    arms = [Arm("stock", None, table), *(Arm(str(r), r, table) for r in (*some, *full))]
    random = torch.Generator().manual_seed(2)
    rows = torch.randint(3, 97, (8, 9), generator=random).tolist()
    passages = [Passage(tokens, 2 + i % 3) for i, tokens in enumerate(rows)]
    with Journal(tmp_path / "journal", {}) as journal:
        sums = Judge(model, moe_layers(model), passages, journal).measure(arms, [1, 4])
    stock = figures(sums["stock"][4])
    for rival in some:
        judged = figures(sums[str(rival)][4])
        assert judged["active"][0] < stock["active"][0], rival
        assert 0 < judged["kl"][0] < math.inf, rival
    for rival in full:
        for b in (1, 4):
            assert figures(sums[str(rival)][b]) == figures(sums["stock"][b]), rival


def full_size(version: int, T: int) -> tuple[RouterOutput, Tensor, Tensor, list[set[int]]]:
    """DeepSeek-V2's or V3's router at its real size, and each token's experts within its groups, by
    the papers' own text."""
    E, K, groups, allowed = (160, 6, 8, 3) if version == 2 else (256, 8, 8, 4)
    random = torch.Generator().manual_seed(version)
    logits = 2 * torch.randn(T, E, generator=random)
    bias = 0.3 * torch.randn(E, generator=random) * (version == 3)
    scores = logits.softmax(-1) if version == 2 else logits.sigmoid()
    size, ids, inside = E // groups, [], []
    for row in (scores + bias).tolist():
        parts = [row[g * size : (g + 1) * size] for g in range(groups)]
        worth = [sum(sorted(part)[-(1 if version == 2 else 2) :]) for part in parts]
        best = sorted(range(groups), key=lambda g: -worth[g])[:allowed]
        inside.append({e for g in best for e in range(g * size, (g + 1) * size)})
        ids.append(ranked(row, inside[-1])[:K])
    chosen = torch.tensor(ids)
    weights = 16 * scores.gather(1, chosen)
    if version == 3:
        weights = weights / weights.sum(1, keepdim=True)
    return RouterOutput("layer 3", logits, bias, groups, allowed), chosen, weights, inside


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("T", [1, 32])
def test_group_limited_routers_at_their_real_size(version: int, T: int) -> None:
    """Within its groups every rival does to a token what its paper says, and gives it no other."""
    router, ids, weights, inside = full_size(version, T)
    within, scores = router.limited(router.scores(ids, weights), ids, weights)
    ranks = within.ranks(scores, ids, weights)
    b = Routed(ids, weights, within.logits, scores, ranks, torch.ones(scores.shape[1]))
    K, wish = ids.shape[1], (scores + router.bias).tolist()
    first = [ranked(row, own)[:2] for row, own in zip(wish, inside, strict=True)]
    loaded = {e for row in first for e in row}
    expected = [
        {*row, *ranked(w, (loaded & own) - {*row})[: K - 2]}
        for row, w, own in zip(first, wish, inside, strict=True)
    ]
    assert [{*row} for row in shares(*Rival("oea", {"k0": 2}).route(b))] == expected
    full = Rival("xshare", {"budget": scores.shape[1]}).route(b)
    assert torch.equal(full[0], ids) and torch.equal(full[1], weights)
    for rival in (Rival("xshare", {"budget": 20}), Rival("lynx", {"alpha": 0.5, "beta": 1})):
        for row, own in zip(shares(*rival.route(b)), inside, strict=True):
            assert {*row} <= own
    with pytest.raises(ValueError, match=r"chooses among . groups of 8, and not those"):
        router.limited(scores, ids.roll(77) * 0 + torch.arange(K) * (len(wish[0]) // K), weights)


# --- what is refused ----------------------------------------------------------------------------


def test_a_choice_by_something_else_than_the_scores_is_refused() -> None:
    router, ids, weights = said("biased")
    scores = router.scores(ids, weights)
    blind = RouterOutput("layer 3", router.logits, torch.zeros(E))
    with pytest.raises(ValueError, match=r"layer 3: .* passed over \d+"):
        blind.ranks(scores, ids, weights)
    with pytest.raises(ValueError, match="passed over"):
        router.ranks(scores, ids.flip(0), weights)


def test_weights_that_the_scores_do_not_explain_are_refused() -> None:
    router, ids, weights = said("softmax")
    with pytest.raises(ValueError, match=r"layer 3: .* in proportion to"):
        router.scores(ids, weights.flip(1))
    for regime in ONE_SLOT:
        router, ids, weights = said(regime)
        with pytest.raises(ValueError, match="that are, with one expert per token, the softmax or"):
            router.scores(ids, weights / weights)
    router, ids, weights = said("softmax")
    rounded = RouterOutput("", router.logits.bfloat16(), router.bias)
    assert torch.allclose(
        rounded.scores(ids, weights.bfloat16()), router.scores(ids, weights), atol=0.02
    )


@pytest.mark.parametrize(
    ("architecture", "other", "complaint"),
    [
        ("phimoe", {}, "in proportion to"),
        ("zaya", {}, "has not said anything"),
        ("llama4", {}, "no router beside it"),
    ],
)
def test_routers_that_no_rival_has_a_rule_for_are_refused(
    architecture: str, other: dict[str, int], complaint: str
) -> None:
    model = tiny_model(architecture)
    for router in routers(model):
        for attribute, value in other.items():
            setattr(router, attribute, value)
    with pytest.raises(ValueError, match=complaint):
        under(model, '{"rival": "oea", "k0": 1}', architecture)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"rival": "ooe"}, "expected one of top_k"),
        ({"rival": "oea"}, "needs k0"),
        ({"rival": "oea", "k": 1}, "unknown key 'k'; did you mean 'k0'"),
        ({"rival": "oea", "k0": 1, "weight": "keep"}, "did you mean 'weights'"),
        ({"rival": "oea", "k0": 1, "weights": "scale"}, "expected one of renormalise, keep"),
        ({"rival": "oea", "k0": 0}, "k0=0: expected a whole number >= 1"),
        ({"rival": "top_k", "k": 1.5}, "k=1.5: expected a whole number >= 1"),
        ({"rival": "top_k", "k": True}, "k=True: expected a whole number"),
        ({"rival": "xshare", "budget": 0}, "budget=0: expected a whole number >= 1"),
        ({"rival": "xshare", "budget": 4, "k0": "1"}, "k0='1': expected"),
        ({"rival": "skip", "beta": 1.5}, "beta=1.5: expected a share"),
        ({"rival": "skip", "beta": math.nan}, "beta=nan: expected a share"),
        ({"rival": "lynx", "alpha": 0, "beta": 1}, "alpha=0: expected a number > 0"),
    ],
)
def test_what_nobody_would_read_is_refused(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(PolicyError, match=complaint):
        Rival.from_dict(settings)


@pytest.mark.parametrize(
    ("rule", "complaint"),
    [
        ('{"rival": "top_k", "k": 3}', "k=3: expected at most the model's K=2"),
        ('{"rival": "oea", "k0": 3}', "k0=3: expected at most the model's K=2"),
        ('{"rival": "xshare", "budget": 9}', "budget=9: expected at most the model's E=8"),
    ],
)
def test_more_than_the_model_has_is_refused(table: Table, rule: str, complaint: str) -> None:
    with pytest.raises(PolicyError, match=complaint):
        parse_arm(rule, table)


def test_more_than_the_router_gives_is_refused_without_a_table() -> None:
    with pytest.raises(PolicyError, match="k=4: expected at most the model's K=3"):
        Rival("top_k", {"k": 4}).route(batch("softmax"))


def test_a_table_without_text_names_no_popular_experts() -> None:
    b = batch("softmax")
    unknown = Routed(b.ids, b.weights, b.logits, b.scores, b.ranks, torch.zeros(E))
    with pytest.raises(PolicyError, match="calibrated on text"):
        Rival("frequency", {"budget": 5}).route(unknown)


def test_names_tell_rivals_apart() -> None:
    one, same = Rival("oea", {"k0": 1}), Rival.from_dict({"rival": "oea", "k0": 1})
    keep = Rival.from_dict({"rival": "oea", "k0": 1, "weights": "keep"})
    assert str(one) == "oea k0=1" and str(keep) == "oea k0=1 weights=keep"
    assert len({one, same, keep}) == 2


@pytest.mark.parametrize("rival", RIVALS, ids=str)
def test_round_trip_keeps_every_setting(rival: Rival) -> None:
    settings = json.loads(json.dumps(rival.to_dict()))
    assert Rival.from_dict(settings) == rival
    assert rival.weights == settings.get("weights", "renormalise")
