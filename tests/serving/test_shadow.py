"""The shadow check: what it measures, when it falls back, where it is refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sere.checkpoint import Fingerprint
from sere.demo_model.tasks import examples
from sere.policy import Policy
from sere.serving import shadow as module
from sere.serving.layer import ReroutedLayer
from sere.serving.live import Live
from sere.serving.may_start import _check_shadow
from sere.serving.rows import RowClasses
from sere.serving.server import free_port
from sere.serving.session import ServingError
from sere.serving.shadow import PATIENCE, Shadow, ShadowSettings
from sere.table import LayerStatistics, Table
from tests.engines import leave, run_engine
from tests.serving.test_serving import configure

T, K, E, H = 6, 2, 8, 5
PROMPTS = [e.prompt for e in examples(24, seed=7, split="held_out")]
GENERATE = ["generate", PROMPTS, 12]
GREEDY = {"S": 1, "rho": 0.5}


# --- in the real engine ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wrong_table(table_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's own fingerprint, but the least similar experts stand in for each other."""
    table = Table.load(table_path)
    layers = {
        index: replace(known, similarity=(1 - known.similarity).fill_diagonal_(1))
        for index, known in table.layers.items()
    }
    path = tmp_path_factory.mktemp("wrong") / "wrong.safetensors"
    replace(table, layers=layers).save(path)
    return path


@pytest.mark.engine
def test_a_wrong_table_falls_back_to_stock_routing(wrong_table: Path) -> None:
    sere = {"table": str(wrong_table), **GREEDY, "shadow": {"every": 1, "bound": 0.2}}
    state = ["rpc", "sere_telemetry"]
    steps = [GENERATE, GENERATE, state, ["rpc", "sere_reset"], GENERATE, state]
    steps += [["rpc", "sere_policy", None], GENERATE, ["rpc", "sere_policy", GREEDY], state]
    first, _, fallen, _, after, idle, _, stock, _, again = run_engine(steps, sere=sere)
    ((fallen,), (idle,), (again,)) = fallen, idle, again
    assert "differed from stock routing by" in fallen["fallback"]
    assert fallen["policy"] is None
    assert max(f["exceeded"] for f in fallen["shadow"].values()) >= PATIENCE
    assert first != stock
    assert after == stock
    assert all(f["checks"] == 0 for f in idle["shadow"].values())  # nothing left to check
    assert again["fallback"] is None
    assert again["policy"]["rho"] == GREEDY["rho"]


@pytest.mark.engine
def test_the_right_table_does_not_under_the_same_policy(table_path: Path) -> None:
    sere = {"table": str(table_path), **GREEDY, "shadow": {"every": 1, "bound": 0.2}}
    _, (told,) = run_engine([GENERATE, ["rpc", "sere_telemetry"]], sere=sere)
    assert told["fallback"] is None
    assert sum(figures["checks"] for figures in told["shadow"].values()) == 11


