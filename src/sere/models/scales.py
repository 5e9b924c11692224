"""Weights stored as int8 or float8 beside their scales, read as what they stand for.

For checkpoints of which transformers leaves the scales out (`quantised.in_pairs`): a weight is
`(code - zero point) * scale`, with one scale for all of it, for a row, or for a group of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from safetensors import safe_open
from torch import Tensor

from sere.checkpoint.quantised import FLOATS
from sere.models.fit import LoadError
from sere.models.interception import Load, loading_by

_SCALE, _ZERO = "_scale", "_zero_point"


class Scaled:
    """A weight that is not read yet, like a slice of safetensors'; its values are float32."""

    def __init__(self, name: str, stored: Mapping[str, Any]) -> None:
        """stored: slices by name, its scale among them. Raises `LoadError` if there is none."""
        if name + _SCALE not in stored:
            raise LoadError(f"{name} is stored as {stored[name].get_dtype()}, without a scale")
        self._name, self._codes = name, stored[name]
        self._scale, self._zero = stored[name + _SCALE], stored.get(name + _ZERO)

    def get_shape(self) -> list[int]:
        return list(self._codes.get_shape())

    def get_dtype(self) -> str:
        return "F32"

    def __getitem__(self, index: Any) -> Tensor:
        values: Tensor = self._codes[...].float()
        if self._zero is not None:
            values -= self._spread(self._zero[...].float(), values)
        values *= self._spread(self._scale[...].float(), values)
        return values if index is ... else values[index]

    def _spread(self, given: Tensor, values: Tensor) -> Tensor:
        """One number for all, [out], or of as many dimensions as the weight, in equal blocks."""
        if given.numel() == 1:
            return given.reshape(())
        if given.ndim == 1:
            given = given[:, None]
        if given.ndim != values.ndim or any(map(lambda n, m: n % m, values.shape, given.shape)):
            raise LoadError(
                f"{self._name} {list(values.shape)} has scales {list(given.shape)}: expected one, "
                "one a row, or one for equal parts of a row. Calibrate the original checkpoint"
            )
        for dim, (size, parts) in enumerate(zip(values.shape, given.shape, strict=True)):
            given = given.repeat_interleave(size // parts, dim) if parts > 1 else given
        return given


def weight_of(key: str) -> str:
    """The weight that a scale or zero point is about; any other key unchanged."""
    for end in (_SCALE, _ZERO):
        if key.endswith(f".weight{end}"):
            return key.removesuffix(end)
    return key


def applied(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The same slices, weights with their scales and the scales gone."""
    return {
        key: part if part.get_dtype() in FLOATS else Scaled(key, stored)
        for key, part in stored.items()
        if weight_of(key) == key or weight_of(key) not in stored
    }


def scales_applied() -> AbstractContextManager[None]:
    """Let `from_pretrained` read weights as what they stand for."""

    def load_applied(load: Load, model: Any, files: list[str], config: Any, expected: Any) -> Any:
        opened: list[Any] = [safe_open(path, framework="pt") for path in files]
        stored = {key: file.get_slice(key) for file in opened for key in file.keys()}  # noqa: SIM118
        return load(model, applied(stored), files, config, expected)

    return loading_by(load_applied)
