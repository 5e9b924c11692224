"""What re-routing has to know of other ranks: which of them holds an expert, and how data-parallel
ranks come to one set of primaries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from sere.serving.contract import PLACEMENT, UNION
from sere.serving.symbols import lacking, symbol

BATCHES_DISAGREE = (
    '"batches" goes by the rows of one rank, and ranks that vote together must follow the same '
    "numbers; give the policy S, tau, min_active and max_active for all sizes"
)


def expert_ranks(runner: Any, config: Any) -> Tensor | None:
    """[E] int64 on the CPU: the rank that holds each expert of a layer (vLLM's `MoERunner`).

    None without expert parallelism, and where it is not one rank for good (EPLB moves and copies
    experts while it serves).
    """
    if lacking(PLACEMENT):
        return None
    manager, E = runner.routed_experts.expert_map_manager, runner.moe_config.num_logical_experts
    if not manager.use_ep or config.parallel_config.enable_eplb or manager.global_num_experts != E:
        return None
    held = symbol("determine_expert_map")
    with torch.device("cpu"):  # vLLM builds models with the accelerator as default device
        maps = [
            held(manager.ep_size, rank, E, manager.placement_strategy)[1]
            for rank in range(manager.ep_size)
        ]
        return (torch.stack(maps) >= 0).int().argmax(0)


def share_votes(votes: Tensor) -> None:
    """Replace a vote by the minimum of all data-parallel ranks' votes, in place.

    Every rank must come here in every layer of every pass. vLLM's own dispatch, which follows in
    the same layer, needs that too: idle ranks run dummy batches for it.
    """
    group = symbol("get_dp_group")().device_group
    torch.distributed.all_reduce(votes, op=torch.distributed.ReduceOp.MIN, group=group)


def obstacle_to_one_union(config: Any, batches: Mapping[int, Any]) -> str | None:
    """Why data-parallel ranks cannot vote together, or None; batches: as in `Policy`."""
    parallel = config.parallel_config
    obstacles = {
        "there is one data-parallel rank, whose union is of all rows anyway: nothing to add": (
            parallel.data_parallel_size == 1
        ),
        "ranks may replay graphs, or compile, without one another; add enforce_eager=True "
        "(--enforce-eager)": not config.model_config.enforce_eager,
        "pipeline stages are not known to be in step": parallel.pipeline_parallel_size > 1,
        "EPLB and elastic expert parallelism move experts and ranks while they serve": (
            parallel.enable_eplb or parallel.enable_elastic_ep
        ),
        "fault tolerance goes on without ranks that others would wait for": (
            parallel.enable_fault_tolerance
        ),
        BATCHES_DISAGREE: bool(batches),
    }
    return next((reason for reason, there in obstacles.items() if there), None) or lacking(UNION)


def obstacle_to_placement(config: Any) -> str | None:
    """Why no tolerance for an expert's own rank can be given, or None."""
    parallel = config.parallel_config
    if parallel.enable_eplb:
        return "EPLB moves and copies experts while it serves"
    ranks = parallel.tensor_parallel_size * parallel.data_parallel_size
    if not parallel.enable_expert_parallel or ranks == 1:
        return "every rank has a part of every expert; add --enable-expert-parallel"
    return lacking(PLACEMENT)
