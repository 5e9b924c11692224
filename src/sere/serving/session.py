"""Re-routing in one worker of one engine: settings, table, row classes and the bound layers."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from sere.cautious import cautious
from sere.kernels import Plan
from sere.kernels.plan import Placement
from sere.policy import Policy
from sere.serving.asking import KEY, given
from sere.serving.incidents import Incidents
from sere.serving.inert import inert
from sere.serving.invariance import may_be_asked_for
from sere.serving.layer import ReroutedLayer
from sere.serving.live import Live
from sere.serving.loaded_maps import Answers, ranks_to_load, unloaded
from sere.serving.model_fit import check_model, model_folder, untold
from sere.serving.no_table import NoTable
from sere.serving.observing import Observer
from sere.serving.only_prompts import OnlyPrompts
from sere.serving.overrun import LatestPass
from sere.serving.parallel import BATCHES_DISAGREE
from sere.serving.refusal import ServingError
from sere.serving.rows import RowClasses
from sere.serving.settings import Settings
from sere.serving.shadow import Shadow
from sere.serving.tiers import RequestTiers
from sere.serving.traffic import Watch
from sere.table import Table

# The session hangs on vLLM's compilation config: the worker's own, and as long-lived as its layers.
_ATTRIBUTE = "_sere_session"
START = "start"
"""In the place of a policy: the one that the engine began with."""
_LOG = logging.getLogger("vllm.sere")


@dataclass
class Session:
    """What the layers of one worker share."""

    settings: Settings
    table: Table | NoTable
    rows: RowClasses
    live: Live
    tiers: RequestTiers
    answers: Answers | None = None  # where linear maps are loaded
    layers: dict[int, ReroutedLayer] = field(default_factory=dict)
    placements: dict[int, Placement] = field(default_factory=dict)  # under expert parallelism
    shadow: Shadow | None = field(init=False)
    policy: Policy | None = field(init=False)  # what is on; None is stock routing
    inert: str | None = field(init=False)  # why that re-routes nothing
    switches: int = 0  # of the policy, since the start
    fallback: str | None = None  # why the shadow check switched the policy off
    checked: bool = False  # the worker's start-up self check is through
    asleep: bool = False  # vLLM's sleep mode: the layers' buffers are unmapped
    last_told: dict[str, Any] | None = None  # see `telemetry.snapshot`
    overlapping: bool = False  # vLLM's asynchronous scheduling
    alone: bool = False  # no step has two decoded rows, here or on a rank that has a say
    independent: bool = False  # requests may ask to be so
    latest: LatestPass = field(default_factory=LatestPass)
    only_prompts: OnlyPrompts = field(default_factory=OnlyPrompts)
    observer: Observer | None = None  # while the engine measures its experts
    traffic: Watch | None = None  # ... on what it serves, or has done so

    def __post_init__(self) -> None:
        self.policy = self.settings.policy
        self.inert = self._inert(self.policy)
        asked = self.settings.shadow
        self.shadow = Shadow(asked, self.rows, self.fall_back) if asked else None

    @property
    def incidents(self) -> Incidents:
        return self.rows.incidents

    def _inert(self, policy: Policy | None) -> str | None:
        return inert(policy, self.table, alone=self.alone, independent=self.independent)

    def bind(
        self, index: int, name: str, *, E: int, K: int, ranks: Tensor | None = None
    ) -> ReroutedLayer:
        """The re-routed layer for decoder layer `index`, which has E experts, K per token.

        ranks: [E], which expert-parallel rank holds each expert; None where there is no such.
        """
        known = self.table.fingerprint
        if index in self.layers:
            raise ServingError(
                f"sere cannot re-route {name}: it calls itself layer {index}, as does "
                f"{self.layers[index].name}, and a table knows one set of experts a layer. Models "
                "that have several are not supported; if one of the two belongs to a drafter, "
                "start without speculative_config, or with another method"
            )
        if index not in self.table.layers:
            raise ServingError(
                f"sere cannot re-route {name}: the table has no layer {index} (it has "
                f"{list(self.table.layers)}); calibrate the model that you serve"
            )
        if (E, K) != (known.E, known.K):
            raise ServingError(
                f"sere cannot re-route {name}: it has {E} experts, {K} per token; the table was "
                f"made for {known.E} and {known.K}; calibrate the model that you serve"
            )
        if ranks is not None:
            self.placements[index] = Placement(ranks, self.settings.placement)
        plan = self._plan(index, self.settings.policy).to(self.rows.buffer.device)
        layer = ReroutedLayer(name, plan, self.rows, self.live, self.live.place(index))
        self.layers[index] = layer
        return layer

    def take(self, table: Table | NoTable) -> None:
        """Go live with the table that the engine has found or made, or say why there is none."""
        if isinstance(table, NoTable):
            if not isinstance(self.table, NoTable):  # another rank could not take it
                self.set_policy(None)
            self.table, self.inert = table, table.reason
            return
        self.learn(table)
        self.begin_with(self.policy)

    def learn(self, table: Table) -> None:
        """Go by the engine's own table from the next policy on."""
        known, bound = table.fingerprint, self.table.fingerprint
        if (known.E, known.K, known.layers) != (bound.E, bound.K, bound.layers):
            raise ServingError("sere was given a table of other layers than it is bound to")
        self.table = table
        self.live.learn(table)
        if self.answers is not None:
            self.answers.go_by(table)

    def begin_with(self, policy: Policy | None) -> None:
        """As if the engine had started with it; None is stock routing, which an operator chose."""
        switches = self.switches
        self.set_policy(policy)
        self.switches = switches  # nobody's
        if policy is not None:
            self.settings = replace(self.settings, policy=policy)

    def _plan(self, index: int, policy: Policy) -> Plan:
        return self.table.plan(index, policy, self.placements.get(index))

    def begin(
        self,
        prefilling: npt.NDArray[np.bool_],
        query_lengths: npt.NDArray[np.integer] | None,
        requests: Sequence[str],
        total: int | None = None,
    ) -> None:
        """A pass over these requests follows, in batch order (see `RowClasses.fill`)."""
        classes = self.tiers.classes(requests)
        self.rows.fill(prefilling, query_lengths, classes, total)
        self.live.choose(self.rows.fast, self.rows.exact)
        if self.overlapping and self.live.counts:
            self.latest.note(requests, prefilling, query_lengths, classes)
        else:
            self.latest.forget()

    def end(self, requests: Collection[str]) -> None:
        """Requests have ended: what the latest pass has of them is counted no longer."""
        if rows := self.latest.of(requests):
            self.live.retract(rows)

    def begin_dummy(self) -> None:
        """A pass without a real row follows."""
        if self.traffic is not None:
            self.traffic.rest()
        self.latest.forget()
        self.rows.void()
        self.live.choose(0, 0)

    def named(self, asked: Mapping[str, Any] | str | None) -> Policy | None:
        """The policy that is meant: settings as in `Policy.from_dict`, `START` for what the engine
        began with, None for stock routing. Raises `PolicyError`."""
        if asked == START:
            return self.settings.policy
        return None if asked is None else Policy.from_dict(asked)  # type: ignore[arg-type]

    def check_policy(self, policy: Policy | None) -> None:
        """Raise `PolicyError` or `ServingError` unless this engine can switch to it."""
        if policy is None:
            return
        self.table.check_policy(policy)
        if policy.frees_anywhere and not isinstance(self.table, NoTable):
            loaded = self.answers.ranks if self.answers else {}
            if reason := unloaded(policy, loaded, self.table):
                raise ServingError(reason)
        if policy.batches and self.live.together:
            raise ServingError(f'sere cannot take "batches" here: {BATCHES_DISAGREE}')
        if policy.pools and self.live.lone and self.live.frozen:
            raise ServingError(
                "sere cannot take a pool here: this engine captured its graphs without one, and "
                "those of one row launch nothing, where a pool would re-route; start with a policy "
                'that has a pool at some batch size, e.g. "batches": {"128": {"S": 0, "pool": 0.5}}'
            )

    def set_policy(self, policy: Policy | None) -> None:
        """Write a new policy into the live buffers; None switches re-routing off. Raises what
        `check_policy` does, and has changed nothing then."""
        self.check_policy(policy)
        plans = {index: self._plan(index, policy) if policy else None for index in self.layers}
        if policy is not None:
            self.rows.gate = policy.rows
        self.policy, self.fallback = policy, None
        self.inert = self._inert(policy)
        self.switches += 1
        for index, layer in self.layers.items():
            layer.follow(plans[index])
        if self.answers is not None:
            self.answers.follow(policy)
        self.live.follow(policy)
        if self.shadow is not None:
            self.shadow.switch(on=policy is not None)

    def fall_back(self, reason: str) -> None:
        """Stock routing until a policy is set again."""
        self.set_policy(None)
        self.fallback = self.inert = reason

    def record(self, on: bool) -> None:
        """Start (or stop) keeping every batch's routing on the host."""
        self.live.watch(on)
        for layer in self.layers.values():
            layer.recording = [] if on else None

    def check_bound(self, config: Any) -> None:
        """Raise unless exactly the table's layers are bound (of this worker's pipeline stage) and
        the table fits the model."""
        known = self.table.fingerprint.layers
        bound, expected = tuple(sorted(self.layers)), stage_of(config, known)
        if bound != expected:
            raise ServingError(
                f"sere is bound to layers {list(bound)}, the table has {list(expected)}: this "
                "model calls expert kernels past vLLM's routers, which sere cannot reach"
            )
        if not isinstance(self.table, NoTable):
            check_model(config, self.settings, self.table)


