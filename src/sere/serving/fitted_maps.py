"""An engine fits linear maps to what it reads for its own table, some layers at a time.

The text is read once for each group of layers. Of these, their experts' inputs wait on the host and
sums [E, E, H] on the device, of so many layers as the bounds below allow, and of one at least. Then
each expert is asked for its outputs on its own rows, and only the sums of one expert are held.
"""

from __future__ import annotations

import collections
import logging
from collections.abc import Sequence
from typing import Any

import torch

from sere.fitting.mapping import shortcomings
from sere.maps import LayerMaps
from sere.serving.observing import Observation
from sere.serving.refusal import ServingError
from sere.serving.symbols import symbol
from sere.statistics import LayerStatistics

_LOG = logging.getLogger("vllm.sere")
_HOST, _DEVICE = 2**30, 2**29  # bytes


def at_once(runners: Sequence[Any], tokens: int, dtype: torch.dtype) -> int:
    """How many layers (vLLM's `MoERunner`s) are observed in one reading; the same on all ranks."""
    moe = runners[0].moe_config
    E, H = int(moe.num_logical_experts), int(moe.hidden_dim_unpadded)
    rows, means = tokens * (H * dtype.itemsize + E + 1), 4 * E * E * H
    return max(1, min(_HOST // rows, _DEVICE // means))


def fitted(
    worker: Any, observation: Observation, tokens: int, rank: int
) -> tuple[dict[int, LayerStatistics] | None, dict[int, LayerMaps]]:
    """Statistics (see `Observation.finished`) and maps of the layers that were observed, by index.

    Every rank runs its part of the experts, and the first one fits; where that fails it tells the
    others, who would wait for it.
    """
    ranks = worker.vllm_config.parallel_config.tensor_parallel_size
    found, maps, failed = None, dict[int, LayerMaps](), None
    try:
        found = observation.finished(tokens)
    except ServingError as error:
        failed = error
    with torch.inference_mode(), symbol("set_forward_context")(None, worker.vllm_config):
        for index, rows in observation.kept.items():
            chosen = None if failed else rows.chosen
            if ranks > 1:  # that all ask for the same rows, whatever a rank's rounding chose
                chosen = symbol("get_tp_group")().broadcast_object(chosen, src=0)
            if chosen is None:
                break
            output = observation.asked[index].output
            if found is None:
                collections.deque(rows.ask(output, worker.device, chosen), maxlen=0)
                continue
            sums = found[index].directed, found[index].directed_energy
            try:
                maps[index] = rows.maps(output, rank, *sums, device=worker.device, chosen=chosen)
            except RuntimeError as error:
                failed = ServingError(f"sere cannot fit maps of layer {index}: {error}")
    observation.agree(worker.device)
    if failed is not None:
        raise failed
    for line in shortcomings(maps):
        _LOG.warning("sere: %s", line)
    return found, maps
