"""Every measure against a plain pairwise float64 definition, and the properties users rely on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sere.similarity.measures import CKA_CHUNK, METHODS, Directed, Frobenius, pooled


def samples(E: int = 5, n: int = 96, H: int = 12, seed: int = 0) -> Tensor:
    """Outputs [E, n, H] that share a part, so that similarities spread over (0, 1)."""
    random = torch.Generator().manual_seed(seed)
    shared = torch.randn(1, n, H, generator=random)
    mix = torch.linspace(-0.3, 1, E)[:, None, None]
    own = torch.randn(E, n, H, generator=random)
    return mix * shared + 0.7 * own * torch.linspace(0.5, 2, E)[:, None, None]


def sent(outputs: Tensor, seed: int = 0) -> Tensor:
    """[n, E]: a router's choice of 2 experts a token; the last gets more than the others."""
    E, n, _ = outputs.shape
    scores = torch.rand(n, E, generator=torch.Generator().manual_seed(seed))
    scores[:, -1] += 0.3
    return torch.zeros(n, E, dtype=torch.bool).scatter_(1, scores.topk(2).indices, True)


def measured(method: str, outputs: Tensor, chunk: int | None = None) -> Tensor:
    measure, chosen = METHODS[method](outputs.shape[0]), sent(outputs)
    step = chunk or outputs.shape[1]
    for part, picks in zip(outputs.split(step, dim=1), chosen.split(step), strict=True):
        measure.update(part, picks)
    return measure.result()


# The definitions, one pair at a time.


def pairwise(outputs: Tensor, similarity: Callable[[Tensor, Tensor], float]) -> Tensor:
    experts = list(outputs.double())
    return torch.tensor([[similarity(u, v) for v in experts] for u in experts]).clamp(0, 1)


def frobenius_by_hand(outputs: Tensor) -> Tensor:
    experts = outputs.double()
    largest = max(torch.linalg.norm(u - v).item() for u in experts for v in experts)
    return pairwise(outputs, lambda u, v: 1 - torch.linalg.norm(u - v).item() / largest)


def cosine_by_hand(outputs: Tensor) -> Tensor:
    def mean_cosine(u: Tensor, v: Tensor) -> float:
        cosines = [(x @ y / (x.norm() * y.norm())).item() for x, y in zip(u, v, strict=True)]
        return (sum(cosines) / len(cosines) + 1) / 2

    return pairwise(outputs, mean_cosine)


def directed_by_hand(outputs: Tensor) -> Tensor:
    """The relative error of v on the tokens sent to u, token by token."""
    chosen, experts = sent(outputs), outputs.double()
    similarity = torch.zeros(len(experts), len(experts), dtype=torch.float64)
    for u, mine in enumerate(experts):
        tokens = chosen[:, u].nonzero()[:, 0].tolist()
        own = sum((mine[t] ** 2).sum().item() for t in tokens)
        for v, other in enumerate(experts):
            error = sum(((mine[t] - other[t]) ** 2).sum().item() for t in tokens)
            similarity[u, v] = 1 / (1 + (error / own) ** 0.5)
    return similarity


def cka_by_hand(outputs: Tensor, kernel: Callable[[Tensor], Tensor]) -> Tensor:
    """HSIC_1 written with matrices of ones, as in Song et al. (2012), eq. 4."""

    def hsic(x: Tensor, y: Tensor) -> float:
        n = len(x)
        k, m = kernel(x).fill_diagonal_(0), kernel(y).fill_diagonal_(0)
        one = torch.ones(n, 1, dtype=torch.float64)
        trace = torch.trace(k @ m)
        product = (one.T @ k @ one) * (one.T @ m @ one) / ((n - 1) * (n - 2))
        cross = 2 / (n - 2) * (one.T @ k @ m @ one)
        return ((trace + product - cross) / (n * (n - 3))).item()

    def cka(u: Tensor, v: Tensor) -> float:
        return hsic(u, v) / (hsic(u, u) * hsic(v, v)) ** 0.5

    return pairwise(outputs, cka)


def linear(x: Tensor) -> Tensor:
    return torch.stack([(a * x).sum(-1) for a in x])


