"""What an evaluation compares: policies and rivals, each able to route one decode step."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sere.evaluation.decoding import RouterOutput
from sere.evaluation.rivals import Rival, Routed
from sere.kernels import Plan, RowClass, freed_weights, reroute
from sere.maps import LayerMaps
from sere.models.adapters import Changed
from sere.models.moe import MoELayer
from sere.policy import Policy, PolicyError, settings_from_json
from sere.results.names import check_names
from sere.table import TUNED, Table, TableError


@dataclass
class Arm:
    """A named rule and the table it reads.

    rule: None is stock routing. Raises `PolicyError` for a policy that re-routes prompts, which a
    teacher-forced pass leaves alone. independent: decoded rows are INDEPENDENT ones, not FAST.
    """

    name: str
    rule: Policy | Rival | None
    table: Table
    independent: bool = False
    _plans: dict[tuple[int, int], Plan] = field(default_factory=dict)
    _maps: dict[int, LayerMaps] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.rule, Policy) and self.rule.rows == "all":
            raise PolicyError(
                f'{self.name}: "rows": "all" re-routes prompts, which this pass leaves alone: use '
                '`sere evaluate --engine` or --tasks, or leave "rows" out'
            )

    @property
    def needs_logits(self) -> bool:
        """Whether the rule reads the router's output over all experts."""
        return isinstance(self.rule, Rival)

    def route(
        self,
        layer: MoELayer,
        ids: Tensor,
        weights: Tensor,
        said: RouterOutput | None,
        counters: Tensor | None = None,
        hidden: Tensor | None = None,
    ) -> Changed:
        """What one decode step's experts do, all rows of which are decoded.

        hidden: [T, H], the experts' input, which a policy with linear stand-ins cannot do without.
        said: of those rows, what the router says of all experts, if the rule `needs_logits`.
        counters: what a policy adds its figures to (see `sere.kernels.reroute`).
        """
        if self.rule is None:
            return Changed(ids, weights)
        if ids.shape[1] != self.table.fingerprint.K:
            raise TableError(
                f"the table was made for {self.table.fingerprint.K} experts per token and the "
                f"model routes each to {ids.shape[1]}: run `sere calibrate` on the model as it is"
            )
        if isinstance(self.rule, Policy):
            plan = self._plan(self.rule, layer, ids)
            rows = None
            if self.independent:
                kind = int(RowClass.INDEPENDENT)
                rows = torch.full((len(ids),), kind, dtype=torch.int8, device=ids.device)
            new = reroute(ids, weights, plan, rows, counters)
            if not self.rule.for_layer(layer.index).frees:
                return Changed(*new)
            assert hidden is not None
            freed = freed_weights(ids, weights, new[0])
            return self._answered(layer, hidden, ids, freed, new)
        assert said is not None
        load = self.table.layers[layer.index].load.to(ids.device)
        said, scores = said.limited(said.scores(ids, weights), ids, weights)
        ranks = said.ranks(scores, ids, weights)
        return Changed(*self.rule.route(Routed(ids, weights, said.logits, scores, ranks, load)))

    def _answered(
        self,
        layer: MoELayer,
        hidden: Tensor,
        ids: Tensor,
        freed: Tensor,
        new: tuple[Tensor, Tensor],
    ) -> Changed:
        """freed: [T, K], what the maps are asked for."""
        if not layer.adapter.adds:
            raise PolicyError(
                f"{self.name}: {layer.name} cannot be given linear stand-ins: its experts weigh "
                "their input, or are no module of their own"
            )
        maps = self._layer_maps(layer.index).to(hidden.device)
        asked = len(torch.unique(ids[freed != 0]))
        size = sum(p.numel() for p in layer.experts.parameters()) / layer.E
        share = (2 * maps.R + 1) * hidden.shape[1] / size
        return Changed(*new, maps.answers(hidden, ids, freed), asked * share)

    def _layer_maps(self, index: int) -> LayerMaps:
        if (known := self._maps.get(index)) is None:
            assert isinstance(self.rule, Policy)
            policy = self.rule.for_layer(index)
            maps = self.table.maps_for(policy)
            known = self._maps[index] = maps.layer(index).of_rank(policy.rank_of(maps.R))
        return known

    def _plan(self, policy: Policy, layer: MoELayer, ids: Tensor) -> Plan:
        bucket = policy.bucket(len(ids))
        plan = self._plans.get((layer.index, bucket))
        if plan is None or plan.settings.device != ids.device:
            own = policy.for_bucket(bucket)
            plan = self.table.plan(layer.index, own) if own else Plan.off(layer.E)
            plan = self._plans[layer.index, bucket] = plan.to(ids.device)
        return plan


