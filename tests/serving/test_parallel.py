"""Several ranks: whose rows choose the primaries, and which of two like experts stands in."""

from __future__ import annotations

from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sere.demo_model.tasks import examples
from sere.kernels import COUNTERS, Batch, Plan, RowClass, new_counters, reference, reroute
from sere.kernels.plan import ERROR_FRACTION, Placement, Substitution
from sere.policy import Policy, PolicyError
from sere.serving import parallel
from sere.serving.layer import ReroutedLayer
from sere.serving.live import Live
from sere.serving.rows import RowClasses
from sere.serving.server import free_port
from sere.serving.session import ServingError
from sere.serving.settings import Settings
from sere.table import Table
from tests.conftest import E, K
from tests.engines import EXPERT_MAP, GATHERV, leave, run_ranks
from tests.serving.test_rows import session
from tests.serving.test_serving import configure

# --- an expert's own rank -------------------------------------------------------------------------

# Expert 0 and those on its rank; how like it all six are.
RANKS = torch.tensor([0, 0, 0, 1, 1, 1])
ROW = torch.tensor([1.0, 0.75, 0.5, 0.5, 0.8, 0.2])


def listed(policy: Policy, placement: Placement | None, similarity: Tensor) -> list[int]:
    """The neighbour list of expert 0."""
    errors = 1 - similarity.double()
    substitution = Substitution(errors, torch.ones_like(errors))
    plan = Plan.build(similarity, policy, K=2, substitution=substitution, placement=placement)
    first: list[int] = plan.neighbours[0].tolist()
    for u, row in enumerate(plan.neighbours.tolist()):  # what is beside an expert is that expert's
        for place, v in enumerate(row):
            lost = round(errors[u, v].item() * ERROR_FRACTION)
            assert v < 0 or plan.errors[u, place].item() == min(lost, 2**16 - 1)
    return first


@pytest.mark.parametrize("policy", [Policy(S=1), Policy(S=1, tau=0.1), Policy(S=1, fill="error")])
def test_of_like_experts_one_on_the_same_rank_stands_in(policy: Policy) -> None:
    similarity = ROW.repeat(6, 1)
    ranks = torch.tensor([0, 1, 1, 0, 1, 0])  # 2 and 3 are equally like 0; 3 is on its rank
    assert listed(policy, None, similarity) == [4, 1, 2, 3, 5]
    assert listed(policy, Placement(ranks), similarity) == [4, 1, 3, 2, 5]
    assert listed(policy, Placement(RANKS), similarity) == [4, 1, 2, 3, 5]


@pytest.mark.parametrize("policy", [Policy(S=1), Policy(S=1, tau=0.1)])
def test_within_the_tolerance_too(policy: Policy) -> None:
    similarity = ROW.repeat(6, 1)
    assert listed(policy, Placement(RANKS, 0.04), similarity) == [4, 1, 2, 3, 5]
    assert listed(policy, Placement(RANKS, 0.06), similarity) == [1, 4, 2, 3, 5]
    assert listed(policy, Placement(RANKS, 0.4), similarity) == [1, 2, 4, 3, 5]


def test_no_tolerance_brings_back_what_is_below_rho() -> None:
    similarity = ROW.repeat(6, 1)
    assert listed(Policy(S=1, rho=0.76), Placement(RANKS, 0.5), similarity) == [4, -1, -1, -1, -1]
    assert listed(Policy(S=1, rho=0.6), Placement(RANKS, 0.5), similarity) == [1, 4, -1, -1, -1]


def test_the_choice_is_the_rule_whatever_is_primary() -> None:
    """The best on the expert's rank if it is within the tolerance of the best of all."""
    g = torch.Generator().manual_seed(0)
    similarity = (torch.rand(12, 12, generator=g) * 8).round() / 8
    ranks = torch.arange(12) % 3
    plan = Plan.build(similarity, Policy(S=1), K=2, placement=Placement(ranks, 0.125))
    for _ in range(200):
        primary = torch.rand(12, generator=g) < 0.3
        for u in range(12):
            others = [v for v in range(12) if primary[v] and v != u]
            chosen = next((v for v in plan.neighbours[u].tolist() if primary[v]), None)
            if not others:
                assert chosen is None
                continue
            like = {v: similarity[u, v].item() for v in others}
            best = max(others, key=lambda v: (like[v], -v))
            near = [v for v in others if ranks[v] == ranks[u] and like[v] >= like[best] - 0.125]
            assert chosen == max(near or [best], key=lambda v: (like[v], -v)) or (
                not near and like[chosen] == like[best]
            )


