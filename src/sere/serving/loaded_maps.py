"""Which linear maps an engine loads (`fill: "linear"`, `"constant"`), and where they answer.

They lie on the device from the moment that the model is built, so that vLLM counts them before it
sizes the KV cache. They answer where vLLM's own expert substitution (0.33) does.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sere.kernels.answers import NOTHING
from sere.maps import LayerMaps, served_bytes
from sere.policy import Policy
from sere.serving.contract import LINEAR
from sere.serving.no_table import NoTable
from sere.serving.refusal import ServingError
from sere.serving.rows import RowClasses
from sere.serving.settings import Settings
from sere.serving.stand_ins import StandIns
from sere.serving.symbols import lacking, symbol
from sere.table import Table

_CANNOT = "sere cannot let linear maps answer in"
_LOG = logging.getLogger("vllm.sere")


def ranks_to_load(settings: Settings, table: Table | NoTable) -> dict[int, int]:
    """By layer, of which rank maps are loaded: what the first policy needs, or all if asked; or
    will be, once the engine has fitted them."""
    if isinstance(table, NoTable):
        rank = settings.auto and settings.auto.maps
        return dict.fromkeys(table.layers, rank) if rank else {}
    if settings.maps:
        return dict.fromkeys(table.layers, table.maps_for(Policy(fill="linear")).R)
    own = {index: settings.policy.for_layer(index) for index in table.layers}
    return {index: policy.rank_of(table.R) for index, policy in own.items() if policy.frees}


def unloaded(policy: Policy, loaded: Mapping[int, int], table: Table) -> str | None:
    """Why a live engine with these ranks by layer cannot switch to a policy, or None."""
    for index in table.layers:
        own = policy.for_layer(index)
        if own.frees and own.rank_of(table.R) > loaded.get(index, NOTHING):
            return (
                f'sere cannot switch to fill="{own.fill}": maps of rank {own.rank_of(table.R)} for '
                f"layer {index} were not loaded when the engine started; start it with this "
                'policy, or with "maps": true beside another'
            )
    return None


def obstacle_to_maps(config: Any) -> str | None:
    """Why an engine cannot let maps answer for experts, or None."""
    if config.lora_config is not None:
        return "the maps know nothing of adapters, which change what experts answer"
    return lacking(LINEAR)


class Answers:
    """The maps of one worker's layers.

    ranks: by layer, of what is loaded (see `ranks_to_load`).
    """

    def __init__(
        self,
        table: Table | NoTable,
        policy: Policy,
        ranks: Mapping[int, int],
        rows: RowClasses,
        say: int | None,
    ) -> None:
        """policy: the first. say: the model's width, to log what is loaded; None logs nothing.
        Without a table there is room, which answers nothing until `learn` has filled it."""
        self.ranks = dict(ranks)
        self._table, self._policy, self._rows = table, policy, rows
        self._layers: dict[int, StandIns] = {}
        self._ids, self._weights = (
            torch.zeros(rows.size, table.fingerprint.K, dtype=dtype, device=rows.buffer.device)
            for dtype in (torch.int32, torch.float32)
        )
        if say:
            to_come, E = isinstance(table, NoTable), table.fingerprint.E
            H = say if isinstance(table, NoTable) else table.maps_for(Policy(fill="linear")).H
            size = sum(served_bytes(E, H, min(rank, H)) for rank in ranks.values())
            _LOG.info(
                "sere: linear maps of rank %d in %d layers: %.1f MB on every device (shared among "
                "pipeline stages), %s with the model",
                *(max(ranks.values()), len(ranks), size / 1e6),
                "reserved" if to_come else "loaded",
            )

    @property
    def size(self) -> int:
        """Bytes on the device."""
        return sum(layer.size for layer in self._layers.values())

    def attach(self, runner: Any) -> StandIns | None:
        """Let maps answer in a layer (vLLM's `MoERunner`); None where none are loaded for it.

        Raises `ServingError` where they could not.
        """
        index, experts = runner.layer_id, runner.routed_experts
        if index not in self.ranks:
            return None
        served = runner.moe_config.hidden_dim_unpadded
        maps = self._maps_of(index, served)
        H = maps.constant.shape[1]
        if reason := _obstacle(experts, H, served):
            raise ServingError(f"{_CANNOT} {runner.layer_name}: {reason}")
        adds = functools.partial(_adds, runner)
        own = StandIns(maps, self._ids, self._weights, self._rows, adds)
        alone = experts.forward_modular
        experts.__class__ = answering(experts.__class__)
        # Past nn.Module, which would take it for a second place of the buffers.
        object.__setattr__(experts, "_sere", (own, runner.sere, alone))
        self._layers[index] = own
        self._follow(index, self._policy)
        return own

    def _maps_of(self, index: int, H: int) -> LayerMaps:
        """A layer's maps, or the room for them; H: the width of what they are to map."""
        rank = self.ranks[index]
        if isinstance(self._table, NoTable):
            return LayerMaps.empty(self._table.fingerprint.E, H, min(rank, H))
        assert self._table.maps is not None
        return self._table.maps.layer(index).of_rank(rank)

    def learn(self, index: int, maps: LayerMaps) -> None:
        """Fill the room of a layer; another pipeline stage's is left to that."""
        if index in self._layers:
            self._layers[index].learn(maps)

    def go_by(self, table: Table) -> None:
        """Answer by policies for this table from the next one on."""
        self._table = table

    def follow(self, policy: Policy | None) -> None:
        """Answer by a policy from now on; None is stock routing."""
        for index in self._layers:
            self._follow(index, policy)

    def _follow(self, index: int, policy: Policy | None) -> None:
        own = policy and policy.for_layer(index)
        R = None if isinstance(self._table, NoTable) else self._table.R
        rank = own.rank_of(R) if own and own.frees and R is not None else NOTHING
        self._layers[index].follow(rank)


def _obstacle(experts: Any, H: int, served: int) -> str | None:
    """Why maps of width H cannot answer for experts of the width `served`, or None."""
    if experts.apply_router_weight_on_input:
        return "its router weighs the experts' input, and a map stands for an unweighted output"
    if served != H:
        return (
            f"they were fitted to an input of width {H} and it has {served}; calibrate the model "
            "that you serve, with --maps"
        )
    return None


def _adds(runner: Any) -> bool:
    """Whether this rank adds what maps answer: every one that has the whole of an output, and the
    first of those whose parts are summed later."""
    return bool(runner._fused_output_is_reduced) or symbol("get_tp_group")().rank_in_group == 0


def check_finalized(runner: Any) -> None:
    """Raise `ServingError` if the experts leave their sum over slots to a later kernel, where
    nothing can be added to it."""
    if runner.sere.stand_ins is not None and runner.moe_config.use_deferred_moe_finalize:
        raise ServingError(
            f"{_CANNOT} {runner.layer_name}: vLLM finishes its experts' output in a later kernel; "
            "take another --moe-backend, or a policy without fill"
        )


@functools.cache
def answering(experts: type) -> type:
    """A subclass of a class of vLLM's routed experts to whose output maps add their answers."""
    compute = experts.forward_modular  # type: ignore[attr-defined]

    def forward_modular(
        self: Any, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        own, layer, _ = self._sere
        if traced := layer.traced and torch.compiler.is_compiling():
            inner = torch.ops.sere.ask(x, topk_ids, layer.name, own.R)
        else:
            inner = own.ask(x)
        output = compute(self, x, topk_weights, topk_ids, *args, **kwargs)
        if traced:
            torch.ops.sere.answer(output, inner, layer.name)
        else:
            own.answer_(output, inner)
        return output

    return type(f"Answering{experts.__name__}", (experts,), {"forward_modular": forward_modular})
