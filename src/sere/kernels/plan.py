"""What the operator reads at run time: sorted neighbour lists instead of similarities.

A plan is made once, when a table is loaded. Every value lives in a tensor of fixed shape, so a
new policy is written into the same buffers and captured CUDA graphs stay valid.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sere.policy import Policy

NO_CEILING = 2**31 - 1
# S so large that every slot is primary: the operator is then the identity.
OFF = 2**31 - 1


@dataclass(frozen=True)
class Plan:
    """One layer's re-routing decisions, laid out for the operator.

    neighbours: [E, E-1] int32. Row u lists the other experts, most similar first (ties: lowest
        id), cut where the similarity falls below rho; -1 fills the rest.
    settings: [3] int32: S, min_active, max_active.
    """

    neighbours: Tensor
    settings: Tensor

    @property
    def num_experts(self) -> int:
        return self.neighbours.shape[0]

    @classmethod
    def build(cls, similarity: Tensor, policy: Policy, *, K: int) -> Plan:
        """Plan of one layer.

        similarity: [E, E] floating point, the larger the more alike; the diagonal is ignored.
        policy: settings of this layer (see `Policy.for_layer`).
        K: experts per token of the model; the default of `min_active`.
        """
        E = similarity.shape[0]
        policy.check_against(K, E)
        ranked = similarity.double().clone().fill_diagonal_(-torch.inf)
        values, order = torch.sort(ranked, dim=-1, descending=True, stable=True)
        neighbours = order.masked_fill(values < _threshold(values, policy), -1)[:, : E - 1]
        settings = [policy.S, policy.min_active or K, policy.max_active or NO_CEILING]
        return cls(
            neighbours.to(torch.int32).contiguous(),
            torch.tensor(settings, dtype=torch.int32, device=similarity.device),
        )

    @classmethod
    def off(cls, num_experts: int, device: torch.device | str | None = None) -> Plan:
        """A plan that leaves every batch as it is, and counts nothing."""
        return cls(
            torch.full((num_experts, num_experts - 1), -1, dtype=torch.int32, device=device),
            torch.tensor([OFF, 1, NO_CEILING], dtype=torch.int32, device=device),
        )

    def copy_(self, other: Plan) -> None:
        """Overwrite this plan in place, so that whoever holds its buffers sees the new one."""
        self.neighbours.copy_(other.neighbours)
        self.settings.copy_(other.settings)


def _threshold(ranked: Tensor, policy: Policy) -> float:
    """rho, or the quantile that stands for it; ranked: [E, E] similarities, descending by row."""
    if policy.rho_quantile is None or len(ranked) < 2:
        return policy.rho
    return torch.quantile(ranked[:, 0], policy.rho_quantile).item()
