"""Every form of the CUDA kernel is the specification, on the CPU; and which of them serves."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sere.kernels import Batch, Plan, cuda_choice, cuda_kernel, new_counters, reference
from sere.kernels.cuda_choice import Choice, as_json, fastest, variant_for
from sere.kernels.cuda_variants import MEASURED, VARIANTS, Variant
from sere.kernels.plan import NO_CEILING, NO_TOLERANCE
from sere.policy import Policy
from tests.kernels import cuda_warps_on_host as host
from tests.kernels.cuda_on_host import COMPILER

needs_compiler = pytest.mark.skipif(not COMPILER, reason="no g++")

LANES = Variant(threads=64, in_place=True, fixed=True, lanes=True)
FORMS = (  # of each lead one, with few threads: batches take several turns
    Variant(threads=64),
    Variant(threads=64, in_place=True, fixed=True, short=True),
    LANES,
    replace(LANES, threads=128, short=True, in_place=False),
    replace(LANES, joined="cluster", blocks=3),
    replace(LANES, joined="ticket", blocks=3),
)
E, K = 40, 6  # no powers of two; lists longer than a warp


def batch_and_plan(seed: int, E: int = E, K: int = K) -> tuple[Batch, Plan]:
    """Padding, foreign ids, duplicates, equal and zero weights, all row classes; every setting."""
    g = torch.Generator().manual_seed(seed)
    T = int(torch.randint(1, 40, (), generator=g))
    ids = torch.rand(T, E, generator=g).argsort(1)[:, :K].to(torch.int32)
    ids[torch.rand(T, K, generator=g) < 0.05] = -1
    ids[torch.rand(T, K, generator=g) < 0.03] = E + 1
    if seed % 4 == 0:
        ids = torch.randint(-1, E + 1, (T, K), generator=g).to(torch.int32)
    weights = torch.randint(0, 6, (T, K), generator=g) / 5
    rows = torch.randint(-1, 5, (T,), generator=g).to(torch.int8)
    if seed % 5 == 0:  # fewer active experts than a row has slots
        rows = torch.zeros(T, dtype=torch.int8)
        rows[0] = 1
    few = 1 + seed % (K + 1)
    pool = K + seed % 8 * 4 if seed % 4 == 2 else None
    S = min(1 + seed % 2, K) if pool is None else seed // 4 % 2
    policy = Policy(S=S, pool=pool, rho=(0.0, 0.5, 0.97)[seed % 3], min_active=few)
    plan = Plan.build(torch.rand(E, E, generator=g), policy, K=K)
    plan.errors.copy_(torch.randint(0, 3000, plan.errors.shape, generator=g))
    plan.scales.copy_(torch.rand(plan.scales.shape, generator=g))
    share = torch.randint(0, 2**15, (E,), generator=g, dtype=torch.int32)
    plan.pool[2] = torch.where(plan.pool[1] >= 0, share, 0)
    if seed % 8 == 6:  # INDEPENDENT rows beside others whose batch has no pool
        plan.settings[0], plan.settings[5] = 1, 0
    ceiling = 6 if seed % 7 == 0 else NO_CEILING
    tau = NO_TOLERANCE if seed % 2 else 2_000_000
    plan.settings[2:5] = torch.tensor([ceiling, tau, seed % 3 == 0])
    if seed % 11 == 0:
        plan.settings[0] = K  # counts, and moves nothing
    return Batch(ids, weights, None if seed % 6 == 0 else rows), plan


def same_as_the_specification(
    variant: Variant, batch: Batch, plan: Plan, source: Path = host.KERNELS
) -> bool:
    found, wanted = (Batch(batch.ids.clone(), batch.weights.clone(), batch.rows) for _ in range(2))
    counted, expected = new_counters(), new_counters()
    ids = reference.run(wanted, plan, expected)
    out = host.run(variant, found, plan, counted, source)
    return all(
        torch.equal(a, b)
        for a, b in ((out, ids), (found.weights, wanted.weights), (counted, expected))
    )


@needs_compiler
@pytest.mark.parametrize("variant", FORMS, ids=lambda form: form.name)
def test_a_form_is_the_specification(variant: Variant) -> None:
    """With warps of 32 and several blocks at once, threads going on in a random order."""
    wrong = [s for s in range(24) if not same_as_the_specification(variant, *batch_and_plan(s))]
    assert not wrong


@needs_compiler
def test_other_types_and_sizes_are_no_exception() -> None:
    for seed in range(6):
        one_slot = batch_and_plan(seed, E=33, K=1)
        assert same_as_the_specification(LANES, *one_slot)
        batch, plan = batch_and_plan(seed)
        wide = Batch(batch.ids.long(), batch.weights.double(), batch.rows)
        assert same_as_the_specification(LANES, wide, plan)


@needs_compiler
@pytest.mark.parametrize("variant", FORMS[1:3], ids=lambda form: form.name)
def test_switched_off_in_place_nothing_is_read_or_written(variant: Variant) -> None:
    batch, _ = batch_and_plan(3)
    before = batch.ids.clone()
    nowhere = Batch(batch.ids, torch.full_like(batch.weights, torch.nan), batch.rows)
    counters = new_counters()
    assert host.run(variant, nowhere, Plan.off(E), counters) is batch.ids
    assert torch.equal(batch.ids, before) and not counters.any()


BARRIERS = (
    "    __syncthreads();  // below the loads, so that they are under way at once\n",
    "    __syncthreads();  // the only one of a block alone\n",
    "        look_up(neighbours, known, s, listed);\n        __syncthreads();\n",
)


@needs_compiler
@pytest.mark.parametrize("barrier", BARRIERS)
def test_a_missing_barrier_is_found(barrier: str, tmp_path: Path) -> None:
    for file in host.KERNELS.glob("*.cu*"):
        text = file.read_text()
        kept = "".join(line for line in barrier.splitlines(True) if "__syncthreads" not in line)
        (tmp_path / file.name).write_text(text.replace(barrier, kept))
    assert "".join(f.read_text() for f in tmp_path.iterdir()).count(barrier) == 0
    cases = (batch_and_plan(seed) for seed in range(1, 80, 2))  # to the first that is wrong
    assert not all(same_as_the_specification(LANES, *case, tmp_path) for case in cases)


def test_forms_that_cannot_be_are_refused() -> None:
    for wrong in (
        {"threads": 100},
        {"lanes": True},
        {"blocks": 4},
        {"pdl": True},
        {"lanes": True, "fixed": True, "joined": "cluster", "blocks": 16},
    ):
        with pytest.raises(ValueError, match=r"expected|ask|begin|cluster"):
            Variant(**wrong)  # type: ignore[arg-type]
    assert len({v.name for v in VARIANTS}) == len(VARIANTS)


# --- which one ------------------------------------------------------------------------------------

H100, A100, B200 = ("NVIDIA H100", (9, 0)), ("NVIDIA A100", (8, 0)), ("NVIDIA B200", (10, 0))
FAST = replace(LANES, threads=256, short=True)
CLUSTER = replace(FAST, joined="cluster", blocks=8)


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    choices = [
        Choice(128, 8, 8, FAST),
        Choice(128, 8, 512, CLUSTER),
        Choice(512, 10, 64, replace(FAST, short=False)),
    ]
    file = tmp_path / "choice.json"
    file.write_text(
        json.dumps({"gpus": {H100[0]: {"capability": H100[1], "choices": as_json(choices)}}})
    )
    monkeypatch.setattr(cuda_choice, "FILE", file)
    for cached in (cuda_choice.of_gpu, cuda_choice.choices_for):
        cached.cache_clear()
    return file


@pytest.fixture(autouse=True)
def _forget() -> Any:
    yield
    for cached in (cuda_choice.of_gpu, cuda_choice.choices_for):
        cached.cache_clear()


def test_without_a_table_the_form_that_was_measured_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_choice, "FILE", tmp_path / "none.json")
    assert variant_for(H100, 8, 128, 8) == MEASURED == Variant()


def test_the_table_decides_by_batch_and_nearest_shape(table: Path) -> None:
    chosen = {T: variant_for(H100, T, 128, 8) for T in (1, 8, 9, 512, 4096)}
    assert chosen == {1: FAST, 8: FAST, 9: CLUSTER, 512: CLUSTER, 4096: CLUSTER}
    assert variant_for(H100, 8, 160, 6) == FAST  # as (128, 8), not as (512, 10)
    assert cuda_choice.wants_short(H100, 128, 8)
    assert not cuda_choice.wants_short(H100, 512, 10)
    assert variant_for(("NVIDIA H200", (9, 0)), 8, 128, 8) == FAST  # of the same kind
    assert variant_for(A100, 8, 128, 8) == variant_for(B200, 8, 128, 8) == MEASURED


def test_forms_are_chosen_by_time_and_only_where_it_is_worth_it() -> None:
    """Lists are of one type in all batches of a layer."""
    plain = replace(FAST, short=False)
    times = {8: {MEASURED: 5.0, plain: 4.9, FAST: 4.99}, 64: {MEASURED: 6.0, plain: 3.0, FAST: 5.9}}
    assert fastest(times) == {8: MEASURED, 64: plain}  # 2 % is noise
    times[8][FAST] = 1.0
    times[64][FAST] = 3.5
    assert fastest(times) == {8: FAST, 64: FAST}


def test_the_launcher_asks_the_gpu_for_what_a_form_needs() -> None:
    assert cuda_kernel.launch_options(MEASURED, 3) == {"grid": 3, "block": 1024}
    assert cuda_kernel.launch_options(replace(CLUSTER, pdl=True), 8) == {
        "grid": 1,
        "cluster": 8,
        "block": 256,
        "programmatic_stream_serialization": True,
    }
    LaunchConfig = pytest.importorskip("cuda.core").LaunchConfig
    assert hasattr(LaunchConfig, "cluster")  # setting it asks the driver
    LaunchConfig(**cuda_kernel.launch_options(replace(LANES, pdl=True), 1))


def test_only_who_may_is_overwritten_and_gaps_ask_for_the_first_form(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The public operator never writes to the ids that it is given; a layer's own may be."""
    launched: list[tuple[Variant, bool]] = []

    def launch(variant: Variant, batch: Batch, plan: Plan, counters: Any, out: Any) -> None:
        launched.append((variant, out is batch.ids))

    monkeypatch.setattr(cuda_kernel, "_gpu", lambda device: H100)
    monkeypatch.setattr(cuda_kernel, "variant_for", lambda *_: FAST)
    monkeypatch.setattr(cuda_kernel, "launch", launch)
    batch, plan = batch_and_plan(1)
    assert cuda_kernel.run(batch, plan, None) is not batch.ids
    assert cuda_kernel.run_in_place(batch, plan, None) is batch.ids
    apart = Batch(batch.ids.repeat(1, 2)[:, :K], batch.weights, batch.rows)
    assert cuda_kernel.run_in_place(apart, plan, None) is not apart.ids
    assert launched == [(FAST, False), (FAST, True), (MEASURED, False)]
