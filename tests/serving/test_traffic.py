"""Which rows of which steps an engine measures its experts on, and that no request notices; engines
that do so are started in test_self_calibration.py."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sere.serving.auto import Traffic
from sere.serving.no_table import NoTable
from sere.serving.observing import Observation
from sere.serving.traffic import Watch, Watched, obstacle_to_watching

pytestmark = pytest.mark.engine


def config(*, mode: str = "NONE", captured: int = 0, largest: int = 64, **parallel: Any) -> Any:
    """A stand-in for vLLM's config."""
    from vllm.config import CUDAGraphMode

    names = ("data", "pipeline", "prefill_context", "decode_context", "tensor")
    sizes = {f"{name}_parallel_size": 1 for name in names}
    return SimpleNamespace(
        parallel_config=SimpleNamespace(**{**sizes, "enable_eplb": False, **parallel}),
        compilation_config=SimpleNamespace(
            max_cudagraph_capture_size=captured, cudagraph_mode=CUDAGraphMode[mode]
        ),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=largest),
        model_config=SimpleNamespace(enforce_eager=mode == "NONE"),
        device_config=SimpleNamespace(device=torch.device("cpu")),
        uniform_decode_query_len=1,
        lora_config=None,
        speculative_config=None,
    )


def rows_read(asked: Traffic, steps: list[Any], **given: Any) -> list[list[int]]:
    """Of each step the rows that are observed; a step: (name, rows, prefilling) of its requests."""
    read: list[list[int]] = []
    observation = SimpleNamespace(
        sums={},
        broken=None,
        short_of=lambda seen: None,
        follow=lambda parts: read.append(sorted(torch.cat([part for part, _ in parts]).tolist())),
        watching=nullcontext,
    )
    worker = SimpleNamespace(
        vllm_config=config(**given), rank=1, get_model=lambda: torch.nn.Identity()
    )
    session = SimpleNamespace(incidents=SimpleNamespace(serving=True))
    watch = Watch(worker, observation, Watched(asked, "frobenius", None, None, {}), session)  # type: ignore[arg-type]
    for step in steps:
        before = len(read)
        names, rows, prefilling = zip(*step, strict=True)
        watch.begin(names, np.array(rows), np.array(prefilling))
        read += [[]] * (before == len(read))
    return read


def test_rows_of_prompts_are_observed_a_few_a_step_and_not_for_ever() -> None:
    step = [("a", 1, False), ("b", 10, True), ("c", 1, False), ("d", 6, True)]
    every = [*range(1, 11), *range(12, 18)]
    assert rows_read(Traffic(share=1, rows=16), [step]) == [every]
    some = rows_read(Traffic(share=1, rows=4, tokens=14), [step] * 6)
    assert [len(rows) for rows in some] == [4, 4, 4, 2, 0, 0]
    rows = [row for step in some[:3] for row in step]
    assert len(set(rows)) == len(rows)  # other rows in each step
    assert set(rows) <= set(every)


def test_a_share_of_the_prompts_is_observed_whole_and_by_every_rank_alike() -> None:
    steps = [[(f"request-{i}", 2, True)] for i in range(400)]
    read = rows_read(Traffic(share=0.25), steps)
    assert read == rows_read(Traffic(share=0.25), steps)
    assert 60 < sum(map(bool, read)) < 140
    assert all(rows in ([], [0, 1]) for rows in read)


@pytest.mark.parametrize(
    ("given", "observed"),
    [
        ({}, (True, True, True)),
        ({"mode": "PIECEWISE", "captured": 8}, (False, False, True)),
        ({"mode": "FULL_AND_PIECEWISE", "captured": 8}, (False, False, True)),
        ({"mode": "FULL_DECODE_ONLY", "captured": 8}, (False, True, True)),
    ],
    ids=["eager", "piecewise", "full and piecewise", "full for decoding"],
)
def test_steps_that_replay_a_graph_are_not_observed(
    given: dict[str, Any], observed: tuple[bool, ...]
) -> None:
    lone, small, large = [("a", 1, True)], [("a", 5, True)], [("a", 9, True)]
    read = rows_read(Traffic(share=1), [lone, small, large], **given)
    assert tuple(map(bool, read)) == observed


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"mode": "PIECEWISE", "captured": 64}, "every step replays a graph"),
        ({"mode": "FULL_DECODE_ONLY", "captured": 64}, None),
        ({"mode": "PIECEWISE", "captured": 32}, None),
        ({"data_parallel_size": 2}, "lockstep"),
        ({"enable_eplb": True}, "EPLB"),
    ],
    ids=str,
)
def test_an_engine_none_of_whose_steps_can_be_observed_is_refused(
    given: dict[str, Any], reason: str | None
) -> None:
    told = obstacle_to_watching(config(**given))
    assert told is None if reason is None else reason in str(told)


def test_what_fails_while_it_is_judged_is_the_reason_that_there_is_no_table() -> None:
    taken: list[Any] = []
    observation = SimpleNamespace(
        sums={0: SimpleNamespace(tokens=0)},  # and no folds
        broken=None,
        short_of=lambda seen: None,
        follow=lambda parts: None,
        watching=nullcontext,
    )
    worker = SimpleNamespace(vllm_config=config(), rank=0, get_model=torch.nn.Identity)
    session = SimpleNamespace(
        incidents=SimpleNamespace(serving=True), take=taken.append, observer="the watch"
    )
    asked = Traffic(share=1, tokens=16)
    watch = Watch(worker, observation, Watched(asked, "frobenius", None, None, {}), session)  # type: ignore[arg-type]
    for _ in range(2):
        watch.begin(["a"], np.array([4]), np.array([True]))
    (found,) = taken
    assert isinstance(found, NoTable) and "no table: AttributeError" in found.reason
    assert session.observer is None


def test_a_step_survives_what_fails_while_it_is_observed() -> None:
    class Experts:
        quant_config, apply_router_weight_on_input = None, False
        quant_method = SimpleNamespace()

        def forward_modular(self, x: torch.Tensor, **_: Any) -> torch.Tensor:
            if len(x) != 3:
                raise MemoryError("no room for so many rows")
            return x + 1

    runner = SimpleNamespace(
        layer_id=0,
        layer_name="layer",
        moe_config=SimpleNamespace(num_logical_experts=4),
        routed_experts=Experts(),
        routed_output_transform=None,
    )
    observation = Observation([runner], "frobenius", rows=8, adds_up=True, ranks=1, serves=True)
    x, ids = torch.zeros(3, 8), torch.tensor([[0], [1], [2]])
    with observation.watching():
        observation.follow([(torch.tensor([0, 2]), 0)])
        out = runner.routed_experts.forward_modular(
            x=x, topk_weights=torch.ones(3, 1), topk_ids=ids
        )
    assert (out == 1).all()
    assert observation.broken == "no room for so many rows"
