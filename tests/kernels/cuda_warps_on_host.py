"""Every form of the CUDA kernel, compiled for the CPU with real warps (cuda_warps_on_host.cpp), and
launched by the kernel's own launcher."""

from __future__ import annotations

import ctypes
import functools
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import sere
from sere.kernels import Batch, Plan, cuda_kernel
from sere.kernels.cuda_variants import Variant
from sere.kernels.reference import NEVER
from tests.kernels.cuda_on_host import C_TYPES, COMPILER

HERE = Path(__file__).parent
KERNELS = Path(sere.__file__).parent / "kernels"


class HostKernels:
    """In the place of `cuda_kernel.Kernels`."""

    def __init__(self, switches: dict[str, str], source: Path) -> None:
        self.library = library(tuple(switches.items()), source)

    def launch(self, name: str, variant: Variant, blocks: int, *arguments: Any) -> None:
        assert name == ("reroute_lanes" if variant.lanes else "reroute_at_once")
        given = (a if isinstance(a, ctypes.c_int) else ctypes.c_longlong(a) for a in arguments)
        self.library.host_launch(blocks, *given)


def run(
    variant: Variant, batch: Batch, plan: Plan, counters: Tensor | None, source: Path = KERNELS
) -> Tensor:
    """New ids [T, K]: `batch.ids` themselves, overwritten, where the variant works in place.

    source: the folder of reroute.cu.
    """
    (_, K), E = batch.ids.shape, plan.num_experts
    types = {"ID": C_TYPES[batch.ids.dtype], "WEIGHT": C_TYPES[batch.weights.dtype]}
    kernels = HostKernels({**types, **variant.macros(E, K)}, source)
    out = batch.ids if variant.in_place else torch.full_like(batch.ids, -7)
    scratch = torch.full((2 * E + 2,), NEVER, dtype=torch.int32)
    scratch[-1] = 0
    if variant.short:
        plan = replace(plan, neighbours=plan.neighbours.to(torch.int16))
    with (
        patch.object(cuda_kernel, "_kernels_for", lambda *_: kernels),
        patch.object(cuda_kernel, "_scratch", lambda _: scratch),
    ):
        cuda_kernel.launch(variant, batch, plan, counters, out)
    assert scratch[-1] == 0 and (scratch[:-1] == NEVER).all(), "the next launch relies on it"
    return out


@functools.cache
def library(switches: tuple[tuple[str, str], ...], source: Path) -> Any:
    """The compiled functions."""
    assert COMPILER
    target = Path(tempfile.mkdtemp()) / "reroute.so"
    subprocess.run(
        [
            *(COMPILER, "-std=c++20", "-O1", "-w", "-ffp-contract=off", "-shared", "-fPIC"),
            *(f"-D{name}={value}" for name, value in switches),
            *(f"-I{source}", str(HERE / "cuda_warps_on_host.cpp"), "-o", str(target)),
        ],
        check=True,
    )
    return ctypes.CDLL(str(target))
