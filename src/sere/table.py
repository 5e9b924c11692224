"""The side file: what calibration learnt about one model, in a few MB.

A `.safetensors` file with six tensors per MoE layer and one JSON document of metadata. Loading
checks the file in itself (`Table.load`) and against a model (`Table.check_against`), and refuses
with the reason: a table of another model would re-route silently and wrongly.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sere.checkpoint import Fingerprint, configured, weight_hashes
from sere.files import absent, is_folder, replaced, unreadable, unwritten
from sere.kernels import Plan
from sere.kernels.plan import OUTPUTS_UNKNOWN, Placement, Substitution, can_move, settings_of
from sere.maps import Maps, MapsError, opened
from sere.policy import Policy, PolicyError
from sere.statistics import TENSORS, check_layer, is_identity
from sere.statistics import LayerStatistics as LayerStatistics
from sere.statistics import TableError as TableError
from sere.threads import one_thread

FORMAT = 3
_FIRST = 2  # its fingerprints have hashes of names and bytes; such a table stays one
# Beside a model. Not *.safetensors: vLLM would take it for a shard of the model's weights.
FILE_NAME = "sere.table"
TUNED = "tuned"  # the word, where a policy is asked for, for that which the table carries
# What reading a file that is no table, or no longer one, can end in.
_UNREADABLE = (SafetensorError, KeyError, TypeError, ValueError, OSError, RecursionError)


@dataclass(frozen=True)
class Table:
    """Similarity tables of all MoE layers of one model, with their provenance.

    fingerprint: the model that the table was made for.
    layers: statistics by decoder layer index, ascending.
    method: how similarity was measured, e.g. "frobenius".
    provenance: JSON-able facts: corpus hash, tokens, seed, versions, layer names.
    policy: what `sere tune` chose for this model; serving takes it unless told otherwise.
    maps: the linear maps that were fitted with it, where they lie beside its file.
    """

    fingerprint: Fingerprint
    layers: dict[int, LayerStatistics]
    method: str
    provenance: dict[str, Any] = field(default_factory=dict)
    policy: Policy | None = None
    maps: Maps | None = None

    def __post_init__(self) -> None:
        if tuple(self.layers) != self.fingerprint.layers:
            raise TableError(
                f"layers {list(self.layers)} do not match the fingerprint's "
                f"{list(self.fingerprint.layers)}"
            )
        for index, layer in self.layers.items():
            check_layer(index, layer, self.fingerprint.E)
        if all(is_identity(layer.similarity) for layer in self.layers.values()):
            raise TableError(
                "every similarity matrix is the identity: no expert would ever be replaced by a "
                "similar one; calibrate again with another --method (cosine)"
            )

    @one_thread()
    def plan(self, index: int, policy: Policy, placement: Placement | None = None) -> Plan:
        """The operator's plan for one layer under `policy` (layer overrides applied)."""
        layer, settings = self.layers[index], self._policy_of(index, policy)
        if is_identity(layer.similarity):
            return Plan.build(layer.similarity, settings, K=self.fingerprint.K)
        members = self._largest_pool(index, policy)
        if settings.frees:
            return self._freeing_plan(index, settings, members)
        substitution = layer.substitution(scaled=settings.scales) if layer.tokens else None
        return Plan.build(
            layer.similarity,
            settings,
            K=self.fingerprint.K,
            substitution=substitution,
            placement=placement,
            calls=layer.load,
            pool=members,
        )

    def _largest_pool(self, index: int, policy: Policy) -> int:
        """Members that a layer's pool has at most, at any batch size."""
        by_size = (policy.for_bucket(bucket) for bucket in policy.batches)
        owns = (self._policy_of(index, own) for own in (policy, *by_size) if own)
        return max(own.pool_of(self.fingerprint.E) for own in owns)

    def _freeing_plan(self, index: int, policy: Policy, members: int) -> Plan:
        """No expert stands in for another: each is as far as the next one, which loads experts
        alike, and takes over nothing; what is lost is what its own map leaves."""
        layer, E = self.layers[index], self.fingerprint.E
        lost = layer.left_over(self.maps_for(policy).left[index][:, policy.rank_of(self.R)])
        after = (torch.arange(E)[None, :] - torch.arange(E)[:, None]) % E
        return Plan.build(
            (E - after).double(),
            policy,
            K=self.fingerprint.K,
            substitution=Substitution(lost[:, None].expand(E, E), torch.zeros(E, E)),
            calls=layer.load,
            pool=members,
        )

    @property
    def R(self) -> int:
        """The largest rank of its maps; 0 if it has none."""
        return self.maps.R if self.maps else 0

    def maps_for(self, policy: Policy) -> Maps:
        """Raise `PolicyError` if a layer's policy needs maps that are not there."""
        if self.maps is None:
            lost = "maps" in self.provenance
            raise PolicyError(
                f'fill="{policy.fill}" needs linear maps, and the table '
                f"{'has lost its file of them (TABLE.maps)' if lost else 'was made without'}: "
                "calibrate with --maps 16"
            )
        if (policy.rank or 0) > self.R:
            raise PolicyError(
                f"rank={policy.rank} exceeds that of the maps, {self.R}: lower it, or calibrate "
                f"with --maps {policy.rank}"
            )
        return self.maps

    def settings(self, index: int, policy: Policy) -> Tensor:
        """`Plan.settings` of `plan`, without the lists, which take a sort of [E, E]."""
        return settings_of(self._policy_of(index, policy), self.fingerprint.K, self.fingerprint.E)

    def can_move(self, policy: Policy) -> bool:
        """Whether re-routing under `policy` can move anything, in any layer at any batch size: not
        with S = K, nor with a rho above every similarity."""
        buckets = [*policy.batches] if 1 in policy.batches else [0, *policy.batches]
        by_size = [own for own in map(policy.for_bucket, buckets) if own]
        settings = ((i, self._policy_of(i, own)) for own in by_size for i in self.layers)
        return any(
            can_move(self.layers[i].similarity, own, self.fingerprint.K) for i, own in settings
        )

    def can_move_own(self, policy: Policy) -> bool:
        """Whether it can move anything in INDEPENDENT rows, which know the policy's own pool and
        threshold and nothing else of it."""
        E, K = self.fingerprint.E, self.fingerprint.K
        by_layer = ((i, self._policy_of(i, policy)) for i in self.layers)
        return any(
            can_move(
                self.layers[i].similarity, replace(own, S=0, min_active=None, max_active=None), K
            )
            for i, own in by_layer
            if own.pool_of(E) >= K
        )

    def _policy_of(self, index: int, policy: Policy) -> Policy:
        """The layer's own; where nothing is known of its experts, one that moves nothing."""
        settings = policy.for_layer(index)
        if is_identity(self.layers[index].similarity):
            return Policy(S=max(settings.S, 1), rho=2.0, max_active=settings.max_active)
        return settings

    def check_against(self, model: Fingerprint) -> None:
        """Raise `TableError` unless this table was calibrated on `model`."""
        differences = self.fingerprint.differences(model)
        if differences:
            raise TableError(
                "the table belongs to another model:\n  "
                + "\n  ".join(differences)
                + "\nrun `sere calibrate` on the model that you serve"
            )

    def check_policy(self, policy: Policy) -> None:
        """Raise `PolicyError` for settings that make no sense for this table's model, are for
        layers that it has not and would do nothing, or need what it does not know."""
        policy.check_against(self.fingerprint.K, self.fingerprint.E)
        by_size = (policy.for_bucket(bucket) for bucket in policy.batches)
        named = set(policy.layers).union(*(own.layers for own in by_size if own))
        if unknown := sorted(named - set(self.layers)):
            raise PolicyError(f"layers {unknown} of the policy are not among {list(self.layers)}")
        for index, layer in self.layers.items():
            if self._policy_of(index, policy).needs_errors and not layer.tokens:
                raise PolicyError(OUTPUTS_UNKNOWN)
        for own in (policy, *(policy.for_layer(index) for index in policy.layers)):
            if own.frees:
                self.maps_for(own)

    def tuned(self) -> Policy:
        """What `sere tune` left in it, where that re-routes. Raises `PolicyError` where not."""
        if self.policy is None:
            raise PolicyError("the table carries no policy: run `sere tune`, or give JSON")
        if self.policy.is_stock:
            raise PolicyError(
                "the choice of `sere tune` in this table is stock routing at every batch size: "
                "there is nothing to compare with stock; give a policy as JSON"
            )
        return self.policy

    def check_made_for(self, folder: str | Path) -> bool:
        """Raise `TableError` if this table was made for other weights than a local checkpoint's.

        False if there are none to compare with: no folder, or no safetensors in it.
        """
        known = self.fingerprint
        router, experts = weight_hashes(folder, known.layers, known.E, known.hashing)
        model = replace(known, router_hash=router, experts_hash=experts)
        if known.differences(model):  # which may be of more than weights: that is said then
            E, K = configured(folder)
            self.check_against(replace(model, E=E or known.E, K=K or known.K))
        return router is not None

    def save(self, path: str | Path) -> None:
        """Write the file atomically; an existing one survives any failure."""
        tensors = {
            f"layers.{index}.{name}": getattr(layer, name).float().contiguous().clone()
            for index, layer in self.layers.items()
            for name in TENSORS
        }
        fields = asdict(self.fingerprint)
        hashing = fields.pop("hashing")
        document = {
            "format": _FIRST if hashing == 1 else FORMAT,
            "fingerprint": fields if hashing == 1 else {**fields, "hashing": hashing},
            "method": self.method,
            "tokens": {str(index): layer.tokens for index, layer in self.layers.items()},
            "stability": {str(index): layer.stability for index, layer in self.layers.items()},
            "provenance": self.provenance,
            "policy": self.policy.to_dict() if self.policy else None,
        }
        with replaced(path) as temporary:
            try:
                save_file(tensors, temporary, metadata={"sere": json.dumps(document)})
            except SafetensorError as error:  # its own wrapper of "No space left on device" etc.
                raise unwritten(path, error) from error

    @classmethod
    def load(cls, path: str | Path) -> Table:
        """Read and check a table; `TableError` names the file, the fault and the remedy."""
        path = Path(path)
        output = path / FILE_NAME if is_folder(path) else path
        made = f"make one with `sere calibrate MODEL -o {output}`"
        if fault := unreadable(path, absent(path, "table", made)):
            raise TableError(fault)
        try:
            with safe_open(path, framework="pt") as file:
                document = _document(file.metadata() or {})
                fingerprint = _fingerprint(document)
                provenance = _typed(document, "provenance", dict)
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return cls(
                fingerprint,
                dict(_layers(fingerprint, document, tensors)),
                _typed(document, "method", str),
                provenance,
                _policy(document),
                opened(path, provenance),
            )
        except MapsError:
            raise
        except TableError as error:
            raise TableError(f"{path}: {error}") from None
        except _UNREADABLE as error:
            raise TableError(
                f"{path}: not a complete sere table ({error}); truncated or foreign file? "
                "Run `sere calibrate` again"
            ) from error


