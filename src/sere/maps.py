"""The second side file: what answers for an expert that is not loaded, without any other expert.

For every expert of a layer a linear map of the experts' own input, in bf16, and how much of the
expert's output it leaves unexplained (`sere.fitting.regression`). The file lies beside the
table (`t.table.maps` beside `t.table`), which names it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sere.files import is_file, replaced, unreadable, unwritten

FORMAT = 1
_UNREADABLE = (SafetensorError, KeyError, TypeError, ValueError, OSError, RecursionError)


class MapsError(ValueError):
    """A file of maps that must not be used: names the file, the fault and what to do next."""


@dataclass(frozen=True)
class LayerMaps:
    """One layer's maps: `E_u(x) ~ constant[u] + up[u]^T (down[u] x - centre[u])`.

    down, up: [E, R, H] bf16; the first r of the R are the best map of rank r.
    centre: [E, R] float32, what `down` makes of the mean input. constant: [E, H] float32.
    left: [E, R + 1] float32, the share of the expert's output energy that the map of each rank
        leaves, over tokens routed to it that the fit had not seen; 1 where dropping is better.
    ranks: [E] int32, the rank that those tokens chose; what lies beyond is 0.
    tokens: [E] int64, how many of its tokens the fit saw.
    affine: [E, E] float32, row u: the share that is left when expert v stands in for u with the
        best factor and the best constant; for comparison, it is never served.
    """

    down: Tensor
    up: Tensor
    centre: Tensor
    constant: Tensor
    left: Tensor
    ranks: Tensor
    tokens: Tensor
    affine: Tensor

    @property
    def R(self) -> int:
        return self.down.shape[1]

    @classmethod
    def imagined(cls, E: int, H: int, R: int, seed: int) -> LayerMaps:
        """Random maps with small answers, for measuring what they take."""
        g = torch.Generator().manual_seed(seed)
        down, up = (torch.randn(E, R, H, generator=g) / H for _ in range(2))
        centre, constant, left = torch.zeros(E, R), torch.zeros(E, H), torch.ones(E, R + 1)
        ranks, tokens = torch.full((E,), R, dtype=torch.int32), torch.zeros(E, dtype=torch.int64)
        wide = (down.bfloat16(), up.bfloat16(), centre, constant)
        return cls(*wide, left, ranks, tokens, torch.ones(E, E))

    @classmethod
    def empty(cls, E: int, H: int, R: int) -> LayerMaps:
        """Maps that answer with 0: the room for others. On the CPU and of the types above, whatever
        the defaults are while a model is built."""

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device="cpu")

        down, up = (zeros(E, R, H, dtype=torch.bfloat16) for _ in range(2))
        counts = zeros(E, dtype=torch.int32), zeros(E, dtype=torch.int64)
        left, affine = zeros(E, R + 1) + 1, zeros(E, E) + 1
        return cls(down, up, zeros(E, R), zeros(E, H), left, *counts, affine)

    def of_rank(self, rank: int) -> LayerMaps:
        """The maps cut to their first `rank` ranks; 0: the constants."""
        parts = {name: getattr(self, name)[:, :rank] for name in ("down", "up", "centre")}
        left = self.left[:, : rank + 1]
        ranks = self.ranks.clamp(max=rank)
        return LayerMaps(
            **parts,
            constant=self.constant,
            left=left,
            ranks=ranks,
            tokens=self.tokens,
            affine=self.affine,
        )

    def to(self, device: torch.device | str) -> LayerMaps:
        return LayerMaps(*(getattr(self, field.name).to(device) for field in fields(self)))

    def answers(self, hidden: Tensor, ids: Tensor, coefficients: Tensor) -> Tensor:
        """[n, H] float32: the sum over slots of coefficient times the map of the slot's expert.

        hidden: [n, H], the experts' input. ids, coefficients: [n, K]; 0 where nothing is asked.
        All maps are read, in two products of matrices: at rank 16 those of 128 experts weigh less
        than two experts of Qwen3-30B-A3B.
        """
        E, R, _ = self.down.shape
        whole = coefficients.new_zeros(len(hidden), E, dtype=torch.float32)
        whole.scatter_add_(1, ids.long().clamp(0, E - 1), coefficients.float())
        inner = (hidden.float() @ self.down.float().flatten(0, 1).T).view(len(hidden), E, R)
        asked = ((inner - self.centre) * whole[:, :, None]).view(len(hidden), E * R)
        return asked @ self.up.float().flatten(0, 1) + whole @ self.constant


def size_bytes(layers: int, E: int, H: int, rank: int) -> int:
    """Of a file of maps, but for its head."""
    return layers * E * (4 * rank * H + 4 * rank + 4 * H + 4 * (rank + 1) + 4 + 8 + 4 * E)


def served_bytes(E: int, H: int, rank: int) -> int:
    """Of one layer's maps where they are served."""
    return E * (4 * rank * H + 4 * rank + 4 * H)


