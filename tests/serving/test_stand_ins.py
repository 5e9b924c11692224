"""Linear maps around the experts: what is loaded, refused, and added where. How they answer in real
engines is in `test_serving.py`, mode by mode."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sere.kernels import Plan, RowClass, numba_answers
from sere.maps import LayerMaps, Maps, beside, served_bytes
from sere.policy import Policy, PolicyError
from sere.serving import loaded_maps
from sere.serving.auto import Auto
from sere.serving.compile_key import keyed
from sere.serving.layer import ReroutedLayer
from sere.serving.live import Live
from sere.serving.loaded_maps import Answers, check_finalized, ranks_to_load, unloaded
from sere.serving.no_table import NoTable
from sere.serving.refusal import ServingError
from sere.serving.rows import RowClasses
from sere.serving.session import maps_of
from sere.serving.settings import Settings
from sere.table import Table
from tests.serving.test_serving import configure

H, T, K, E, R = 128, 3, 4, 32, 4  # H, K, E: of the bundled model
LINEAR = Policy(S=1, min_active=1, fill="linear")


@pytest.fixture(scope="module")
def table(mapped_path: Path) -> Table:
    return Table.load(mapped_path)


class Experts:
    """In the place of vLLM's routed experts: answers with nothing, and writes over its input."""

    apply_router_weight_on_input = False

    def forward_modular(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        out = torch.full_like(x, -0.0)
        x.zero_()
        return out


def runner(index: int = 0, *, reduced: bool = False, **config: Any) -> Any:
    sizes = {"hidden_dim_unpadded": H, "use_deferred_moe_finalize": False, **config}
    return SimpleNamespace(
        layer_id=index,
        layer_name=f"layer {index}",
        routed_experts=Experts(),
        moe_config=SimpleNamespace(**sizes),
        sere=SimpleNamespace(traced=False, name=f"layer {index}", stand_ins=None),
        _fused_output_is_reduced=reduced,
    )


@pytest.fixture
def first(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets this process's tensor-parallel rank; 0 until then."""

    def rank(number: int) -> None:
        group = SimpleNamespace(rank_in_group=number)
        monkeypatch.setattr(loaded_maps, "symbol", lambda name: lambda: group)

    rank(0)
    return rank


def attached(table: Table, one: Any, policy: Policy = LINEAR) -> Answers:
    rows = RowClasses(8, "cpu", "decode")
    rows.buffer[:T] = int(RowClass.FAST)
    rows.filled = T
    settings = Settings(Path("t"), policy, maps=True)
    answers = Answers(table, policy, ranks_to_load(settings, table), rows, say=None)
    one.sere.stand_ins = answers.attach(one)
    return answers


def a_pass(one: Any, *, physical: int = 0) -> Tensor:
    """One layer's output [T, H]; slot 0 of row 1 and slot 2 of row 2 are freed. physical: what a
    load balancer adds to the ids."""
    g = torch.Generator().manual_seed(0)
    ids = torch.arange(T * K, dtype=torch.int32).view(T, K)
    new = ids.clone()
    new[1, 0], new[2, 2] = 20, 21
    one.sere.stand_ins.forget()
    one.sere.stand_ins.noting(lambda *_: new, ids, torch.full((T, K), 0.25), T)
    hidden = torch.randn(T, H, generator=g)
    out: Tensor = one.routed_experts.forward_modular(
        x=hidden, topk_weights=torch.rand(T, K), topk_ids=new + physical
    )
    return out


def wanted(maps: LayerMaps) -> Tensor:
    hidden = torch.randn(T, H, generator=torch.Generator().manual_seed(0))
    out = torch.full((T, H), -0.0)
    for t, u in ((1, 4), (2, 10)):
        inner = maps.down[u].float() @ hidden[t] - maps.centre[u]
        out[t] = 0.25 * (maps.constant[u] + maps.up[u].float().T @ inner)
    return out


def test_the_maps_of_freed_slots_are_added_to_the_experts_output(
    table: Table, first: Callable[[int], None]
) -> None:
    """By the input as it was, whatever the kernel does to it, and by logical ids."""
    assert table.maps is not None
    one = runner()
    answers = attached(table, one)
    expected = wanted(table.maps.layer(0))
    for physical in (0, 7):
        found = a_pass(one, physical=physical)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        assert torch.signbit(found[0]).all()  # a row without a freed slot keeps every bit
    answers.follow(replace(LINEAR, rank=2))
    torch.testing.assert_close(a_pass(one), wanted(table.maps.layer(0).of_rank(2)))
    for off in (None, Policy(S=1), replace(LINEAR, layers={0: {"fill": "similar"}})):
        answers.follow(off)
        assert not a_pass(one).any()
    answers.follow(replace(LINEAR, fill="constant"))
    assert a_pass(one).any()
    one.sere.stand_ins.forget()  # a pass that the operator leaves alone
    x = torch.randn(T, H)
    assert not one.routed_experts.forward_modular(x, torch.rand(T, K), torch.ones(T, K)).any()


def test_no_request_waits_for_the_kernels_to_be_compiled(
    table: Table, first: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer's first pass, which is start-up's, runs them all, and changes nothing."""
    kernels = [numba_answers._keep_freed, numba_answers._ask, numba_answers._answer]
    fresh = [type(kernel)(kernel.py_func) for kernel in kernels]
    for kernel, new in zip(kernels, fresh, strict=True):
        monkeypatch.setattr(numba_answers, kernel.__name__, new)
    one = runner()
    answers = attached(table, one)
    layer = ReroutedLayer("one", Plan.off(E), answers._rows, (live := Live(table, "cpu")), 0)
    layer.stand_ins = one.sere.stand_ins
    live.follow(None)
    layer(torch.zeros(T, K, dtype=torch.int32), torch.rand(T, K))
    compiled = [[*kernel.signatures] for kernel in fresh]
    assert all(map(len, compiled))
    assert table.maps is not None
    expected = wanted(table.maps.layer(0))
    torch.testing.assert_close(a_pass(one), expected, atol=1e-5, rtol=1e-5)
    assert [[*kernel.signatures] for kernel in fresh] == compiled


def test_room_that_is_filled_answers_as_what_was_loaded(
    table: Table, first: Callable[[int], None]
) -> None:
    """Reserved while vLLM builds the model, under its own default type."""
    assert table.maps is not None
    settings = Settings(None, LINEAR, auto=Auto(maps=R))
    known, rows = NoTable(table.fingerprint), RowClasses(8, "cpu", "decode")
    rows.buffer[:T], rows.filled = int(RowClass.FAST), T
    one = runner()
    torch.set_default_dtype(torch.bfloat16)
    try:
        answers = Answers(known, LINEAR, ranks_to_load(settings, known), rows, say=None)
        one.sere.stand_ins = answers.attach(one)
    finally:
        torch.set_default_dtype(torch.float32)
    assert answers.size == served_bytes(E, H, R)
    answers.follow(LINEAR)
    assert not a_pass(one).any()
    answers.learn(0, table.maps.layer(0))
    assert not a_pass(one).any()  # nor before the table is there
    answers.go_by(table)
    answers.follow(LINEAR)
    torch.testing.assert_close(a_pass(one), wanted(table.maps.layer(0)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("rank", "reduced", "adds"), [(0, False, True), (1, False, False), (1, True, True)]
)
def test_ranks_whose_outputs_are_summed_add_once(
    rank: int, reduced: bool, adds: bool, table: Table, first: Callable[[int], None]
) -> None:
    one = runner(reduced=reduced)
    attached(table, one)
    first(rank)
    assert bool(a_pass(one).any()) is adds


def test_layers_that_no_map_fits_are_refused(table: Table) -> None:
    weighs = runner()
    weighs.routed_experts.apply_router_weight_on_input = True
    with pytest.raises(ServingError, match="its router weighs the experts' input"):
        attached(table, weighs)
    with pytest.raises(ServingError, match="input of width 128 and it has 96"):
        attached(table, runner(hidden_dim_unpadded=96))
    later = runner(use_deferred_moe_finalize=True)
    attached(table, later)
    with pytest.raises(ServingError, match="finishes its experts' output in a later kernel"):
        check_finalized(later)


def test_only_what_was_loaded_can_be_switched_to(table: Table) -> None:
    def loaded(policy: Policy, *, maps: bool = False) -> dict[int, int]:
        return ranks_to_load(Settings(Path("t"), policy, maps=maps), table)

    assert loaded(Policy(S=1)) == {}
    assert loaded(Policy(S=1), maps=True) == dict.fromkeys(table.layers, R)
    some = loaded(Policy(S=1, layers={1: {"fill": "linear", "rank": 2}, 2: {"fill": "constant"}}))
    assert some == {1: 2, 2: 0}
    assert unloaded(Policy(S=1), {}, table) is None
    assert "maps of rank 4 for layer 0 were not loaded" in str(unloaded(LINEAR, some, table))
    assert unloaded(replace(LINEAR, rank=2), dict.fromkeys(table.layers, 2), table) is None
    assert unloaded(LINEAR, dict.fromkeys(table.layers, 2), table) is not None


def test_the_bytes_are_those_on_the_device(table: Table) -> None:
    answers = attached(table, runner())
    assert answers.size == served_bytes(E, H, R)


def test_engines_that_cannot_are_refused_before_weights_are_loaded(
    mapped_path: Path, table_path: Path
) -> None:
    with pytest.raises(ServingError, match="the maps know nothing of adapters"):
        configure({"enable_lora": True}, table=str(mapped_path), S=1, fill="linear")
    for asked in ({"fill": "linear"}, {"maps": True}):
        with pytest.raises(ServingError, match="the table was made without: calibrate with --maps"):
            configure(table=str(table_path), S=1, **asked)


def test_compiled_code_that_asks_maps_is_kept_apart(mapped_path: Path) -> None:
    def key(**sere: Any) -> Any:
        found = configure(table=str(mapped_path), S=1, **sere)
        keys = keyed(lambda own: json.dumps(own.additional_config, sort_keys=True))(found)
        return keys, maps_of(found)

    plain, linear, ready = key(), key(fill="linear"), key(maps=True)
    assert plain[1] == {} and linear[1] == ready[1] == dict.fromkeys(range(4), R)
    assert plain[0] != linear[0] == ready[0]
    assert key(fill="linear", rank=2)[0] not in (plain[0], linear[0])


def test_another_calibrations_maps_are_not_loaded(mapped_path: Path, tmp_path: Path) -> None:
    found = Maps.open(beside(mapped_path))
    assert (found.R, found.H) == (R, H)
    table = tmp_path / "t.table"
    table.write_bytes(mapped_path.read_bytes())
    with pytest.raises((ServingError, PolicyError), match="has lost its file of them"):
        configure(table=str(table), S=1, fill="linear")