def _document(metadata: dict[str, str]) -> dict[str, Any]:
    if "sere" not in metadata:
        raise TableError(
            "a safetensors file, but not a sere table (no 'sere' metadata); "
            "make one with `sere calibrate`"
        )
    document: dict[str, Any] = json.loads(metadata["sere"])
    if not isinstance(document, dict):
        raise TableError("its metadata is not a JSON object; run `sere calibrate` again")
    if document["format"] not in (_FIRST, FORMAT):
        raise TableError(
            f"table format {document['format']}, this version reads {_FIRST} and {FORMAT}: "
            "install the matching sere or calibrate again"
        )
    return document


def _policy(document: dict[str, Any]) -> Policy | None:
    stored = document.get("policy")
    return None if stored is None else Policy.from_dict(stored)


def carried(path: str | Path) -> tuple[Policy | None, int, bool] | None:
    """The policy that a table carries, its model's K, and whether it knows experts' outputs, which
    it does unless it was made without text; None for a file that is no table (see `Table.load`)."""
    try:
        with safe_open(path, framework="pt") as file:
            document = _document(file.metadata() or {})
            knows = all(document["tokens"].values())
            return _policy(document), _fingerprint(document).K, knows
    except PolicyError:
        raise
    except (*_UNREADABLE, AttributeError):  # TableError is a ValueError
        return None