def runner(strategy: str, *, ep_size: int = 3, experts: int = 8) -> Any:
    """A stand-in for vLLM's `MoERunner` of a layer with 8 logical experts."""
    manager = SimpleNamespace(
        use_ep=ep_size > 1,
        ep_size=ep_size,
        placement_strategy=strategy,
        global_num_experts=experts,
    )
    return SimpleNamespace(
        routed_experts=SimpleNamespace(expert_map_manager=manager),
        moe_config=SimpleNamespace(num_logical_experts=8),
    )


def serving(**given: Any) -> Any:
    """A stand-in for vLLM's config."""
    defaults = {
        "data_parallel_size": 2,
        "tensor_parallel_size": 1,
        "pipeline_parallel_size": 1,
        "enable_expert_parallel": True,
        "enable_eplb": False,
        "enable_elastic_ep": False,
        "enable_fault_tolerance": False,
    }
    eager = given.pop("enforce_eager", True)
    return SimpleNamespace(
        parallel_config=SimpleNamespace(**{**defaults, **given}),
        model_config=SimpleNamespace(enforce_eager=eager),
    )


def test_vllm_says_which_rank_holds_an_expert() -> None:
    def ranks(*args: Any, **kwargs: Any) -> Any:
        found = parallel.expert_ranks(runner(*args, **kwargs), serving())
        return None if found is None else found.tolist()

    assert ranks("linear") == [0, 0, 0, 1, 1, 1, 2, 2]
    assert ranks("round_robin") == [0, 1, 2, 0, 1, 2, 0, 1]
    assert ranks("linear", ep_size=1) is None
    assert ranks("linear", experts=10) is None  # experts are copied: not one rank each
    assert parallel.expert_ranks(runner("linear"), serving(enable_eplb=True)) is None


def test_a_policy_that_is_switched_keeps_to_the_ranks(table: Table) -> None:
    own = session(table)
    own.settings = Settings(Path("unused"), Policy(S=1), placement=0.3)
    anywhere = own.bind(0, "zero", E=E, K=K)
    placed = own.bind(1, "one", E=E, K=K, ranks=torch.arange(E) % 2)
    lists = placed.neighbours.clone()
    own.set_policy(Policy(S=2))
    assert torch.equal(placed.neighbours, lists)
    assert not torch.equal(lists, table.plan(1, Policy(S=2)).neighbours)
    assert torch.equal(anywhere.neighbours, table.plan(0, Policy(S=2)).neighbours)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"enable_expert_parallel": False}, "--enable-expert-parallel"),
        ({"data_parallel_size": 1}, "--enable-expert-parallel"),
        ({"enable_eplb": True}, "EPLB moves and copies"),
        ({}, None),
        ({"data_parallel_size": 1, "tensor_parallel_size": 2}, None),
    ],
)
def test_a_tolerance_that_would_do_nothing_is_refused(
    given: dict[str, Any], reason: str | None
) -> None:
    found = parallel.obstacle_to_placement(serving(**given))
    assert found is None if reason is None else reason in str(found)


# --- one union of all ranks -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"data_parallel_size": 1}, "one data-parallel rank"),
        ({"enforce_eager": False}, "--enforce-eager"),
        ({"pipeline_parallel_size": 2}, "pipeline stages"),
        ({"enable_eplb": True}, "EPLB"),
        ({"enable_elastic_ep": True}, "elastic"),
        ({"enable_fault_tolerance": True}, "fault tolerance"),
        ({}, None),
        ({"tensor_parallel_size": 2, "enable_expert_parallel": False}, None),
    ],
)
def test_one_union_is_refused_where_ranks_may_be_out_of_step(
    given: dict[str, Any], reason: str | None
) -> None:
    found = parallel.obstacle_to_one_union(serving(**given), {})
    assert found is None if reason is None else reason in str(found)


def test_numbers_by_batch_size_are_refused_with_one_union(table: Table) -> None:
    assert '"batches"' in str(parallel.obstacle_to_one_union(serving(), {8: None}))
    own = session(table)
    own.live.together = True
    with pytest.raises(ServingError, match='cannot take "batches" here'):
        own.set_policy(Policy(S=1, batches={8: None}))


