"""A policy: how much re-routing a batch gets.

One frozen value that validates itself, travels as JSON (in a table, on vLLM's command line) and
knows nothing about models. What the numbers mean is specified in `sere.kernels.reference`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from sere.checks import (
    PolicyError as PolicyError,
)
from sere.checks import (
    check_choice,
    check_count,
    check_pool,
    check_quantile,
    check_sizes,
    check_tau,
    checked_rho,
    is_index,
    once_each,
)
from sere.checks import (
    check_keys as check_keys,
)

# What a layer may override; `rows` is a property of the whole engine.
LAYER_KEYS = (
    "S",
    "rho",
    "rho_quantile",
    "tau",
    "min_active",
    "max_active",
    "pool",
    "fill",
    "rank",
    "weights",
)
# What a batch size may override: all that is read afresh for every batch.
BATCH_KEYS = ("S", "tau", "min_active", "max_active", "pool")
_THRESHOLDS = ("rho", "rho_quantile", "tau")
_FILLS = ("similar", "error", "linear", "constant")


@dataclass(frozen=True)
class Policy:
    """Settings of similarity-based expert re-routing (arXiv 2602.07616, section 3).

    S: primaries per token, >= 1, or 0 with a pool of at least K. S >= K switches re-routing off.
    rho: keep a secondary expert whose best primary is less similar than this, >= 0.
        0 always re-routes; anything above 1 never does.
    rho_quantile: instead of rho, the share of a layer's experts that are not to be replaced by
        others, in [0, 1): the threshold is that quantile of the experts' similarities to their
        nearest. Means the same in every layer, model and measure of similarity.
    tau: instead of rho, the loss that no single replacement may exceed, in [0, 2): the square of
        the slot's share of its token's weights, times the energy of the expert's output that the
        stand-in does not reproduce, in units that do not depend on the layer or model
        (docs/method.md). Experts that would lose more are loaded, the largest loss first.
    min_active: S grows until the batch has this many primaries. None means K, so that a batch
        of one token is left exactly as it was.
    max_active: S shrinks (never below 1) until the batch has at most this many primaries.
        None means no ceiling. With tau also the ceiling of what it loads.
    pool: experts of each layer that are primaries at every step, whoever is in the batch: a share
        of them such as 0.5, or how many; S and tau add to it. Who they are follows from the table:
        those that leave the others' stand-ins the least to lose.
    fill: what stands in: the primary that is most "similar" by the table, or that with the least
        expected "error"; or no expert, but a "linear" map of the layer's input or its "constant"
        alone (`sere calibrate --maps`). None means "error" with tau, else "similar".
    rank: of linear maps, at most that of the file; None means all of it.
    weights: "keep" a moved slot's weight, or "scale" it by the least-squares factor that makes the
        stand-in's output nearest. None means "scale" with tau, else "keep".
    rows: "decode" re-routes only decode rows; "all" also prefill rows, as the paper's code does.
    layers: per decoder layer index, any of the settings above but `rows`.
    batches: from how many decoded rows on, other values of S, tau, min_active, max_active, pool
        (also per layer, under "layers"), or None for stock routing; smaller batches follow the
        settings above. `{8: {"tau": 0.05}, 96: None}` says what to do from 8 and from 96 rows on.
    """

    S: int = 2
    rho: float = 0.0
    rho_quantile: float | None = None
    tau: float | None = None
    min_active: int | None = None
    max_active: int | None = None
    pool: float | int | None = None
    fill: Literal["similar", "error", "linear", "constant"] | None = None
    rank: int | None = None
    weights: Literal["keep", "scale"] | None = None
    rows: Literal["decode", "all"] = "decode"
    layers: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    batches: Mapping[int, Mapping[str, Any] | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_pool(self.pool)
        check_count("S", self.S, optional=False, least=1 if self.pool is None else 0)
        check_count("min_active", self.min_active, optional=True)
        check_count("max_active", self.max_active, optional=True)
        object.__setattr__(self, "rho", checked_rho(self.rho))
        check_quantile(self.rho_quantile)
        check_tau(self.tau)
        check_choice("fill", self.fill, _FILLS)
        check_count("rank", self.rank, optional=True)
        check_choice("weights", self.weights, ("keep", "scale"))
        self._check_one_threshold()
        if self.min_active and self.max_active and self.min_active > self.max_active:
            raise PolicyError(
                f"min_active={self.min_active} exceeds max_active={self.max_active}: "
                "lower min_active or raise max_active"
            )
        if self.rows not in ("decode", "all"):
            raise PolicyError(f'rows={self.rows!r}: expected "decode" or "all"')
        object.__setattr__(self, "layers", self._checked_layers())
        object.__setattr__(self, "batches", self._checked_batches())

    def _check_one_threshold(self) -> None:
        off = {"rho": 0.0, "rho_quantile": None, "tau": None}
        given = [f"{name}={v}" for name, none in off.items() if (v := getattr(self, name)) != none]
        if len(given) > 1:
            raise PolicyError(f"{' and '.join(given)}: give one threshold, not several")
        if self.fill not in (None, "similar") and (self.rho or self.rho_quantile is not None):
            raise PolicyError(
                f'rho and rho_quantile are thresholds of similarity, fill="{self.fill}" looks at '
                "none: use tau instead"
            )
        if self.frees and self.weights == "scale":
            raise PolicyError(
                f'weights="scale" is a factor of the expert that stands in, and under '
                f'fill="{self.fill}" none does: leave weights out'
            )
        if self.rank is not None and self.fill != "linear":
            raise PolicyError(f'rank={self.rank} is for fill="linear": add it, or leave rank out')

    def pool_of(self, E: int) -> int:
        """How many of a layer's E experts are primaries at every step."""
        if isinstance(self.pool, float):
            return max(1, int(self.pool * E + 0.5))
        return self.pool or 0

    @property
    def pools(self) -> bool:
        """Whether any layer has a pool at any batch size."""
        owns = (self, *map(self.for_layer, self.layers))
        by_size = (o is not None and self._with_batch(o).pools for o in self.batches.values())
        return any(own.pool is not None for own in owns) or any(by_size)

    @property
    def frees(self) -> bool:
        """Whether no expert stands in: a slot is freed, and a map answers instead."""
        return self.fill in ("linear", "constant")

    def rank_of(self, largest: int) -> int:
        """Of the maps that answer, where the file's are of rank `largest`."""
        return 0 if self.fill == "constant" else self.rank or largest

    @property
    def frees_anywhere(self) -> bool:
        """Whether it does so in any layer."""
        return any(own.frees for own in (self, *map(self.for_layer, self.layers)))

    @property
    def fills_by_error(self) -> bool:
        """Whether the stand-in is the primary with the least expected error."""
        return (self.fill or ("similar" if self.tau is None else "error")) == "error"

    @property
    def scales(self) -> bool:
        """Whether moved slots' weights are scaled."""
        unless_told = "keep" if self.tau is None or self.frees else "scale"
        return (self.weights or unless_told) == "scale"

    @property
    def needs_errors(self) -> bool:
        """Whether the policy needs to know what replacements lose."""
        return self.tau is not None or self.fills_by_error or self.scales

    def _checked_layers(self) -> dict[int, dict[str, Any]]:
        if not isinstance(self.layers, Mapping):
            raise PolicyError(f'layers={self.layers!r}: expected {{layer index: {{"S": 4}}}}')
        layers: dict[int, dict[str, Any]] = {}
        for key, override in self.layers.items():
            if not is_index(key):
                raise PolicyError(f"layers: {key!r} is not a decoder layer index such as 0 or 17")
            if not isinstance(override, Mapping):
                raise PolicyError(f'layers[{key}]={override!r}: expected settings, e.g. {{"S": 4}}')
            check_keys(f"layers[{key}]", override, LAYER_KEYS)
            layers[int(key)] = dict(override)
            self._overridden(override)  # raises what is wrong with it
        return dict(sorted(layers.items()))

    def _checked_batches(self) -> dict[int, dict[str, Any] | None]:
        if not isinstance(self.batches, Mapping):
            raise PolicyError(f'batches={self.batches!r}: expected {{rows: {{"S": 1}}}}')
        batches: dict[int, dict[str, Any] | None] = {}
        for key, override in self.batches.items():
            if not is_index(key) or not int(key):
                raise PolicyError(f"batches: {key!r} is not a number of rows such as 1 or 32")
            if override is not None and not isinstance(override, Mapping):
                raise PolicyError(
                    f'batches[{key}]={override!r}: expected settings, e.g. {{"S": 1}}, or null '
                    "for stock routing"
                )
            batches[int(key)] = None if override is None else self._checked_batch(key, override)
        return dict(sorted(batches.items()))

    def _checked_batch(self, key: Any, override: Mapping[str, Any]) -> dict[str, Any]:
        """A batch size changes numbers that the operator reads, never the neighbour lists."""
        check_keys(f"batches[{key}]", override, (*BATCH_KEYS, "layers"))
        own, layers = dict(override), override.get("layers", {})
        if not isinstance(layers, Mapping) or not all(
            is_index(i) and isinstance(o, Mapping) for i, o in layers.items()
        ):
            raise PolicyError(f'batches[{key}]: layers={layers!r}: expected {{index: {{"S": 4}}}}')
        own["layers"] = {int(i): dict(o) for i, o in layers.items()}
        for index, settings in own["layers"].items():
            check_keys(f"batches[{key}]: layers[{index}]", settings, BATCH_KEYS)
        everywhere = [(self, own), *((self.for_layer(i), o) for i, o in own["layers"].items())]
        for base, settings in everywhere:
            if (settings.get("tau") is None) is not ("tau" not in settings):
                raise PolicyError(f"batches[{key}]: tau=None: expected a number, or no tau at all")
            if "tau" in settings and base.tau is None:
                raise PolicyError(
                    f"batches[{key}]: tau={settings['tau']} where the policy itself has none: "
                    "stand-ins are chosen once for all batch sizes; give the policy a tau"
                )
        self._with_batch(own)  # raises what is wrong with it
        return own if own["layers"] else {k: v for k, v in own.items() if k != "layers"}

    def _with_batch(self, override: Mapping[str, Any]) -> Policy:
        own = {k: v for k, v in override.items() if k != "layers"}
        base = self._overridden(own)
        layers = {i: dict(o) for i, o in self.layers.items()}
        for index, settings in override.get("layers", {}).items():
            layers[index] = {**layers.get(index, {}), **settings}
        return replace(base, layers=layers)

    def bucket(self, rows: int) -> int:
        """Which of `batches` holds for a step of that many decoded rows: its key, 0 for none."""
        return max((start for start in self.batches if start <= rows), default=0)

    def for_bucket(self, bucket: int) -> Policy | None:
        """The policy behind a key of `batches` (0: below them all); None is stock routing."""
        if not bucket:
            return replace(self, batches={})
        override = self.batches[bucket]
        return None if override is None else self._with_batch(override)

    def at(self, rows: int) -> Policy | None:
        """The policy of a step of that many decoded rows; None is stock routing."""
        return self.for_bucket(self.bucket(rows))

    @property
    def is_stock(self) -> bool:
        """Whether it leaves every batch size to stock routing."""
        return 1 in self.batches and not any(o is not None for o in self.batches.values())

    def for_layer(self, index: int) -> Policy:
        """The settings of one decoder layer, its overrides applied; those of no batch size."""
        return self._overridden(self.layers.get(index, {}))

    def _overridden(self, override: Mapping[str, Any]) -> Policy:
        """One threshold takes the place of the others."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        base = own | {"layers": {}, "batches": {}}
        if override.get("fill") in ("similar", "error", "constant"):
            base |= {"rank": None}
        if any(name in override for name in _THRESHOLDS):
            base |= {"rho": 0.0, "rho_quantile": None, "tau": None}
        return Policy(**{**base, **override})

    def check_against(self, K: int, E: int) -> None:
        """Raise `PolicyError` if these settings make no sense for K of E experts per token."""
        for bucket in self.batches:
            if own := self.for_bucket(bucket):
                try:
                    own.check_against(K, E)
                except PolicyError as error:
                    raise PolicyError(f"batches[{bucket}]: {error}") from None
        for name, settings in [
            ("", self),
            *((f"layers[{i}]: ", self.for_layer(i)) for i in self.layers),
        ]:
            check_sizes(settings, settings.pool_of(E), K, E, name)

    def brief(self) -> str:
        """What differs from the defaults, S always: "S=1 tau=0.02"; or "stock"."""
        if self.is_stock:
            return "stock"
        names = [f.name for f in fields(self) if f.name not in ("S", "layers", "batches")]
        default = Policy()
        given = [f"{n}={v}" for n in names if (v := getattr(self, n)) != getattr(default, n)]
        parts = (["per layer"] if self.layers else []) + (["by batch"] if self.batches else [])
        return " ".join([f"S={self.S}", *given, *parts])

    def to_dict(self) -> dict[str, Any]:
        """JSON-able settings; `from_dict` gives an equal policy back."""
        settings = asdict(self)
        settings["layers"] = {str(index): dict(o) for index, o in self.layers.items()}
        settings["batches"] = {str(rows): _as_json(o) for rows, o in self.batches.items()}
        return settings

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Policy:
        """Build from JSON-able settings; unknown keys are errors."""
        if not isinstance(settings, Mapping):
            raise PolicyError(f'policy {settings!r}: expected settings such as {{"S": 2}}')
        check_keys("policy", settings, [f.name for f in fields(cls)])
        return cls(**settings)

    def to_json(self) -> str:
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> Policy:
        return cls.from_dict(settings_from_json(text))


def in_full(policy: Policy) -> list[str]:
    """All of it: a line for each range of rows of a step and for each layer of its own settings."""
    starts = sorted({1, *policy.batches})
    lines: list[str] = []
    for start, following in zip(starts, [*starts[1:], 0], strict=True):
        rows = f"{start} rows or more" if not following else f"{start} to {following - 1} rows"
        rows = f"{start} row{'s' * (start > 1)}" if following == start + 1 else rows
        own = policy.at(start)
        lines.append(f"{rows}: {in_words(own)}")
        lines += [f"  layer {i}: {json.dumps(o)}" for i, o in (own.layers if own else {}).items()]
    return lines


def in_words(policy: Policy | None) -> str:
    """What differs from the defaults; None is stock routing."""
    return "stock" if policy is None else policy.brief()


def settings_from_json(text: str) -> Mapping[str, Any]:
    """What a policy's JSON text holds, unchecked; `PolicyError` if it is no JSON object."""
    try:
        settings = json.loads(text, object_pairs_hook=once_each)
    except (ValueError, RecursionError) as error:
        raise PolicyError(f'policy {text[:200]!r}: not JSON such as {{"S": 2}} ({error})') from None
    if not isinstance(settings, Mapping):
        raise PolicyError(f'policy {text[:200]!r}: expected settings such as {{"S": 2}}')
    return settings


def _as_json(override: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if override is None:
        return None
    layers = {str(index): dict(o) for index, o in override.get("layers", {}).items()}
    return {**override, **({"layers": layers} if layers else {})}


STOCK = Policy(S=1, batches={1: None})
"""Stock routing at every batch size, as a policy that a table can hold; S fits every model."""
