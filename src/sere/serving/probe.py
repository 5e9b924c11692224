"""What a worker's device can do, measured where the engine runs, with its threads."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

_BYTES = 2**30
_REPEATS = 10


def sere_probe(worker: Any) -> dict[str, float]:
    """bandwidth: bytes/s of reading memory, the best of three ways. kv_bytes: that one token's
    keys and values take, all layers."""
    device, dtype = worker.device, worker.model_config.dtype
    return {
        "bandwidth": bandwidth(device, dtype),
        "kv_bytes": kv_bytes(worker.model_runner),
    }


def bandwidth(device: torch.device, dtype: torch.dtype) -> float:
    """Bytes/s of a sum, a dot product and a matrix-vector product over 1 GiB, with the engine's own
    threads: the best of them, as each only reads, and of no cache, as none is so large."""
    rows = _BYTES // dtype.itemsize // 4096
    # Not zeros: pages of which nothing was written are all one page, which caches hold.
    matrix = torch.ones(rows, 4096, dtype=dtype, device=device)
    vector, (front, back) = matrix[0].clone(), matrix.flatten().chunk(2)
    ways: list[Callable[[], Any]] = [
        matrix.sum,
        lambda: torch.dot(front, back),
        lambda: matrix @ vector,
    ]
    return matrix.numel() * dtype.itemsize / min(_seconds(run, device) for run in ways)


def kv_bytes(runner: Any) -> float:
    """Bytes of one token's keys and values in all layers."""
    return float(
        sum(
            len(group.layer_names)
            * group.kv_cache_spec.page_size_bytes
            / group.kv_cache_spec.block_size
            for group in runner.kv_cache_config.kv_cache_groups
        )
    )


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    """The fastest of a few runs."""
    taken = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        run()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        taken.append(time.perf_counter() - start)
    return min(taken)