def rbf(x: Tensor) -> Tensor:
    square = torch.stack([((a - x) ** 2).sum(-1) for a in x])
    return torch.exp(-square / (2 * square.median()))


def polynomial(x: Tensor) -> Tensor:
    return (1 + linear(x) / (x**2).sum(-1).mean()) ** 3


BY_HAND: dict[str, Callable[[Tensor], Tensor]] = {
    "frobenius": frobenius_by_hand,
    "cosine": cosine_by_hand,
    "directed": directed_by_hand,
    "cka-linear": lambda outputs: cka_by_hand(outputs, linear),
    "cka-rbf": lambda outputs: cka_by_hand(outputs, rbf),
    "cka-polynomial": lambda outputs: cka_by_hand(outputs, polynomial),
}


@pytest.mark.parametrize("method", METHODS)
def test_equals_the_definition(method: str) -> None:
    result, expected = measured(method, samples()), BY_HAND[method](samples()).float()
    assert expected.fill_diagonal_(0).unique().numel() > 5  # there is something to get wrong
    torch.testing.assert_close(result.clone().fill_diagonal_(0), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_in_unit_range_with_unit_diagonal_and_symmetric_unless_directed(method: str) -> None:
    outputs = samples()
    outputs[1] = -outputs[4]  # the raw cosine is -1
    result = measured(method, outputs)
    assert result.dtype == torch.float32
    assert torch.equal(result, result.T) is (method != "directed")
    assert torch.equal(result.diagonal(), torch.ones(5))
    assert result.min() >= 0
    assert result.max() <= 1


@pytest.mark.parametrize("method", ["frobenius", "cosine", "directed"])
def test_chunks_make_no_difference(method: str) -> None:
    whole = measured(method, samples())
    for chunk in (1, 7, 50):
        torch.testing.assert_close(measured(method, samples(), chunk), whole, atol=1e-6, rtol=0)


def test_cka_averages_over_its_own_chunks_however_tokens_arrive() -> None:
    outputs = samples(n=3 * CKA_CHUNK)
    whole = measured("cka-linear", outputs)
    assert torch.equal(measured("cka-linear", outputs, CKA_CHUNK), whole)
    assert not torch.equal(measured("cka-linear", outputs[:, :CKA_CHUNK]), whole)


@pytest.mark.parametrize("method", METHODS)
def test_identical_experts_are_one(method: str) -> None:
    outputs = samples()
    outputs[3] = outputs[1]
    result = measured(method, outputs)
    assert result[1, 3] == pytest.approx(1, abs=1e-6)
    assert result[1, 2] < 0.99


def test_frobenius_sees_the_scale_and_is_set_by_the_farthest_pair() -> None:
    outputs = samples()
    base = measured("frobenius", outputs)
    torch.testing.assert_close(measured("frobenius", 100 * outputs), base)  # all alike: no change
    outputs[0] *= 50  # one outlier: the others close up
    shifted = measured("frobenius", outputs)
    assert shifted[0, 1:].min() == 0
    assert shifted[1:, 1:].min() > 0.9 > base[1:, 1:].min()


def test_cosine_is_blind_to_positive_scale_and_sees_the_sign() -> None:
    outputs = samples()
    scale = torch.rand(5, 96, 1, generator=torch.Generator().manual_seed(1)) + 0.1
    base = measured("cosine", outputs)
    torch.testing.assert_close(measured("cosine", scale * outputs), base, atol=1e-6, rtol=0)
    outputs[2] *= -1
    torch.testing.assert_close(measured("cosine", outputs)[2, 4], 1 - base[2, 4])


def test_cka_of_independent_outputs_is_near_zero() -> None:
    """The plain estimate is about H / (n + H), here one half."""
    n = H = 96
    x, y = torch.randn(2, n, H, generator=torch.Generator().manual_seed(0)).double()
    a, b = x - x.mean(0), y - y.mean(0)
    plain = (a.T @ b).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm())
    assert plain == pytest.approx(0.5, abs=0.05)
    assert measured("cka-linear", torch.stack([x, y]).float())[0, 1] < 0.03


