"""Which code runs the operator on which device.

Each implementation is a module with two functions, `run` and `vote` (see `sere.kernels.reference`),
imported on first use: none of their libraries is needed on a machine that has no use for it, and
vLLM 0.32's CPU workers fail to start in a process that has numba's llvmlite loaded.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch import Tensor

from sere.kernels.batch import Batch
from sere.kernels.plan import Plan

Vote = Callable[[Batch, Plan], Tensor]


class Implementation(Protocol):
    """`sere.kernels.reference.run`."""

    def __call__(
        self, batch: Batch, plan: Plan, counters: Tensor | None, votes: Tensor | None = None, /
    ) -> Tensor: ...


MODULES = {
    "reference": "sere.kernels.reference",
    "numba": "sere.kernels.numba_kernel",
    "triton": "sere.kernels.triton_kernel",
    "cuda": "sere.kernels.cuda_kernel",
}
# What linear maps answer (see `sere.kernels.answers`), beside which implementation of the operator.
ANSWERS = {
    "reference": "sere.kernels.answers",
    "numba": "sere.kernels.numba_answers",
    "triton": "sere.kernels.triton_answers",
    "cuda": "sere.kernels.triton_answers",
}
# What an implementation needs besides torch, and the devices it serves.
NEEDS: dict[str, tuple[str, ...]] = {
    "reference": (),
    "numba": ("numba",),
    "triton": ("triton",),
    "cuda": ("cuda.core", "cuda.bindings"),
}
DEVICES: dict[str, tuple[str, ...]] = {
    "numba": ("cpu",),
    "triton": ("cuda", "xpu"),
    "cuda": ("cuda",),
}
# In order of preference. ROCm's devices are called cuda, too.
DEFAULTS: dict[str, tuple[str, ...]] = {
    "cpu": ("numba",),
    "cuda": ("cuda", "triton"),
    "xpu": ("triton",),
}
# The most experts, and the most a token, that an implementation goes to.
LIMITS: dict[str, tuple[int, int]] = {"cuda": (1024, 32)}

ENVIRONMENT = "SERE_KERNEL"
"""Environment variable that names an implementation to be preferred to the default."""


@functools.cache
def load(name: str) -> Implementation:
    """The function behind a name of `MODULES`; `ImportError` where it has no library."""
    run: Implementation = import_module(MODULES[name]).run
    return run


@functools.cache
def load_vote(name: str) -> Vote:
    """The first half of `load(name)`, for ranks that share what it gives."""
    vote: Vote = import_module(MODULES[name]).vote
    return vote


@functools.cache
def load_answers(name: str) -> Any:
    """The module with `keep_freed_`, `ask` and `answer_` (see `sere.kernels.answers`) beside an
    implementation of the operator."""
    there = name != "cuda" or installed("triton")
    return import_module(ANSWERS[name if there else "reference"])


def installed(name: str) -> bool:
    """Whether the libraries of an implementation are there."""
    return all(_found(module) for module in NEEDS[name])


def _found(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it is missing
        return False


def implementation_for(device: torch.device, E: int = 0, K: int = 0) -> str:
    """The name of the implementation that serves tensors of a device, for a model with E experts,
    K a token (0: any that it goes to)."""
    return _chosen(device.type, os.environ.get(ENVIRONMENT), E, K)


@functools.cache
def _chosen(device: str, asked: str | None, E: int = 0, K: int = 0) -> str:
    wanted = DEFAULTS.get(device, ())
    if asked:
        if asked not in MODULES:
            raise ValueError(f"{ENVIRONMENT}={asked}: expected one of {', '.join(MODULES)}")
        wanted = (asked, *wanted)
    names = (*wanted, "reference")
    for name, otherwise in zip(names, (*names[1:], ""), strict=True):
        reason = _obstacle(name, device) or _too_large(name, E, K)
        if reason is None:
            return name
        warnings.warn(f"sere: no {name} kernel: {reason}; {otherwise} serves", stacklevel=2)
    raise AssertionError("the reference serves every device")


def _too_large(name: str, E: int, K: int) -> str | None:
    most = LIMITS.get(name, (E, K))
    fits = all(size <= limit for size, limit in zip((E, K), most, strict=True))
    return None if fits else f"it goes to E={most[0]}, K={most[1]}"


def obstacles(device: str) -> dict[str, str | None]:
    """By implementation why it cannot serve a type of device, or None; the reference always can."""
    return {name: _obstacle(name, device) for name, needs in NEEDS.items() if needs}


def _obstacle(name: str, device: str) -> str | None:
    """Why an implementation cannot serve a device, or None. Compiles what is compiled first."""
    if device not in DEVICES.get(name, (device,)):
        return f"it does not run on {device}"
    if name == "cuda" and torch.version.hip:
        return "it is for NVIDIA GPUs"
    if not installed(name):
        return f"{', '.join(NEEDS[name])} is not installed"
    if name == "cuda":
        from sere.kernels.cuda_kernel import obstacle

        return obstacle()
    return None