@dataclass(frozen=True)
class Maps:
    """An opened file of maps; `layer` reads what is asked for.

    identity: of its contents; the table that it was made with names it. R: the largest rank. H: the
    width of what is mapped.
    left: by layer index (see `LayerMaps`).
    """

    path: Path
    identity: str
    R: int
    H: int
    left: dict[int, Tensor]

    @classmethod
    def open(cls, path: str | Path) -> Maps:
        """Raises `MapsError` for what is no complete file of maps."""
        path = Path(path)
        if fault := unreadable(path, "no such file of maps; run `sere calibrate --maps` again"):
            raise MapsError(fault)
        try:
            with safe_open(path, framework="pt") as file:
                document = json.loads((file.metadata() or {})["sere_maps"])
                if document["format"] != FORMAT:
                    raise MapsError(
                        f"{path}: maps of format {document['format']}, this version reads "
                        f"{FORMAT}: install the matching sere or calibrate again"
                    )
                left = {i: file.get_tensor(f"layers.{i}.left") for i in document["layers"]}
                (_, H) = file.get_slice(f"layers.{document['layers'][0]}.constant").get_shape()
            return cls(path, document["identity"], document["rank"], H, left)
        except MapsError:
            raise
        except _UNREADABLE as error:
            raise MapsError(
                f"{path}: not a complete file of maps ({error}); run `sere calibrate --maps` again"
            ) from error

    def layer(self, index: int) -> LayerMaps:
        names = [field.name for field in fields(LayerMaps)]
        with safe_open(self.path, framework="pt") as file:
            return LayerMaps(*(file.get_tensor(f"layers.{index}.{name}") for name in names))


def beside(table: str | Path) -> Path:
    """Where a table's maps lie."""
    return Path(f"{table}.maps")


def opened(table: Path, provenance: Mapping[str, Any]) -> Maps | None:
    """The maps that a table was made with, if they lie beside it.

    Raises `MapsError` for maps of another calibration.
    """
    own = provenance.get("maps")
    if own is None or not is_file(path := beside(table)):
        return None
    found = Maps.open(path)
    if found.identity != own["identity"]:
        raise MapsError(
            f"{path} belongs to another calibration than {table}: put the one that was written "
            "with the table there, or calibrate again with --maps"
        )
    return found


def identity_of(layers: Mapping[int, LayerMaps]) -> str:
    """SHA-256 of what the maps are."""
    digest = hashlib.sha256()
    for index, layer in layers.items():
        digest.update(str(index).encode())
        for name in ("left", "constant", "centre", "ranks"):
            digest.update(getattr(layer, name).contiguous().numpy().tobytes())
    return digest.hexdigest()


def save(path: str | Path, layers: Mapping[int, LayerMaps]) -> None:
    """Write the file atomically; an existing one survives any failure."""
    tensors = {
        f"layers.{index}.{field.name}": getattr(layer, field.name).contiguous()
        for index, layer in layers.items()
        for field in fields(LayerMaps)
    }
    document = {
        "format": FORMAT,
        "identity": identity_of(layers),
        "rank": next(iter(layers.values())).R,
        "layers": list(layers),
    }
    with replaced(path) as temporary:
        try:
            save_file(tensors, temporary, metadata={"sere_maps": json.dumps(document)})
        except SafetensorError as error:
            raise unwritten(path, error) from error
