"""A table and the maps that it names, written one after the other."""

from __future__ import annotations

import sys
from pathlib import Path

from sere.files import KINDS, is_file
from sere.fitting.mapping import shortcomings
from sere.maps import LayerMaps, beside, size_bytes
from sere.maps import save as save_maps
from sere.table import Table


def save(table: Table, maps: dict[int, LayerMaps] | None, output: Path) -> None:
    """The maps first, whose size is said before; without any, those of an earlier table would be
    nobody's, and are removed."""
    if maps is None:
        table.save(output)
        if is_file(stale := beside(output)) and KINDS["maps"](stale):
            stale.unlink()
        return
    _say(maps, beside(output))
    save_maps(beside(output), maps)
    table.save(output)


def _say(maps: dict[int, LayerMaps], path: Path) -> None:
    E, R, H = next(iter(maps.values())).down.shape
    size = size_bytes(len(maps), E, H, R)
    print(f"{path}: {size / 1e6:.1f} MB, linear maps of rank {R} at most", file=sys.stderr)
    for line in shortcomings(maps):
        print(line, file=sys.stderr)
