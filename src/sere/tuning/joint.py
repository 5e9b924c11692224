"""From what each batch size could have for itself to one policy for all of them.

Fill, rank and weights are a policy's once for all batch sizes; S, tau and the pool are each one's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from sere.policy import BATCH_KEYS, Policy
from sere.tuning.kinds import PAPER, TAUS, Kind
from sere.tuning.one_size import best, fitting, policy_of
from sere.tuning.search import Point, Tuner

Own = dict[int, Policy | None]  # by batch size; None is stock routing


def chosen(tuner: Tuner, kinds: Sequence[Kind], sizes: list[dict[str, Any]]) -> Policy | None:
    """The fastest of all kinds, each with its best at every batch size; the paper's rule with each
    threshold, as that is one for all batch sizes; of kinds with maps the one that promises most."""
    stock = {size["batch"]: size["stock"]["seconds"] for size in sizes}
    candidates = [*_with_tau(tuner, kinds, sizes), *_by_similarity(tuner, sizes)]
    tried = [partial(together, tuner, _in_common(base, own), own) for base, own in candidates]
    fit = [
        (sum(p.seconds / stock[p.batch] for p in points), policy)
        for policy, points in tuner.judge.at_once(tried)
        if policy is not None
    ]
    return min(fit, key=lambda found: found[0])[1] if fit else None


def _with_tau(
    tuner: Tuner, kinds: Sequence[Kind], sizes: list[dict[str, Any]]
) -> list[tuple[Policy, Own]]:
    """Each with and without pools, where that makes a difference: what a pool is alone it may not
    be where steps shrink below its batch size."""

    def promised(kind: Kind) -> float:
        fastest = (best(size, tuner.budget, kind.name) or size["stock"] for size in sizes)
        pairs = zip(fastest, sizes, strict=True)
        return float(sum(p["seconds"] / size["stock"]["seconds"] for p, size in pairs))

    mapped = sorted((kind for kind in kinds if kind.maps), key=promised)[:1]
    found: list[tuple[Policy, Own]] = []
    for kind in (*(kind for kind in kinds if not kind.maps), *mapped):
        for pools in (True, False):
            points = {s["batch"]: best(s, tuner.budget, kind.name, pools) for s in sizes}
            own = {batch: policy_of(point) for batch, point in points.items()}
            if (kind.base, own) not in found:
                found.append((kind.base, own))
    return found


def _by_similarity(tuner: Tuner, sizes: list[dict[str, Any]]) -> list[tuple[Policy, Own]]:
    fit = {size["batch"]: fitting(size, tuner.budget, PAPER.name) for size in sizes}
    quantiles = {p["policy"]["rho_quantile"] for own in fit.values() for p in own}
    return [
        (
            replace(PAPER.base, rho_quantile=quantile),
            {batch: _with(quantile, own) for batch, own in fit.items()},
        )
        for quantile in sorted(quantiles, key=str)
    ]


def _with(quantile: float | None, fit: list[dict[str, Any]]) -> Policy | None:
    """The fastest of these with or without such a threshold; it then has it, which can only make it
    more cautious."""
    for point in fit:
        if point["policy"]["rho_quantile"] in (None, quantile):
            return replace(Policy.from_dict(point["policy"]), rho_quantile=quantile)
    return None


def confirmed(checker: Tuner, policy: Policy | None, batches: Sequence[int]) -> Policy | None:
    """The choice, more cautious wherever passages that the search did not see say so."""
    if policy is None:
        return None
    own = {batch: policy.at(batch) for batch in batches}
    return together(checker, replace(policy, batches={}), own)[0]


def _in_common(base: Policy, own: Mapping[int, Policy | None]) -> Policy:
    """What holds where a batch size says nothing of its own: the most cautious of all settings."""
    wanted = [policy for policy in own.values() if policy]
    if base.tau is None:
        return replace(base, S=max((policy.S for policy in wanted), default=1))
    taus = [policy.tau for policy in wanted if policy.tau is not None]
    return replace(base, tau=min(taus, default=0.0))


def together(tuner: Tuner, base: Policy, own: Own) -> tuple[Policy | None, list[Point]]:
    """One policy that does at every batch size what suits it best, and its points.

    base: what they have in common. own: by batch size, ascending; None is stock routing. Steps of a
    batch shrink as its answers end, and small steps follow other settings: where that breaks the
    budget the boldest of these gets more cautious, down to stock routing; and what then is no
    faster than stock is left to it.
    """
    own = dict(own)
    stock = {p.batch: p.seconds for (p,) in tuner.at_all([None], list(own))}
    while any(own.values()):
        policy = composed(base, own)
        points = [point for (point,) in tuner.at_all([policy], list(own))]
        over = [p.batch for p in points if not p.within(tuner.budget)]
        if over:
            heard = {b: policy for b, policy in own.items() if policy and b <= max(over)}
            blamed = max(heard, key=lambda b: (_boldness(heard[b]), b))
            own[blamed] = _more_cautious(heard[blamed], tuner.table.fingerprint.K)
            continue
        slow = [p.batch for p in points if own[p.batch] and p.seconds >= stock[p.batch]]
        if not slow:
            return policy, points
        own |= dict.fromkeys(slow)
    return None, []


def _more_cautious(policy: Policy, K: int) -> Policy | None:
    if policy.tau is None:
        more = replace(policy, S=policy.S + 1)
        return more if more.S < K else None
    lower = [tau for tau in TAUS if tau < policy.tau]
    return replace(policy, tau=lower[-1], layers={}) if lower else None


def _boldness(policy: Policy) -> float:
    """The larger, the bolder, among policies of one rule."""
    if policy.tau is None:
        return -policy.S
    return max([policy.tau, *(float(own.get("tau", 0)) for own in policy.layers.values())])


def composed(base: Policy, own: Own) -> Policy:
    """`base` with `batches`; what one batch size has in common with the next smaller is said once.
    Below the smallest, of which nothing is known, routing is stock."""
    batches: dict[int, dict[str, Any] | None] = {1: None}
    before: dict[str, Any] | None = None
    for batch, policy in sorted(own.items()):
        override = None if policy is None else _override(base, policy)
        if override != before:
            batches[batch] = override
        before = override
    return replace(base, batches={b: o for b, o in batches.items() if (b, o) != (1, {})})


def _override(base: Policy, policy: Policy) -> dict[str, Any]:
    own = {k: v for k in BATCH_KEYS if (v := getattr(policy, k)) != getattr(base, k)}
    layers = {index: dict(o) for index, o in policy.layers.items()}
    return own | ({"layers": layers} if layers else {})
