"""What sere adds to one MoE layer of the served model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import cached_property

import torch
from torch import Tensor, nn

from sere.kernels import (
    COUNTERS,
    Batch,
    Plan,
    check_types,
    cuda_kernel,
    implementation_for,
    reference,
)
from sere.kernels.implementations import load, load_vote
from sere.serving import second_engine
from sere.serving.live import Live
from sere.serving.parallel import share_votes
from sere.serving.rows import RowClasses
from sere.serving.stand_ins import StandIns


class ReroutedLayer(nn.Module):
    """Plan and counters of one layer as buffers: their addresses never change, their content may.

    Buffers (and not plain attributes) so that vLLM's sleep mode saves and restores them;
    non-persistent so that weight loading does not look for them. Settings and counters are this
    layer's part of `Live`, the row classes are all layers'.
    """

    neighbours: Tensor
    errors: Tensor
    scales: Tensor
    settings: Tensor
    pool: Tensor
    counters: Tensor

    def __init__(self, name: str, plan: Plan, rows: RowClasses, live: Live, place: int) -> None:
        """plan: on the device of `rows` and `live`. place: this layer's row in `live`."""
        super().__init__()
        self.name = name
        self.rows = rows
        self.live = live
        self.called = False
        self.stand_ins: StandIns | None = None  # where maps may answer
        self.traced = True  # whether torch.compile may look into the layer's router
        self.recording: list[tuple[Tensor, ...]] | None = None
        live.settings[place].copy_(plan.settings)
        if self._implementation(plan) == "cuda":
            plan = cuda_kernel.prepared(plan, live.K)
        shared = {"settings": live.settings[place], "counters": live.counters[place]}
        own = {part.name: getattr(plan, part.name) for part in fields(plan)}
        for name_, buffer in {**own, **shared, "row_classes": rows.buffer}.items():
            self.register_buffer(name_, buffer, persistent=False)

    @cached_property
    def plan(self) -> Plan:
        """The buffers as a plan: looked up once, as a module's attributes cost microseconds."""
        return Plan(self.neighbours, self.errors, self.scales, self.settings, self.pool)

    @cached_property
    def _run(self) -> Callable[[Tensor, Tensor, int], Tensor]:
        """The operator on this layer's buffers, without checks: shapes are vLLM's own."""
        plan, counters, rows = self.plan, self.counters, self.rows
        name = self._implementation(plan)
        if self.live.together:
            return self._run_together(name)
        if name == "numba":
            second_engine.allow()
            from sere.kernels.numba_kernel import bound

            return bound(plan, counters, rows.buffer)
        if name == "cuda":  # the router's own ids, which nobody else reads
            overwrite = cuda_kernel.run_in_place
            return lambda ids, weights, T: overwrite(
                Batch(ids, weights, rows.of(T)), plan, counters
            )
        run = load(name)
        return lambda ids, weights, T: run(Batch(ids, weights, rows.of(T)), plan, counters)

    def _implementation(self, plan: Plan) -> str:
        return implementation_for(plan.settings.device, plan.num_experts, self.live.K)

    def _run_together(self, name: str) -> Callable[[Tensor, Tensor, int], Tensor]:
        """The same in two halves, and between them what other ranks' rows say."""
        plan, counters, rows = self.plan, self.counters, self.rows
        vote, run = load_vote(name), load(name)

        def run_together(ids: Tensor, weights: Tensor, T: int) -> Tensor:
            batch = Batch(ids, weights, rows.of(T))
            try:
                votes = vote(batch, plan)
            except Exception:
                self._abstain(ids, weights)
                raise
            share_votes(votes)
            return run(batch, plan, counters, votes)

        return run_together

    def follow(self, plan: Plan | None) -> None:
        """Re-route by another plan from now on; None is stock routing."""
        self.plan.copy_(plan or Plan.off(self.plan.num_experts))

    def forward(self, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """Ids [T, K] after re-routing the batch under way; weights are scaled in place.

        Once the engine serves nothing is raised: what fails leaves the ids as they are.
        """
        if not self.called:  # setting a module's attribute costs microseconds
            check_types(topk_ids.dtype, topk_weights.dtype)  # in start-up's first pass
            self._compile(topk_ids.dtype, topk_weights.dtype)
            self.called = True
        T = topk_ids.shape[0]
        if self.stand_ins is not None:
            self.stand_ins.forget()
        if self.live.idle or (T == 1 and self.live.lone and self.recording is None):
            return topk_ids
        if not self.rows.filled <= T <= self.rows.size:
            self.rows.surprise(T)
            self._abstain(topk_ids, topk_weights)
            return topk_ids
        try:
            return self._reroute(topk_ids, topk_weights, T)
        except Exception as error:
            self.rows.incidents.survive("re-routing a layer", error)
            return topk_ids

    def _compile(self, ids: torch.dtype, weights: torch.dtype) -> None:
        """On CPUs, where no pass of start-up needs the operator: the first request would wait for
        it, 10 s where sere has just been installed."""
        if self._implementation(self.plan) == "numba":
            second_engine.allow()
            from sere.kernels.numba_kernel import compile_for

            compile_for(ids, weights)
            if self.stand_ins is not None:
                self.stand_ins.compile_for(ids)

    def _abstain(self, topk_ids: Tensor, topk_weights: Tensor) -> None:
        """Vote as rows that are not real do, where other ranks wait for a vote."""
        if self.live.together:
            void = torch.zeros(len(topk_ids), dtype=torch.int8, device=topk_ids.device)
            share_votes(reference.vote(Batch(topk_ids, topk_weights, void), self.plan))

    def _reroute(self, topk_ids: Tensor, topk_weights: Tensor, T: int) -> Tensor:
        if self.recording is None:
            return self._routed(topk_ids, topk_weights, T)
        before = [t.detach().cpu().clone() for t in (topk_ids, topk_weights, self.rows.of(T))]
        ids = self._routed(topk_ids, topk_weights, T)
        self.recording.append((*before, ids.cpu().clone(), topk_weights.cpu().clone()))
        return ids

    def _routed(self, topk_ids: Tensor, topk_weights: Tensor, T: int) -> Tensor:
        if self.stand_ins is None:
            return self._run(topk_ids, topk_weights, T)
        return self.stand_ins.noting(self._run, topk_ids, topk_weights, T)

    def stats(self) -> dict[str, int]:
        """Counters by name; copying them waits for the device."""
        return dict(zip(COUNTERS, self.counters.tolist(), strict=True))
