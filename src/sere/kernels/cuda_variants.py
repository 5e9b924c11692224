"""Forms of the CUDA kernel (reroute.cu), all equal bit for bit: which is fastest where is measured.

`benchmarks/bench_variants.py` times every one of `VARIANTS` on a GPU and writes which to take for
which T, E and K; `cuda_kernel` reads that. Until there is such a table, `MEASURED` serves.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

JOINED = {"alone": 0, "cluster": 1, "ticket": 2}
"""How the blocks of a launch vote as one; the numbers are those of row_lanes.cuh."""
SLOTS_OF_A_CLUSTER = 8
"""Blocks of the largest cluster that every GPU of sm_90 and later takes."""


@dataclass(frozen=True)
class Variant:
    """One form, by compile-time switches and how it is launched.

    threads: of a block, a multiple of 32 up to 1024.
    in_place: new ids are written over the old ones, so that what stays is not written at all, and
        switched off is one load and an exit.
    fixed: K and E are constants of the code, and the batch has no gaps.
    short: neighbour lists of int16 (the plan has to hold them so).
    lanes: a row is some lanes of a warp (row_lanes.cuh); implies `fixed`.
    joined: of `JOINED`; more than one block asks for `lanes`.
    blocks: of the launch.
    pdl: the launch may begin before the kernel in front of it has ended (Hopper and later).
    """

    threads: int = 1024
    in_place: bool = False
    fixed: bool = False
    short: bool = False
    lanes: bool = False
    joined: str = "alone"
    blocks: int = 1
    pdl: bool = False

    def __post_init__(self) -> None:
        if self.threads not in range(32, 1025, 32):
            raise ValueError(f"threads={self.threads}: expected a multiple of 32 up to 1024")
        if self.joined not in JOINED:
            raise ValueError(f"joined={self.joined!r}: expected one of {', '.join(JOINED)}")
        if (self.blocks > 1) != (self.joined != "alone") or (self.blocks > 1 and not self.lanes):
            raise ValueError(f"{self}: several blocks ask for lanes, and to be joined")
        if self.joined == "cluster" and self.blocks > SLOTS_OF_A_CLUSTER:
            raise ValueError(f"blocks={self.blocks}: a cluster has up to {SLOTS_OF_A_CLUSTER}")
        if self.lanes and not self.fixed:
            raise ValueError(f"{self}: lanes ask for fixed sizes")
        if self.pdl and not self.lanes:
            raise ValueError(f"{self}: only lanes begin before the kernel in front has ended")

    @property
    def name(self) -> str:
        """For tables: what differs from the form that was measured first."""
        parts = [f"{self.threads}" if self.threads != 1024 else ""]
        parts += [
            word for word in ("in_place", "fixed", "short", "lanes", "pdl") if vars(self)[word]
        ]
        parts += [f"{self.joined} {self.blocks}" if self.blocks > 1 else ""]
        return ", ".join(part for part in parts if part) or "as measured"

    def macros(self, E: int, K: int) -> dict[str, str]:
        """Compile-time switches, without the types of ids and weights."""
        chosen = {"THREADS": str(self.threads)} if self.threads != 1024 else {}
        if self.fixed:
            chosen |= {"EXPERTS": str(E), "SLOTS_K": str(K)}
        if self.short:
            chosen["NEIGHBOUR"] = "short"
        if self.lanes:
            chosen |= {"ROW_LANES": "1", "JOINED": str(JOINED[self.joined])}
            chosen["PDL"] = str(int(self.pdl))
        return chosen

    def fits(self, T: int, E: int, K: int, capability: tuple[int, int] = (9, 0)) -> bool:
        """Whether it serves such a batch, on a GPU of this compute capability."""
        if (self.pdl or self.joined == "cluster") and capability < (9, 0):
            return False
        return not self.lanes or (E + self.threads // 32 - 1) // (self.threads // 32) <= MOST_LISTS


MOST_LISTS = 32
"""Neighbour lists that a warp of `lanes` holds the heads of, a register each."""

MEASURED = Variant()
"""What ran on an H100 on 2026-11-27, but for the rule that rows name distinct experts."""

_LANES = Variant(threads=256, in_place=True, fixed=True, lanes=True)
VARIANTS = (
    MEASURED,
    # One lead at a time.
    Variant(in_place=True),
    Variant(threads=512),
    Variant(threads=256),
    Variant(fixed=True),
    Variant(short=True),
    # Together, and rows in registers.
    Variant(threads=256, in_place=True, fixed=True, short=True),
    _LANES,
    replace(_LANES, threads=512),
    replace(_LANES, threads=1024),
    replace(_LANES, short=True),
    replace(_LANES, pdl=True),
    replace(_LANES, short=True, pdl=True),
    replace(_LANES, threads=512, short=True, pdl=True),
    replace(_LANES, threads=1024, short=True, pdl=True),
    # Large batches.
    *(
        replace(_LANES, threads=threads, short=True, pdl=True, joined=joined, blocks=blocks)
        for joined, threads, blocks in (
            ("cluster", 512, 4), ("cluster", 512, 8), ("cluster", 1024, 8),
            ("ticket", 512, 8), ("ticket", 1024, 16),
        )
    ),
)  # fmt: skip
"""What is measured, and hence what can be chosen."""