def stage_of(config: Any, layers: tuple[int, ...]) -> tuple[int, ...]:
    """Those of the decoder layers that this worker's pipeline stage has."""
    parallel = config.parallel_config
    if parallel.pipeline_parallel_size == 1:
        return layers
    start, end = config.model_config.get_layers_start_end_indices(parallel)
    return tuple(index for index in layers if start <= index < end)


def is_dense_stage(config: Any) -> bool:
    """Whether this worker is a pipeline stage that has no MoE layer to re-route."""
    if config.parallel_config.pipeline_parallel_size == 1:
        return False
    return not stage_of(config, table_of(config, settings_of(config)).fingerprint.layers)


def table_of(config: Any, settings: Settings) -> Table | NoTable:
    """The named table, or that there is none yet: the engine gives its workers one."""
    return NoTable(untold(config)) if settings.table is None else Table.load(settings.table)


def session_of(config: Any) -> Session | None:
    """The session of the worker with this vLLM config, if re-routing is on."""
    return getattr(config.compilation_config, _ATTRIBUTE, None)


def open_session(config: Any) -> Session:
    """The worker's session; made when its first MoE layer is."""
    session = session_of(config)
    if session is None:
        settings = settings_of(config)
        sizes = config.compilation_config.cudagraph_capture_sizes or [0]
        rows = RowClasses(
            max(config.scheduler_config.max_num_batched_tokens, *sizes),
            config.device_config.device,
            settings.policy.rows,
        )
        table = table_of(config, settings)
        if settings.table is None and not settings.named:
            settings = replace(settings, policy=cautious(table.fingerprint.K))
        together = settings.union == "all"
        frozen = not config.model_config.enforce_eager
        lone = sees_lone_rows(config) and not (frozen and settings.policy.pools)
        live = Live(table, rows.buffer.device, together=together, lone=lone, frozen=frozen)
        live.follow(settings.policy)
        tiers = RequestTiers(settings.default, table.fingerprint.K)
        alone = not together and _decodes_one_row(config)
        own = may_be_asked_for(config, settings.policy, table.fingerprint)
        session = Session(settings, table, rows, live, tiers, alone=alone, independent=own)
        if ranks := ranks_to_load(settings, table):
            H = None if config.parallel_config.rank else config.model_config.get_hidden_size()
            session.answers = Answers(table, settings.policy, ranks, rows, say=H)
        session.overlapping = bool(config.scheduler_config.async_scheduling)
        object.__setattr__(config.compilation_config, _ATTRIBUTE, session)
    return session


