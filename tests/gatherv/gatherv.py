"""vLLM 0.32's CPU engine says that it runs data-parallel MoE layers, but its communicator has
neither of the two collectives that they need, and dies of the first step: `NotImplementedError` in
`all_gatherv`. This vLLM plug-in adds them, by what `torch.distributed` has for CPUs."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed


def register() -> None:
    """Entry point of `vllm.general_plugins`."""
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    CpuCommunicator.all_gatherv = all_gatherv
    CpuCommunicator.reduce_scatterv = reduce_scatterv


def all_gatherv(communicator: Any, input_: Any, dim: int, sizes: list[int] | None) -> Any:
    """Rows of all ranks, in their order; sizes: how many each has."""
    if isinstance(input_, list):
        return [all_gatherv(communicator, one, dim, sizes) for one in input_]
    assert dim == 0
    rows = sizes or [len(input_)] * communicator.world_size
    pieces = [input_.new_zeros(max(rows), *input_.shape[1:]) for _ in rows]
    own = input_.new_zeros(pieces[0].shape)
    own[: len(input_)] = input_
    torch.distributed.all_gather(pieces, own, group=communicator.device_group)
    return torch.cat([piece[:n] for piece, n in zip(pieces, rows, strict=True)])


def reduce_scatterv(communicator: Any, input_: Any, dim: int, sizes: list[int] | None) -> Any:
    """This rank's rows of the sum over all ranks."""
    assert dim == 0
    world, rank = communicator.world_size, communicator.rank_in_group
    rows = sizes or [len(input_) // world] * world
    total = input_.contiguous().clone()
    torch.distributed.all_reduce(total, group=communicator.device_group)
    return total.split(rows)[rank].clone()
