"""Why a policy that is on re-routes nothing: it is legal, and says so."""

from __future__ import annotations

from torch import Tensor

from sere.policy import Policy
from sere.serving.no_table import NoTable
from sere.table import Table

_ALONE = (
    "max_num_seqs=1 leaves every decoded row alone in its step, and such a row keeps its own "
    "experts; serve more requests together"
)


def inert(
    policy: Policy | None,
    table: Table | NoTable,
    *,
    alone: bool = False,
    independent: bool = False,
) -> str | None:
    """The reason, or None if slots can move.

    policy: None is stock routing. alone: no step has two decoded rows. independent: requests may
    ask to be so, and rows of theirs count too.
    """
    if isinstance(table, NoTable):
        return table.reason
    if policy is None:
        return "routing is stock"
    if independent and table.can_move_own(policy):
        return None
    if policy.is_stock:
        return (
            "the policy is stock routing at every batch size (if none was given, it is the choice "
            "of `sere tune` in the table, and settings of yours replace it)"
        )
    if table.can_move(policy):
        lone = policy.at(1)
        moves = lone is not None and lone.pools  # a row that is alone in its step, by its pool
        return _ALONE if alone and policy.rows == "decode" and not moves else None
    K, own = table.fingerprint.K, [policy.for_layer(index) for index in table.layers]
    if all(settings.S >= K for settings in own):
        return f"S={K} keeps all of a token's {K} experts; choose 1 <= S < {K}"
    largest = max(_largest(layer.similarity) for layer in table.layers.values())
    if all(settings.rho > largest for settings in own):
        return (
            f"rho={policy.rho:g} is above every similarity in the table, whose largest is "
            f"{largest:.3f}; choose a smaller one"
        )
    return f"{policy.brief()} lets no slot move in any layer of this table"


def _largest(similarity: Tensor) -> float:
    """Of two experts; similarity: [E, E]."""
    return float(similarity.double().clone().fill_diagonal_(float("-inf")).max())
