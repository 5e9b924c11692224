"""What the operator reads at run time: sorted neighbour lists instead of similarities.

A plan is made once, when a table is loaded. Every value lives in a tensor of fixed shape, so a
new policy is written into the same buffers and captured CUDA graphs stay valid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from sere.kernels.pool import FRACTION as FRACTION
from sere.kernels.pool import columns, joining_order, no_pool
from sere.policy import Policy, PolicyError

NO_CEILING = 2**31 - 1
# S so large that every slot is primary: the operator is then the identity.
OFF = 2**31 - 1
NO_TOLERANCE = -1

ERROR_FRACTION = 2**13
"""Errors are whole numbers of 1 / ERROR_FRACTION."""
LARGEST_ERROR = 8 * ERROR_FRACTION - 1  # keeps a loss within 31 bits, whatever the share
LOSS_FRACTION = FRACTION * ERROR_FRACTION
"""Losses (share * share * error / FRACTION) and tau are whole numbers of 1 / LOSS_FRACTION."""

OUTPUTS_UNKNOWN = (
    "tau, fill and weights need to know the experts' outputs, and this table was made without "
    "text: calibrate on text, or use S and rho alone"
)

SETTINGS = ("S", "min_active", "max_active", "tau", "scaled", "pool", "own_pool")
"""What the numbers of `Plan.settings` are."""
SETTINGS_OFF = torch.tensor(
    [OFF, 1, NO_CEILING, NO_TOLERANCE, 0, 0, 0], dtype=torch.int32, device="cpu"
)
"""`Plan.settings` of stock routing."""


def settings_of(policy: Policy, K: int, E: int) -> Tensor:
    """`Plan.settings` under a layer's policy, on the CPU; K of E experts per token."""
    tau, pool = whole_tau(policy), policy.pool_of(E)
    ceiling = policy.max_active or NO_CEILING
    scaled = policy.scales or policy.frees  # a freed slot's weight is scaled to 0
    own = pool if pool >= K else 0
    settings = [policy.S, policy.min_active or K, ceiling, tau, int(scaled), pool, own]
    return torch.tensor(settings, dtype=torch.int32, device="cpu")


def whole_tau(policy: Policy) -> int:
    """In units of 1 / LOSS_FRACTION."""
    return NO_TOLERANCE if policy.tau is None else round(policy.tau * LOSS_FRACTION)


@dataclass(frozen=True)
class Plan:
    """One layer's re-routing decisions, laid out for the operator.

    neighbours: [E, E-1] int32. Row u lists the other experts, best stand-in first (ties: one on
        u's own rank, see `Placement`, then the lowest id), without those below rho; -1 fills the
        rest.
    errors: [E, E-1] int32, beside `neighbours`: what is lost when this neighbour stands in, see
        `Substitution`, in units of 1 / ERROR_FRACTION.
    scales: [E, E-1] float32, beside `neighbours`: what to multiply a weight with when u's slot goes
        to this neighbour.
    settings: [7] int32: S, min_active, max_active, tau in units of 1 / LOSS_FRACTION
        (or NO_TOLERANCE), whether weights are scaled, how many experts the pool of the step holds,
        and how many that of INDEPENDENT rows (0: there is none).
    pool: [3, E] int32 (see `sere.kernels.pool.columns`): when each expert joins the pool; and of
        INDEPENDENT rows the place of its stand-in in the list, or -1, and the least share at which
        a slot stays.
    """

    neighbours: Tensor
    errors: Tensor
    scales: Tensor
    settings: Tensor
    pool: Tensor

    @property
    def num_experts(self) -> int:
        return self.neighbours.shape[0]

    @classmethod
    def build(
        cls,
        similarity: Tensor,
        policy: Policy,
        *,
        K: int,
        substitution: Substitution | None = None,
        placement: Placement | None = None,
        calls: Tensor | None = None,
        pool: int | None = None,
    ) -> Plan:
        """Plan of one layer.

        similarity: [E, E] floating point, the larger the more alike; the diagonal is ignored.
        policy: settings of this layer (see `Policy.for_layer`).
        K: experts per token of the model; the default of `min_active`.
        substitution: what is lost when one expert stands in for another; needed by a policy with
            `tau`, `fill="error"` or `weights="scale"` (`PolicyError` without).
        placement: which expert is held where; None where it does not matter, or is not known.
        calls: [E], the share of the router's choices that goes to each expert; None: all alike.
        pool: members of the largest pool that the plan is to know of; None: the policy's.
        """
        E = similarity.shape[0]
        policy.check_against(K, E)
        known = substitution
        if substitution is None:
            if policy.needs_errors:
                raise PolicyError(OUTPUTS_UNKNOWN)
            substitution = Substitution(torch.zeros_like(similarity), torch.ones_like(similarity))
        merit = -substitution.error if policy.fills_by_error else similarity
        merit = merit.double().clone().fill_diagonal_(-torch.inf)
        excluded = torch.zeros_like(merit, dtype=torch.bool)
        if policy.tau is None and not policy.fills_by_error:
            excluded = merit < _threshold(merit, policy)
        order = _order(merit, excluded, placement)[:, : E - 1]
        neighbours = order.masked_fill(excluded.gather(1, order), -1)
        errors = _whole(substitution.error).gather(1, order)
        scales = substitution.scale.gather(1, order)
        settings, members = settings_of(policy, K, E), policy.pool_of(E) if pool is None else pool
        lost = _whole(known.error if known else 1 - similarity)
        joins = joining_order(merit, lost, calls, members)
        return cls(
            neighbours.to(torch.int32).contiguous(),
            errors.to(torch.int32).contiguous(),
            scales.float().contiguous(),
            settings.to(similarity.device),
            columns(joins, neighbours, errors, int(settings[-1]), whole_tau(policy)).to(
                similarity.device
            ),
        )

    @classmethod
    def off(cls, num_experts: int, device: torch.device | str | None = None) -> Plan:
        """A plan that leaves every batch as it is, and counts nothing."""
        shape = (num_experts, num_experts - 1)
        return cls(
            torch.full(shape, -1, dtype=torch.int32, device=device),
            torch.zeros(shape, dtype=torch.int32, device=device),
            torch.ones(shape, dtype=torch.float32, device=device),
            SETTINGS_OFF.to(device or "cpu", copy=True),
            no_pool(num_experts).to(device or "cpu"),
        )

    def to(self, device: torch.device | str) -> Plan:
        """The same plan on another device."""
        return Plan(*(getattr(self, field.name).to(device) for field in fields(self)))

    def copy_(self, other: Plan) -> None:
        """Overwrite this plan in place, so that whoever holds its buffers sees the new one."""
        for field in fields(self):
            getattr(self, field.name).copy_(getattr(other, field.name))


