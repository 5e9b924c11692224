"""What an engine has found or made for itself: in the process that drives the workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from sere.maps import LayerMaps, Maps, identity_of
from sere.serving.table_cache import file_of
from sere.table import Table


@dataclass(frozen=True)
class Own:
    """A table, and its maps if they were asked for.

    data: the table's file. table: what is in it; of its maps it knows all but their matrices.
    layer: reads or returns the maps of a layer, by index. path: where it is kept, if it is.
    """

    data: bytes
    table: Table
    layer: Callable[[int], LayerMaps] | None = None
    path: Path | None = None

    @classmethod
    def found(cls, data: bytes, table: Table, path: Path) -> Own:
        """See `Entry.read`."""
        return cls(data, table, table.maps.layer if table.maps else None, path)

    @classmethod
    def made(cls, table: Table, maps: Mapping[int, LayerMaps]) -> Own:
        """A new table, with maps that may be kept nowhere."""
        data = file_of(table)
        if not maps:
            return cls(data, table)
        first = next(iter(maps.values()))
        left = {index: layer.left for index, layer in maps.items()}
        known = Maps(Path(), identity_of(maps), first.R, first.constant.shape[1], left)
        return cls(data, replace(table, maps=known), maps.__getitem__)

    def layers(self) -> Iterator[tuple[int, LayerMaps]]:
        """One layer's maps after the other."""
        if self.table.maps is not None and self.layer is not None:
            for index in self.table.maps.left:
                yield index, self.layer(index)
