"""A model without the weights of its decoder layers, which are filled in one at a time.

All of the loading is transformers' own: `from_pretrained` runs as ever, but the function that reads
weights is handed those outside the decoder layers only. Later the same function reads one layer.
Names, merged experts, dtypes and quantisation are therefore transformers' business.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from sere.checkpoint.quantised import in_pairs
from sere.checkpoint.stored import tensors_in
from sere.models.fit import LoadError, refuse_unapplied, refuse_unset
from sere.models.interception import Load, loading_by
from sere.models.loading import load_model
from sere.models.moe import UNIT, MoELayer, moe_layers
from sere.models.scales import applied, weight_of


@dataclass(eq=False)
class Skeleton:
    """A model whose decoder layers are empty.

    units: the decoder layers by module name, in order.
    layers: the MoE layers in them.
    widened: whether it computes in float32 (see `float`).
    """

    model: Any
    layers: list[MoELayer]
    units: dict[str, nn.Module]
    _config: Any
    _sources: dict[str, dict[str, Path]] = field(default_factory=dict)  # unit -> weight -> file
    widened: bool = False
    _pairs: bool = False  # of codes and scales, that transformers does not read

    @property
    def _folder(self) -> str:
        return str(self._config.pretrained_model_name_or_path)

    @property
    def stored_bytes(self) -> int:
        """What all decoder layers take on disk."""
        paths = {path for sources in self._sources.values() for path in sources.values()}
        sizes = {name: held.size for path in paths for name, held in tensors_in(path).items()}
        return sum(sizes[name] for sources in self._sources.values() for name in sources)

    def float(self) -> None:
        """Compute in float32 from now on, with each layer's weights as they are read, widened."""
        self.widened = True
        inside = {id(part) for unit in self.units.values() for part in unit.modules()}
        for part in self.model.modules():
            if id(part) not in inside:
                for values in (part._parameters, part._buffers):
                    for name, value in values.items():
                        if value is not None and value.is_floating_point():
                            values[name] = _like(value, value.float())

    @contextmanager
    def filled(self, unit: str) -> Iterator[None]:
        """Read one decoder layer's weights from the checkpoint, and forget them at the end."""
        from transformers.core_model_loading import convert_and_load_state_dict_in_model

        with _slices(self._sources[unit], self._pairs) as weights, _quiet():
            info, _ = convert_and_load_state_dict_in_model(self.model, weights, self._config)
        module = self.units[unit]
        kinds = {name: weight.dtype for name, weight in module.named_parameters()}
        unset = {f"{unit}.{n}" for n, p in module.named_parameters() if p.device.type == "meta"}
        refuse_unset(
            self._folder,
            unset | {key for key, *_ in info.mismatched_keys} | set(info.conversion_errors),
        )
        if self.widened:
            module.float()
        try:
            yield
        finally:
            for prefix, part in module.named_modules():
                for name, weight in part._parameters.items():
                    if weight is not None:
                        kind = kinds[f"{prefix}.{name}" if prefix else name]
                        empty = torch.empty_like(weight, dtype=kind, device="meta")
                        part._parameters[name] = nn.Parameter(empty, requires_grad=False)


def _like(value: torch.Tensor, wide: torch.Tensor) -> torch.Tensor:
    is_weight = isinstance(value, nn.Parameter)
    return nn.Parameter(wide, requires_grad=False) if is_weight else wide


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bar, which would be one a layer."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def load_skeleton(folder: str) -> Skeleton:
    """Everything of the model in `folder` but its decoder layers' weights, on the first GPU if any.

    Raises `LoadError` as `load_model` does, before any layer is read.
    """
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    made: list[Skeleton] = []
    with _intercepted(made):
        model = load_model(folder, device_map={"": device})
    if not made:
        raise LoadError(
            f"{folder}: this transformers release loads weights in another way, so that layers "
            "cannot be streamed; install transformers 5.10 to 5.19 or calibrate in memory"
        )
    made[0].model = model
    return made[0]


def _intercepted(made: list[Skeleton]) -> AbstractContextManager[None]:
    """Let `from_pretrained` load what is outside the decoder layers; note the rest in `made`."""

    def load_rest(load: Load, model: Any, files: list[str], config: Any, _: Any) -> Any:
        skeleton, rest, unset = _split(model, files, config)
        with _slices(rest, skeleton._pairs) as weights:
            info, offloaded = load(model, weights, files, config)
        inside = tuple(f"{unit}." for unit in skeleton.units)
        later = {key for key in info.missing_keys if key.startswith(inside)}
        info.missing_keys -= later - unset
        made.append(skeleton)
        return info, offloaded

    return loading_by(load_rest)


def _split(model: Any, files: list[str], config: Any) -> tuple[Skeleton, dict[str, Path], set[str]]:
    """The skeleton; the files of all weights outside decoder layers; keys that no file holds."""
    if not all(str(path).endswith(".safetensors") for path in files):
        raise LoadError(
            "layers can only be streamed from .safetensors files; convert the checkpoint "
            "(model.save_pretrained) or calibrate with --no-stream"
        )
    layers = moe_layers(model)
    units = _units(model, layers)
    skeleton = Skeleton(model, layers, units, config, {unit: {} for unit in units})
    state = model.state_dict()
    expected = set(state)
    rest: dict[str, Path] = {}
    unexpected: set[str] = set()
    skeleton._pairs = in_pairs(skeleton._folder)
    for key, path in _keys(files):
        about = weight_of(key) if skeleton._pairs else key
        targets = _targets(about, model.base_model_prefix, config.weight_mapping or [], state)
        expected -= targets
        if not targets & state.keys():
            unexpected.add(key)
        unit = next((u.group() for t in targets if (u := UNIT.match(t))), None)
        skeleton._sources.get(unit or "", rest)[key] = path
    refuse_unapplied(skeleton._folder, unexpected)
    return skeleton, rest, expected


def _units(model: nn.Module, layers: list[MoELayer]) -> dict[str, nn.Module]:
    """All members of the module lists that hold the MoE layers."""
    stacks = dict.fromkeys(m.group(1) for layer in layers if (m := UNIT.match(layer.name)))
    return {
        f"{stack}.{i}": unit
        for stack in stacks
        for i, unit in enumerate(model.get_submodule(stack).children())
    }


def _targets(key: str, prefix: str, mapping: list[Any], state: dict[str, Any]) -> set[str]:
    """The weights of the model's `state` that the checkpoint's tensor `key` goes into."""
    from transformers import core_model_loading as core

    renamings = [entry for entry in mapping if isinstance(entry, core.WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, core.WeightConverter)]
    name, pattern = core.rename_source_key(key, renamings, converters, prefix, state)
    if pattern is None:
        return {name} if name in state else {key}
    into = next(c.target_patterns for c in converters if pattern in c.source_patterns)
    return {name.replace(into[0], target) for target in into}


def _keys(files: list[str]) -> Iterator[tuple[str, Path]]:
    for path in files:
        with safe_open(path, framework="pt") as file:
            yield from ((key, Path(path)) for key in file.keys())  # noqa: SIM118


@contextmanager
def _slices(sources: dict[str, Path], pairs: bool) -> Iterator[dict[str, Any]]:
    """Handles on weights that are not read yet, by name."""
    with ExitStack() as stack:
        files = {
            path: stack.enter_context(safe_open(path, framework="pt"))
            for path in sorted(set(sources.values()))
        }
        stored = {key: files[path].get_slice(key) for key, path in sources.items()}
        yield applied(stored) if pairs else stored