def _fingerprint(document: dict[str, Any]) -> Fingerprint:
    fields = document["fingerprint"]
    if document["format"] == _FIRST:
        fields = {**fields, "hashing": 1}
    found = Fingerprint(**{**fields, "layers": tuple(fields["layers"])})
    E, K, _ = (_whole(name, getattr(found, name), 1) for name in ("E", "K", "hashing"))
    if K > E:
        raise TableError(f"K={K} exceeds E={E}")
    for index in found.layers:
        _whole("a layer's index", index, 0)
    _typed(fields, "architecture", str)
    for name in ("router_hash", "experts_hash"):
        _typed(fields, name, (str, type(None)))
    return found


def _typed(fields: Mapping[str, Any], name: str, kind: type | tuple[type, ...]) -> Any:
    if not isinstance(value := fields.get(name), kind):
        raise TableError(f"{name}={value!r} in its metadata; calibrate again")
    return value


def _whole(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**31:
        raise TableError(f"{name} is {value!r} in its metadata, expected a whole number >= {least}")
    return value


def _layers(
    fingerprint: Fingerprint, document: dict[str, Any], tensors: dict[str, Tensor]
) -> Iterator[tuple[int, LayerStatistics]]:
    tokens, stability = _typed(document, "tokens", dict), document.get("stability")
    for index in fingerprint.layers:
        own: dict[str, Any] = {name: tensors[f"layers.{index}.{name}"] for name in TENSORS}
        for name, tensor in own.items():
            if tensor.dtype != torch.float32:
                raise TableError(f"layer {index}: {name} is {tensor.dtype}, expected float32")
        seen = _whole(f"tokens of layer {index}", tokens[str(index)], 0)
        own |= {"tokens": seen, "stability": _stability(stability, index)}
        yield index, LayerStatistics(**own)


def _stability(known: Any, index: int) -> float | None:
    share = known.get(str(index)) if isinstance(known, Mapping) else None
    if isinstance(share, bool) or not (share is None or isinstance(share, int | float)):
        raise TableError(f"stability of layer {index} is {share!r} in its metadata")
    return share
