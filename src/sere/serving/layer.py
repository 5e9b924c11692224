"""What sere adds to one MoE layer of the served model."""

from __future__ import annotations

from torch import Tensor, nn

from sere.kernels import COUNTERS, Plan, new_counters, reroute
from sere.serving.rows import RowClasses


class ReroutedLayer(nn.Module):
    """Plan and counters of one layer as buffers: their addresses never change, their content may.

    Buffers (and not plain attributes) so that vLLM's sleep mode saves and restores them;
    non-persistent so that weight loading does not look for them.
    """

    neighbours: Tensor
    settings: Tensor
    counters: Tensor

    def __init__(self, index: int, plan: Plan, rows: RowClasses, *, merges: bool = False) -> None:
        super().__init__()
        self.index = index
        self.merges = merges
        self.rows = rows
        self.calls = 0
        # Off without any work: a decision of the host, hence only where no graph can freeze it.
        self.bypassed = False
        self.recording: list[tuple[Tensor, ...]] | None = None
        self.register_buffer("neighbours", plan.neighbours, persistent=False)
        self.register_buffer("settings", plan.settings, persistent=False)
        self.register_buffer("counters", new_counters(plan.settings.device), persistent=False)

    @property
    def plan(self) -> Plan:
        return Plan(self.neighbours, self.settings)

    def follow(self, plan: Plan | None) -> None:
        """Re-route by another plan from now on; None is stock routing, at no cost on a CPU."""
        self.bypassed = plan is None and self.neighbours.device.type == "cpu"
        self.plan.copy_(plan or Plan.off(self.neighbours.shape[0]))

    def forward(self, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """Ids [T, K] after re-routing the batch under way."""
        self.calls += 1
        if self.bypassed:
            return topk_ids.clone()  # an operator must not return its input
        rows = self.rows.of(topk_ids.shape[0])
        ids = reroute(topk_ids, topk_weights, self.plan, rows, self.counters)
        if self.recording is not None:
            inputs = (topk_ids, topk_weights, rows)
            self.recording.append((*(t.detach().cpu().clone() for t in inputs), ids.cpu().clone()))
        return ids

    def stats(self) -> dict[str, int]:
        """Counters by name; copying them waits for the device."""
        return dict(zip(COUNTERS, self.counters.tolist(), strict=True))