def spelt_out(texts: Sequence[str], table: Table) -> list[str]:
    """The same, with the policy that the table carries for the word `tuned`: what a result and a
    journal record, as another `sere tune` may store another. Raises `PolicyError` without one."""
    return [
        json.dumps({**table.tuned().to_dict(), "name": TUNED}) if text == TUNED else text
        for text in texts
    ]


def parse_arm(text: str, table: Table) -> Arm:
    """An arm from JSON: a policy such as {"tau": 0.02}, or {"rival": "oea", "k0": 1}; either may
    have a "name", and a "table" of its own; a policy with a pool also "tier": "independent". Raises
    `PolicyError` for anything else."""
    return arm_of(settings_from_json(text), table)


def served_policies(texts: Sequence[str], table: Table) -> dict[str, Policy]:
    """By name, in order: policies that an engine can follow, beside "stock". From JSON, each with a
    "name" if it likes. Raises `PolicyError` for a rival, for what makes no sense for the table's
    model, and for a policy or a name that is given twice."""
    named = [_served(settings_from_json(text), table) for text in spelt_out(texts, table)]
    policies = [policy for _, policy in named]
    if twice := [policy for policy in policies if policies.count(policy) > 1]:
        raise PolicyError(f"the same policy is given twice: {twice[0].brief()}")
    check_names(["stock", *(name for name, _ in named)])
    return dict(named)


def _served(settings: Mapping[str, Any], table: Table) -> tuple[str, Policy]:
    if "rival" in settings:
        raise PolicyError(
            f"{settings['rival']!r} is another paper's rule, measured in one pass and never "
            "decoded with: leave out --engine and --tasks"
        )
    rest = dict(settings)
    name = rest.pop("name", None)
    policy = Policy.from_dict(rest)
    table.check_policy(policy)
    return name or policy.brief(), policy


def arm_of(settings: Mapping[str, Any], table: Table) -> Arm:
    """See `parse_arm`."""
    rest = dict(settings)
    name, path = rest.pop("name", None), rest.pop("table", None)
    tier = rest.pop("tier", "fast")
    own = table if path is None else Table.load(path)
    own.check_against(table.fingerprint)
    rule = Rival.from_dict(rest) if "rival" in rest else Policy.from_dict(rest)
    if isinstance(rule, Policy):
        own.check_policy(rule)
        _check_tier(tier, rule, own)
    elif tier != "fast":
        raise PolicyError(f'"tier": {tier!r}: a rival knows no tiers; leave it out')
    else:
        rule.check_against(own.fingerprint.K, own.fingerprint.E)
    return Arm(name or _name(rule, path, tier), rule, own, tier == "independent")


def _check_tier(tier: Any, policy: Policy, table: Table) -> None:
    if tier not in ("fast", "independent"):
        raise PolicyError(f'"tier": {tier!r}: expected "fast" or "independent"')
    if tier == "independent" and policy.pool_of(table.fingerprint.E) < table.fingerprint.K:
        raise PolicyError(
            f'"tier": "independent" needs a pool of at least {table.fingerprint.K} experts: add '
            '"pool": 0.5'
        )


def _name(rule: Policy | Rival, path: str | None, tier: str) -> str:
    name = str(rule) if isinstance(rule, Rival) else rule.brief()
    name = name if tier == "fast" else f"{name}, {tier}"
    return name if path is None else f"{name} ({path})"