@dataclass(frozen=True)
class Placement:
    """Where the experts of a layer are, under expert parallelism.

    ranks: [E] integer, the rank that holds each expert. An expert's stand-in on its own rank takes
        no token to a rank that would not have had it, and gives no rank more rows.
    tolerance: how much less good, >= 0, a stand-in on the same rank may be and yet be preferred: in
        similarity, or in expected error where stand-ins are compared by that. 0: equals only.
    """

    ranks: Tensor
    tolerance: float = 0.0


@dataclass(frozen=True)
class Substitution:
    """What happens when expert v answers for u, [E, E] each, row u.

    error: the energy that is lost, in units of the geometric mean of u's own energy and a typical
        expert's; 0 for a perfect stand-in. For a typical expert it is the share of its energy, 1
        for one that is dropped; experts that say more or less lose more or less, by the root of it.
    scale: what v's output is to be multiplied with.
    """

    error: Tensor
    scale: Tensor

    @classmethod
    def of(
        cls, cross: Tensor, energy: Tensor, own: Tensor, *, typical: float, scaled: bool
    ) -> Substitution:
        """From second moments [E, E] over the tokens that count for u.

        cross: mean of <E_u(x), E_v(x)>. energy: mean of |E_v(x)|^2. own: [E], mean of |E_u(x)|^2.
        typical: the energy of a typical expert of the layer.
        scaled: with the least-squares scale <E_u, E_v> / |E_v|^2, but never a negative one.
        """
        cross, energy, own = cross.double(), energy.double(), own.double()[:, None]
        tiny = torch.finfo(torch.float64).tiny
        scale = (cross / energy.clamp(min=tiny)).clamp(min=0) if scaled else torch.ones_like(cross)
        lost = own - 2 * scale * cross + scale**2 * energy
        return cls((lost / (own * typical).clamp(min=tiny).sqrt()).clamp(min=0), scale)


def can_move(similarity: Tensor, policy: Policy, K: int) -> bool:
    """Whether a batch exists in which a plan of this layer moves a slot.

    similarity, policy, K: as for `Plan.build`.
    """
    E = len(similarity)
    if policy.S >= K or (policy.min_active or K) >= E or policy.pool_of(E) == E:
        return False
    if policy.tau is not None or policy.fills_by_error:
        return True
    merit = similarity.double().clone().fill_diagonal_(-torch.inf)
    return bool((merit >= _threshold(merit, policy)).any())


def _whole(error: Tensor) -> Tensor:
    """[E, E] int64, in units of 1 / ERROR_FRACTION."""
    return (error.double() * ERROR_FRACTION).round().clamp(0, LARGEST_ERROR).long()


def _order(merit: Tensor, excluded: Tensor, placement: Placement | None) -> Tensor:
    """[E, E]: the experts of each row, those that are not excluded first, the best of them first.

    That the tolerance is a bonus makes the first *primary* of a list the right one whatever is
    primary: the best on the same rank if it is within the tolerance of the best of all.
    """
    order = torch.arange(len(merit), device=merit.device).expand(len(merit), -1)
    if placement is not None:
        ranks = placement.ranks.to(merit.device)
        near = ranks[:, None] == ranks[None, :]
        merit = merit + placement.tolerance * near
        order = _sorted(order, (~near).double())
    return _sorted(_sorted(order, -merit), excluded.double())


def _sorted(order: Tensor, by: Tensor) -> Tensor:
    """The rows of `order` sorted by [E, E] values, least first; equals stay as they are."""
    return order.gather(1, by.gather(1, order).argsort(dim=1, stable=True))


def _threshold(merit: Tensor, policy: Policy) -> float:
    """rho, or the quantile that stands for it; merit: [E, E] similarities, diagonal -inf. With
    rho = 0 nothing is critical, also where similarities are negative."""
    if policy.rho_quantile is None or len(merit) < 2:
        return policy.rho or -math.inf
    return torch.quantile(merit.amax(1), policy.rho_quantile).item()
