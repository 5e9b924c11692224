"""The linear maps that belong to an engine's own table: in the process that drives the workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from sere.maps import LayerMaps, Maps, MapsError, identity_of, opened
from sere.serving.table_cache import CacheTrouble, Entry, table_in


@dataclass(frozen=True)
class Own:
    """What an engine has found or made.

    data: the table's file. maps: what it knows of its maps without their matrices; None where none
    were asked for. layer: reads or returns the maps of a layer, by index.
    """

    data: bytes
    maps: Maps | None = None
    layer: Callable[[int], LayerMaps] | None = None

    @classmethod
    def found(cls, data: bytes, entry: Entry) -> Own:
        """A table of the cache, whose maps lie beside it. Raises `CacheTrouble`."""
        about = table_in(data).provenance
        if "maps" not in about:
            return cls(data)
        try:
            maps = opened(entry.path, about)
        except MapsError as error:  # another engine has replaced both meanwhile
            raise CacheTrouble(str(error)) from None
        if maps is None:
            raise CacheTrouble(f"the maps of {entry.path} are gone")
        return cls(data, maps, maps.layer)

    @classmethod
    def made(cls, data: bytes, maps: Mapping[int, LayerMaps]) -> Own:
        """A new table, with maps that may be kept nowhere."""
        if not maps:
            return cls(data)
        first = next(iter(maps.values()))
        left = {index: layer.left for index, layer in maps.items()}
        known = Maps(Path(), identity_of(maps), first.R, first.constant.shape[1], left)
        return cls(data, known, maps.__getitem__)

    def layers(self) -> Iterator[tuple[int, LayerMaps]]:
        """One layer's maps after the other."""
        if self.maps is not None and self.layer is not None:
            for index in self.maps.left:
                yield index, self.layer(index)