def sees_lone_rows(config: Any) -> bool:
    """Whether a step of one row reaches the layers as one row: without padding, be it to the
    smallest captured graph or to other data-parallel ranks' rows."""
    if config.parallel_config.data_parallel_size > 1:
        return False
    sizes = config.compilation_config.cudagraph_capture_sizes
    return bool(config.model_config.enforce_eager or 1 in (sizes or ()))


def _decodes_one_row(config: Any) -> bool:
    """Whether a step has one decoded row at most: one request, and nobody who drafts for it."""
    return config.scheduler_config.max_num_seqs == 1 and config.speculative_config is None


def settings_of(config: Any) -> Settings:
    """The user's settings over the model's own defaults (`"sere"` in its config.json)."""
    return Settings.parse(
        given(config) or {},
        model_folder=model_folder(config),
        model_default=model_default(config),
    )


def maps_of(config: Any) -> dict[int, int]:
    """By layer, of which rank linear maps an engine with this config loads; none where it will be
    refused anyway."""
    try:
        settings = settings_of(config)
        if settings.auto or settings.maps or settings.policy.frees_anywhere:
            return ranks_to_load(settings, table_of(config, settings))
    except ValueError:
        pass
    return {}


def model_default(config: Any) -> Mapping[str, Any]:
    """The value of "sere" in the model's config.json."""
    default: Mapping[str, Any] = getattr(config.model_config.hf_config, KEY, None) or {}
    return default