@pytest.mark.engine
def test_settings_of_ranks_are_checked_at_start(table_path: Path) -> None:
    for wrong in ({"union": "both"}, {"placement": -1}, {"placement": True}, {"placement": "near"}):
        with pytest.raises(PolicyError, match=f"{next(iter(wrong))}=.*expected"):
            Settings.parse({"table": str(table_path), **wrong}, model_folder=None, model_default={})
    with pytest.raises(ServingError, match='"union": "all" here: there is one data-parallel rank'):
        configure(table=str(table_path), union="all")
    with pytest.raises(ServingError, match='"placement" here: every rank has a part'):
        configure(table=str(table_path), placement=0.1)


def _rank(rank: int, port: int, results: Any) -> None:
    """One data-parallel rank with layers of its own, and nothing of vLLM but the group's name."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    # The group is looked up at each vote: one that is still held as a process ends may abort it.
    parallel.symbol = lambda name: (
        lambda: SimpleNamespace(  # type: ignore[attr-defined]
            device_group=torch.distributed.group.WORLD
        )
    )
    table, rows_of = _constructed(), RowClasses(16, "cpu", "decode")
    live = Live(table, "cpu", together=True)
    live.follow(Policy(S=1, min_active=1))
    plan = table.plan(0, Policy(S=1, min_active=1))
    layer = ReroutedLayer("one", plan, rows_of, live, live.place(0))
    told = []
    for ids, weights, kinds in _batches(rank):
        rows_of.buffer[: len(kinds)] = kinds
        # Steps that a rank of its own would spare: one row, prefill alone, no real row.
        live.choose(int((kinds == RowClass.FAST).sum()), int((kinds == RowClass.EXACT).sum()))
        told.append(layer(ids, weights).tolist())
    live.follow(None)  # stock on this rank: the others still wait for its votes
    live.choose(1, 0)
    ids, weights, _ = _batches(rank)[0]
    told.append(layer(ids, weights).tolist())
    results.put((rank, told, layer.stats()))
    leave(results)


def _constructed() -> Table:
    from sere.checkpoint import Fingerprint
    from sere.table import LayerStatistics

    g = torch.Generator().manual_seed(3)
    similarity = torch.rand(E, E, generator=g)
    similarity = ((similarity + similarity.T) / 2).fill_diagonal_(1)
    fingerprint = Fingerprint("Any", E=E, K=K, layers=(0,), router_hash=None, experts_hash=None)
    return Table(fingerprint, {0: LayerStatistics.without_text(similarity)}, "frobenius")


def _batches(rank: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The rank's steps; classes of rows are such that the other rank would mostly be on its own."""
    g = torch.Generator().manual_seed(rank)
    kinds = [[1, 1, 1, 1], [1], [2, 2], [0], [1, 2, 0]]
    if rank:
        kinds = [[1], [1, 1, 2], [1, 1, 1], [1, 1], [0]]
    steps = []
    for own in kinds:
        ids = torch.stack([torch.randperm(E, generator=g)[:K] for _ in own]).int()
        weights = torch.rand(len(own), K, generator=g) + 0.1
        steps.append((ids, weights, torch.tensor(own, dtype=torch.int8)))
    return steps


def test_real_processes_route_as_one_batch() -> None:
    """Two processes and gloo; also where the host of one rank alone could have spared the step."""
    port = free_port()
    context = get_context("spawn")
    results = context.Queue()
    ranks = [context.Process(target=_rank, args=(rank, port, results)) for rank in range(2)]
    for process in ranks:
        process.start()
    (_, first, counted), (_, second, _) = sorted(
        [results.get(timeout=120) for _ in ranks], key=lambda told: told[0]
    )
    for process in ranks:
        process.join(30)
        assert process.exitcode == 0
    plan, counters = _constructed().plan(0, Policy(S=1, min_active=1)), new_counters()
    moved = 0
    for step, parts in enumerate(zip(_batches(0), _batches(1), strict=True)):
        ids, weights, kinds = (torch.cat(part) for part in zip(*parts, strict=True))
        expected, _ = reroute(ids, weights, plan, kinds, counters)
        assert [*first[step], *second[step]] == expected.tolist()
        moved += int((expected != ids).sum())
    assert moved > 5
    assert first[-1] == _batches(0)[0][0].tolist()
    assert list(counted.values())[:3] == counters[:3].tolist()


# --- vLLM's data parallelism, on CPUs -------------------------------------------------------------

