"""The operator: one function, one specification, several implementations.

`sere.kernels.reference` is the specification; implementations are tested to equal it bit for bit.
`torch.ops.sere.route` is the operator as PyTorch sees it: opaque to `torch.compile`, and free of
host syncs, so that CUDA graphs can hold it. It scales weights in place.
For everyone; imports policy and files.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sere.kernels.batch import Batch
from sere.kernels.freed import freed_weights
from sere.kernels.implementations import implementation_for, load, load_vote
from sere.kernels.plan import Plan
from sere.kernels.reference import COUNTERS, RowClass, keeping

ID_TYPES = (torch.int16, torch.int32, torch.int64)
"""Types of expert ids: vLLM's routers give int32, those in front of DeepEP and NIXL int64."""
WEIGHT_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

__all__ = [
    "COUNTERS",
    "Batch",
    "Plan",
    "RowClass",
    "freed_weights",
    "implementation_for",
    "keeping",
    "new_counters",
    "reroute",
    "vote",
]


def new_counters(device: torch.device | str | None = None) -> Tensor:
    """Zeroed counters [len(COUNTERS)] int64 for `reroute` to add to."""
    return torch.zeros(len(COUNTERS), dtype=torch.int64, device=device)


def reroute(
    topk_ids: Tensor,
    topk_weights: Tensor,
    plan: Plan,
    rows: Tensor | None = None,
    counters: Tensor | None = None,
    votes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Move tokens of secondary experts to the most similar primary expert of the batch.

    topk_ids: [T, K] int16, int32 or int64, the router's choice, slots in any order; never
        written to.
    topk_weights: [T, K] floating point, the combine weights (not logits) of those slots; never
        written to.
    plan: neighbour lists, errors, scales and settings of this layer, on the same device.
    rows: [T] int8 `RowClass` or `keeping(n)` on the same device; None means that all rows are FAST.
    counters: optional [len(COUNTERS)] int64 on the same device, added to in place.
    votes: [2 E + 1] int32 on the same device, the elementwise minimum of this batch's `vote` and
        others'; None means that no other batch has a say.

    Returns new ids and weights [T, K] of the same dtypes; weights differ only where the plan
    scales them. The rules are listed in `sere.kernels.reference`.
    Raises `ValueError` for shapes that do not fit together, and for other types.
    """
    _check(Batch(topk_ids, topk_weights, rows))
    if votes is not None and votes.shape != (2 * plan.num_experts + 1,):
        raise ValueError(f"votes {list(votes.shape)}: expected [{2 * plan.num_experts + 1}]")
    weights = topk_weights.clone(memory_format=torch.contiguous_format)
    ids: Tensor = torch.ops.sere.route(
        topk_ids,
        weights,
        plan.neighbours,
        plan.errors,
        plan.scales,
        plan.settings,
        plan.pool,
        rows,
        counters,
        votes,
    )
    return ids, weights


def vote(topk_ids: Tensor, topk_weights: Tensor, plan: Plan, rows: Tensor | None = None) -> Tensor:
    """What a batch says of each expert, [2 E + 1] int32, for `reroute` to be given (the arguments
    are the same): the smaller the stronger, so that ranks combine theirs by a minimum."""
    batch = Batch(topk_ids, topk_weights, rows)
    _check(batch)
    name = implementation_for(topk_ids.device, plan.num_experts, topk_ids.shape[1])
    return load_vote(name)(batch, plan)


def _check(batch: Batch) -> None:
    ids, weights, rows = batch
    if ids.ndim != 2 or ids.shape != weights.shape:
        raise ValueError(
            f"topk_ids {list(ids.shape)} and topk_weights {list(weights.shape)}: "
            "expected two [T, K] tensors of one shape"
        )
    check_types(ids.dtype, weights.dtype)
    if rows is not None and rows.shape != ids.shape[:1]:
        raise ValueError(f"rows {list(rows.shape)}: expected [T] = [{ids.shape[0]}]")


def check_types(ids: torch.dtype, weights: torch.dtype) -> None:
    """Raise `ValueError`, whatever would run the operator, for types that it does not take."""
    if ids not in ID_TYPES or weights not in WEIGHT_TYPES:
        raise ValueError(
            f"topk_ids {ids}, topk_weights {weights}: expected ids of {_listed(ID_TYPES)} and "
            f"weights of {_listed(WEIGHT_TYPES)}; convert them (or are the arguments swapped?)"
        )


def _listed(types: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in types)


def _route(
    topk_ids: Tensor,
    topk_weights: Tensor,
    neighbours: Tensor,
    errors: Tensor,
    scales: Tensor,
    settings: Tensor,
    pool: Tensor,
    rows: Tensor | None,
    counters: Tensor | None,
    votes: Tensor | None = None,
) -> Tensor:
    run = load(implementation_for(topk_ids.device, len(neighbours), topk_ids.shape[1]))
    plan = Plan(neighbours, errors, scales, settings, pool)
    return run(Batch(topk_ids, topk_weights, rows), plan, counters, votes)


def _like_ids(topk_ids: Tensor, *others: Tensor | None) -> Tensor:
    return torch.empty_like(topk_ids, memory_format=torch.contiguous_format)


_LIBRARY: Any = torch.library.Library("sere", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(
    "route(Tensor topk_ids, Tensor(a!) topk_weights, Tensor neighbours, Tensor errors, "
    "Tensor scales, Tensor settings, Tensor pool, Tensor? rows, Tensor(b!)? counters, "
    "Tensor? votes=None) -> Tensor"
)
_LIBRARY.impl("route", _route, "CompositeExplicitAutograd")
torch.library.register_fake("sere::route", _like_ids, lib=_LIBRARY)
