"""vLLM takes this machine for one with an H100; in all tests, as a plug-in of pytest (`-p`)."""

from __future__ import annotations

import importlib
from contextlib import suppress
from typing import Any


def take_for_cuda() -> str:
    """vLLM's own platform with an H100 where its compiled parts are (NVML would say so, and never
    wakes CUDA); else one that says so and can nothing."""
    import vllm.platforms
    from vllm.platforms.interface import DeviceCapability, Platform, PlatformEnum

    class StandIn(Platform):  # type: ignore[misc]
        _enum, device_name, device_type = PlatformEnum.CUDA, "cuda", "cuda"

    base = StandIn
    with suppress(ImportError):
        base = importlib.import_module("vllm.platforms.cuda").NonNvmlCudaPlatform

    class Hopper(base):  # type: ignore[misc, valid-type]
        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> Any:
            return DeviceCapability(9, 0)

        @classmethod
        def get_device_name(cls, device_id: int = 0) -> str:
            return "NVIDIA H100 80GB HBM3"

        @classmethod
        def get_device_total_memory(cls, device_id: int = 0) -> int:
            return 80 * 2**30

    vllm.platforms._current_platform = Hopper()
    return str(base.__name__)


def pytest_configure() -> None:
    take_for_cuda()