# --- refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shadow", "reason"),
    [
        (True, "shadow=True: expected settings"),
        ({"every": 0}, "every=0: expected a whole number of steps"),
        ({"every": 1.5}, "every=1.5: expected a whole number of steps"),
        ({"bound": 0}, "bound=0: expected a relative error"),
        ({"bound": "low"}, "bound='low': expected a relative error"),
        ({"evry": 5}, "unknown key 'evry'; did you mean 'every'"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(shadow: Any, reason: str, table_path: Path) -> None:
    with pytest.raises(Exception, match=reason):
        configure(table=str(table_path), shadow=shadow)


def test_graphs_are_refused(table_path: Path) -> None:
    with pytest.raises(ServingError, match="graphs would freeze it; add enforce_eager"):
        configure({"enforce_eager": False}, table=str(table_path), shadow={})
    configure(table=str(table_path), shadow={})


@pytest.mark.parametrize(
    ("data_parallel_size", "enable_eplb", "reason"),
    [(2, False, "data-parallel engines"), (1, True, "EPLB")],
)
def test_parallel_modes_are_refused(
    data_parallel_size: int, enable_eplb: bool, reason: str
) -> None:
    parallel = SimpleNamespace(data_parallel_size=data_parallel_size, enable_eplb=enable_eplb)
    config = SimpleNamespace(
        model_config=SimpleNamespace(enforce_eager=True), parallel_config=parallel
    )
    with pytest.raises(ServingError, match=reason):
        _check_shadow(config)


# --- what it measures, on experts that are written down here -------------------------------------


class Group:
    """A tensor-parallel group of two ranks, the other of which holds ones."""

    rank_in_group = 0

    def all_reduce(self, part: Tensor) -> Tensor:
        return part + 1

    def broadcast(self, figures: Tensor, src: int) -> Tensor:
        return figures


class Layers:
    """Two layers that move every slot of expert 0 < e < 7 to expert 0, as the check sees them; 7 is
    like no other."""

    def __init__(self, *, every: int = 1, bound: float = 0.2) -> None:
        self.reasons: list[str] = []
        self.rows = RowClasses(16, "cpu", "decode")
        self.shadow = Shadow(ShadowSettings(every, bound), self.rows, self.reasons.append)
        self.scale = 1.0  # how large the outputs of the moved experts are
        self.ran: list[Tensor] = []
        self.workspace = torch.empty(T, H)
        random = torch.Generator().manual_seed(0)
        self.matrices = torch.randn(E, H, H, generator=random)
        self.x = torch.randn(T, H, generator=random)
        self.ids = torch.tensor([[0, e] for e in (1, 2, 3, 4, 5, 7)])
        self.weights = torch.rand(T, K, generator=random) + torch.tensor([1.0, 0.0])
        known = torch.eye(E)
        known[:7, 0] = 1
        table = Table(
            Fingerprint("HandWritten", E, K, (0, 1)),
            {index: LayerStatistics.without_text(known) for index in range(2)},
            "hand-written",
        )
        policy = Policy(S=1, rho=0.5, min_active=1)
        live = Live(table, "cpu")
        live.follow(policy)
        self.layers, self.experts = [], []
        for index in range(2):
            plan = table.plan(index, policy)
            self.layers.append(ReroutedLayer(str(index), plan, self.rows, live, index))
            self.experts.append(SimpleNamespace(forward_modular=self.mix))
            self.shadow.watch(index, self.layers[-1], self.experts[-1])

    def mix(self, *, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, **_: Any) -> Tensor:
        """Writes over its input, and all outputs lie in one workspace, as kernels may."""
        self.ran.append(topk_ids.clone())
        matrices = self.matrices.clone()
        matrices[1:] *= self.scale
        slots = torch.einsum("th,tkhg->tkg", x, matrices[topk_ids])
        x.zero_()
        return self.workspace.copy_(torch.einsum("tkg,tk->tg", slots, topk_weights))

    def step(self, prefilling: list[bool] | None = None) -> list[Tensor]:
        """One step through both layers; their outputs."""
        self.rows.fill(np.array(prefilling or [False] * T), None)
        outputs = []
        for layer, experts in zip(self.layers, self.experts, strict=True):
            weights = self.weights.clone()
            ids = layer.forward(self.ids.clone(), weights)
            out = experts.forward_modular(
                x=self.x.clone(), topk_weights=weights, topk_ids=ids, shared_experts=None
            )
            outputs.append(out.clone())
        return outputs


@pytest.fixture
def layers(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Layers]]:
    monkeypatch.setattr(module, "symbol", lambda name: Group)
    return Layers


def test_error_and_surrendered_weight_are_those_of_the_fast_rows(layers: type[Layers]) -> None:
    prefilling = [True, False, False, True, False, False]
    fast = ~torch.tensor(prefilling)
    watched = layers(bound=1e9)
    new = watched.step(prefilling)[0]
    unwatched = layers(every=1000).step(prefilling)[0]
    assert torch.equal(new, unwatched)  # looking changes nothing

    stock = watched.mix(x=watched.x.clone(), topk_weights=watched.weights, topk_ids=watched.ids)
    error = (new[fast] - stock[fast]).norm() / (stock[fast] + 1).norm()
    figures = watched.shadow.figures[0]
    assert figures.checks == 1
    assert figures.error == pytest.approx(error.item(), rel=1e-5)
    surrendered = watched.weights[fast, 1][:-1].sum() / watched.weights[fast].sum()
    assert figures.surrendered == pytest.approx(surrendered.item(), rel=1e-5)


def test_layers_take_turns_every_nth_step_that_decodes(layers: type[Layers]) -> None:
    watched = layers(every=3, bound=1e9)
    for _ in range(5):
        watched.step([True] * T)  # prefill: nothing to check
    assert [len(watched.ran), *(f.checks for f in watched.shadow.figures.values())] == [10, 0, 0]
    for _ in range(9):
        watched.step()
    assert [f.checks for f in watched.shadow.figures.values()] == [2, 1]
    assert len(watched.ran) == 2 * (5 + 9) + 3  # the experts ran once more in each


def test_one_layer_that_is_wrong_is_found_and_one_odd_batch_forgiven(
    layers: type[Layers],
) -> None:
    watched = layers(bound=0.2)
    watched.scale = 1e-4  # the moved slots hardly count: expert 0 alone makes the output
    watched.weights[:, 1] *= 1e-4
    for _ in range(4):
        watched.step()
    assert not watched.reasons
    watched.scale, watched.weights = 50.0, torch.ones(T, K)
    watched.step()
    watched.scale, watched.weights = 1e-4, torch.tensor([[1.0, 1e-4]] * T)
    watched.step()
    assert sum(f.exceeded for f in watched.shadow.figures.values()) == 1
    watched.scale, watched.weights = 50.0, torch.ones(T, K)
    watched.step()
    watched.step()
    assert not watched.reasons
    watched.step()
    assert len(watched.reasons) == 1
    assert "more than the bound of 20.0%" in watched.reasons[0]


def test_outputs_that_are_not_numbers_exceed_every_bound(layers: type[Layers]) -> None:
    watched = layers(bound=1e9)
    watched.matrices[0] = torch.nan
    watched.ids[:, 0] = 1
    watched.ids[0] = torch.tensor([0, 1])
    for _ in range(PATIENCE):
        watched.step()
    assert len(watched.reasons) == 1


def test_nothing_is_checked_while_routing_is_stock(layers: type[Layers]) -> None:
    watched = layers()
    watched.shadow.switch(on=False)
    watched.step()
    assert [f.checks for f in watched.shadow.figures.values()] == [0, 0]
    watched.shadow.switch(on=True)
    watched.step()
    assert [f.checks for f in watched.shadow.figures.values()] == [1, 0]


def _rank(rank: int, port: int, results: Any) -> None:
    """One tensor-parallel rank. They disagree: on the second no token has moved."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=20),
    )

    def broadcast(figures: Tensor, src: int) -> Tensor:
        torch.distributed.broadcast(figures, src)
        return figures

    def all_reduce(part: Tensor) -> Tensor:
        torch.distributed.all_reduce(part)
        return part

    group = SimpleNamespace(rank_in_group=rank, broadcast=broadcast, all_reduce=all_reduce)
    module.symbol = lambda name: lambda: group  # type: ignore[attr-defined]
    layers = Layers(bound=1e9)
    if rank:
        layers.ids[:, 1] = 7  # like no other: stays
    for _ in range(4):
        layers.step()
    results.put([(f.checks, f.error_sum) for f in layers.shadow.figures.values()])
    leave(results)


def test_ranks_that_disagree_on_what_moved_do_not_wait_for_each_other() -> None:
    """Two processes and gloo: the first rank's word counts on both."""
    context, port = get_context("spawn"), free_port()
    results = context.Queue()
    ranks = [context.Process(target=_rank, args=(rank, port, results)) for rank in range(2)]
    for process in ranks:
        process.start()
    first, second = (results.get(timeout=90) for _ in ranks)
    for process in ranks:
        process.join(30)
        assert process.exitcode == 0
    assert first == second
    assert [checks for checks, _ in first] == [2, 2]
    assert all(error > 0 for _, error in first)