PROMPTS = [e.prompt for e in examples(20, seed=9, split="held_out")]
SHARES = (PROMPTS[:15], PROMPTS[15:])
LENGTHS = (12, 5)  # the second rank has little to do, and then idles along
# vLLM's options, sere's, and whether engines have processes of their own: what keeps ranks in step
# is elsewhere then.
MODES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "data parallel": ({}, {}, "0"),
    "data and expert parallel": (
        {"enable_expert_parallel": True},
        {"union": "all", "placement": 0.05},
        "1",
    ),
}


@pytest.mark.modes
@pytest.mark.parametrize("mode", MODES)
def test_data_parallel_engines(mode: str, table_path: Path, tmp_path: Path) -> None:
    options, own, processes = MODES[mode]
    policy = Policy(S=1, rho=0.2)
    sere = {"table": str(table_path), "S": 1, "rho": 0.2, **own}

    def steps(prompts: list[str], tokens: int) -> list[list[Any]]:
        return [
            ["rpc", "sere_reset"],
            ["rpc", "sere_record", True],
            ["meet", str(tmp_path / "start")],
            ["generate", prompts, tokens],
            ["meet", str(tmp_path / "end")],
            ["rpc", "sere_recording"],
            ["rpc", "sere_stats"],
            ["rpc", "sere_policy", None],
            ["meet", str(tmp_path / "stock")],
            ["generate", prompts, tokens],
        ]

    ranks = run_ranks(
        [steps(*work) for work in zip(SHARES, LENGTHS, strict=True)],
        sere=sere,
        options=options,
        env={"VLLM_ENABLE_V1_MULTIPROCESSING": processes},
        paths=(GATHERV, EXPERT_MAP) if options else (GATHERV,),
    )
    table = Table.load(table_path)
    half = table.fingerprint.E // 2
    placement = None
    if options:
        placement = Placement(torch.arange(2 * half) // half, own["placement"])
    for index in table.layers:
        plan = table.plan(index, policy, placement)
        calls = [_recorded(rank[5], index) for rank in ranks]
        if "union" in own:
            _check_one_union(calls, plan, [rank[6][0][str(index)] for rank in ranks])
        else:
            for rank, own_calls in zip(ranks, calls, strict=True):
                _check_own_union(own_calls, plan, rank[6][0][str(index)])
    for rank in ranks:
        generated, stock = rank[3], rank[9]
        assert generated != stock
        for layer in rank[6][0].values():
            assert layer["rows_fast"] == sum(len(tokens) - 1 for tokens, _ in generated)
            assert 0 < layer["active_after"] < 0.9 * layer["active_before"]


Call = tuple[Tensor, Tensor, Tensor, list[list[int]]]


def _recorded(recording: list[dict[str, Any]], index: int) -> list[Call]:
    """(ids, weights, rows, new ids) of a layer's calls on one rank, in order."""
    return [
        (torch.tensor(i).int(), torch.tensor(w), torch.tensor(rows, dtype=torch.int8), new)
        for i, w, rows, new, _ in recording[0][str(index)]
    ]


def _check_own_union(calls: list[Call], plan: Plan, counted: dict[str, int]) -> None:
    counters = new_counters()
    for ids, weights, rows, new in calls:
        assert reroute(ids, weights, plan, rows, counters)[0].tolist() == new
    for name, figure in zip(COUNTERS, counters.tolist(), strict=True):
        assert counted[name] == figure or name == "rows_void"  # ranks idle on


def _check_one_union(ranks: list[list[Call]], plan: Plan, counted: list[dict[str, int]]) -> None:
    """Every call is the specification of a rank's rows under all ranks' votes; the counters are
    those of all rows together."""
    counters, alone = new_counters(), 0
    for calls in zip(*ranks, strict=False):  # one may have been asked while it idled on
        ids, weights, rows = (torch.cat([call[part] for call in calls]) for part in range(3))
        reroute(ids, weights, plan, rows, counters)
        said = [reference.vote(Batch(*call[:3]), plan) for call in calls]
        votes = torch.stack(said).amin(0)
        for ids, weights, rows, new in calls:
            own = reference.run(Batch(ids, weights.clone(), rows), plan, None, votes)
            assert own.tolist() == new
        alone += sum(reroute(*call[:2], plan, call[2])[0].tolist() != call[3] for call in calls)
    assert alone > 10  # without the other's votes it would have been something else
    assert any(not (call[2] != RowClass.VOID).any() for call in ranks[1])  # it idled
    for name, figure in zip(COUNTERS, counters.tolist(), strict=True):
        figures = [rank[name] for rank in counted]
        if name in ("steps", "active_before", "active_after"):
            assert figures == [figure, figure]
        elif name != "rows_void":
            assert sum(figures) == figure