def test_cka_is_blind_to_rotation_and_sign() -> None:
    outputs = samples()
    rotation, _ = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(3)))
    turned = outputs.clone()
    turned[1], turned[2] = outputs[1] @ rotation, -outputs[2]
    for method in ("cka-linear", "cka-rbf"):
        torch.testing.assert_close(
            measured(method, turned), measured(method, outputs), atol=1e-5, rtol=0
        )
    assert not torch.allclose(measured("cosine", turned), measured("cosine", outputs), atol=0.01)


def test_nearly_identical_experts_are_still_ranked() -> None:
    """Distances of 1e-4 and 2e-4 of the norm vanish in a float32 Gram matrix."""
    random = torch.Generator().manual_seed(0)
    base, a, b, far = torch.randn(4, 400, 64, generator=random)
    outputs = torch.stack([base, base + 1e-4 * a, base + 2e-4 * b, far])
    flat = outputs.flatten(1)
    gram = flat @ flat.T
    square = gram.diagonal()
    lost = (square[:, None] + square - 2 * gram).clamp(min=0).sqrt()[0, 1:3]
    assert (lost[1] / lost[0] - 2).abs() > 0.1  # so float32 would not do
    distance = 1 - measured("frobenius", outputs, 100).double()
    assert 0 < distance[0, 1] < distance[0, 2]
    assert distance[0, 2] / distance[0, 1] == pytest.approx(2, rel=0.05)


def test_gram_is_the_mean_inner_product() -> None:
    outputs = samples()
    gram = Frobenius(5)
    for part in outputs.split(40, dim=1):
        gram.update(part, sent(part))
    expected = [[(u * v).sum(-1).mean().item() for v in outputs] for u in outputs]
    torch.testing.assert_close(gram.gram(), torch.tensor(expected), atol=1e-4, rtol=1e-4)


def test_the_directed_gram_is_of_the_tokens_that_the_router_sends() -> None:
    outputs, chosen = samples(), sent(samples())
    chosen[:, 3] = False  # nobody asks for expert 3
    measure = Directed(5)
    for part, picks in zip(outputs.split(40, dim=1), chosen.split(40), strict=True):
        measure.update(part, picks)
    cross, energy = measure.per_token(chosen.sum(0))
    for u in (0, 1, 2, 4):
        mine, tokens = outputs[u], chosen[:, u]
        for v, other in enumerate(outputs):
            inner, square = (mine * other).sum(-1)[tokens], (other**2).sum(-1)[tokens]
            torch.testing.assert_close(cross[u, v], inner.mean(), atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(energy[u, v], square.mean(), atol=1e-4, rtol=1e-4)
    assert not cross[3].any() and not energy[3].any()
    assert torch.equal(measure.result()[3], torch.eye(5)[3])  # no stand-in is known


def test_directed_tells_who_can_stand_in_for_whom() -> None:
    """Expert 1 is right for the tokens of expert 0 only, which symmetric measures average out."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(3, 100, 8, generator=random)
    mine = torch.arange(100) < 30
    x[1, mine] = x[0, mine]
    chosen = torch.stack([mine, ~mine, ~mine], 1)
    measure = Directed(3)
    measure.update(x, chosen)
    similarity = measure.result()
    assert similarity[0, 1] == pytest.approx(1, abs=1e-6)
    assert similarity[1, 0] < 0.45


@pytest.mark.parametrize("method", METHODS)
def test_parts_pool_to_the_whole(method: str) -> None:
    outputs = samples(n=4 * CKA_CHUNK)
    parts = [METHODS[method](5) for _ in range(4)]
    chunks = zip(outputs.split(CKA_CHUNK, dim=1), sent(outputs).split(CKA_CHUNK), strict=True)
    for part, (chunk, picks) in zip(parts, chunks, strict=True):
        part.update(chunk, picks)
    before = [part.total.clone() for part in parts]
    whole = pooled(parts)
    assert whole.tokens == 4 * CKA_CHUNK
    torch.testing.assert_close(whole.result(), measured(method, outputs), atol=1e-6, rtol=0)
    assert all(map(torch.equal, before, (part.total for part in parts)))
    assert torch.equal(pooled([parts[0]] * 3).result(), parts[0].result()) or (
        method == "frobenius"
    )
