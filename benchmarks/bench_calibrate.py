"""Similarity of a layer's experts: our streaming statistics against pairs of resident outputs.

    python benchmarks/bench_calibrate.py -o benchmarks/results/calibrate.json

The other side is the straightforward way: all outputs [E, T, H] in memory, the same formula for one
pair of experts after the other, in float32. Both run in turn on the same outputs; where all pairs
would take minutes, a random sample is timed and scaled up ("pairs" says how many). Values must
agree to 1e-5 with the same formula in float64, or no figure is given. Peak memory is that of fresh
processes, outputs included: the streaming side never holds more than one chunk of them.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import psutil
import torch
from torch import Tensor
from tqdm import tqdm

from sere.calibration.observation import CHUNK
from sere.results import provenance
from sere.similarity.measures import CKA_CHUNK, METHODS

H = 512
EXPERTS, TOKENS = (16, 32, 64, 128), (512, 2048, 8192)
TOLERANCE = 1e-5
_PAIRS = 120  # timed at most


def outputs_of(x: Tensor, E: int) -> Iterator[Tensor]:
    """Each expert's output on hidden states x [n, H]: a shared part and one of its own."""
    for expert in range(E):
        random = torch.Generator().manual_seed(expert)
        down, up = torch.randn(2, H, 8, generator=random)
        yield x * torch.rand(H, generator=random) + (x @ down / 8).relu() @ up.T


def chunks(T: int, E: int) -> Iterator[Tensor]:
    """Outputs [E, CHUNK, H], one chunk of tokens after the other, in one buffer."""
    random = torch.Generator().manual_seed(1)
    outputs = torch.empty(E, CHUNK, H)
    for _ in range(T // CHUNK):
        x = torch.randn(CHUNK, H, generator=random)
        for expert, output in enumerate(outputs_of(x, E)):
            outputs[expert] = output
        yield outputs


def streaming(method: str, E: int, parts: Iterator[Tensor]) -> Tensor:
    """Our way."""
    measure = METHODS[method](E)
    chosen = torch.ones(CHUNK, E, dtype=torch.bool)
    for part in parts:
        measure.update(part, chosen)
    return measure.result()


def distance(u: Tensor, v: Tensor) -> float:
    return (u - v).norm().item()


def cosine(u: Tensor, v: Tensor) -> float:
    return (torch.nn.functional.cosine_similarity(u, v, dim=-1).mean().item() + 1) / 2


def cka(u: Tensor, v: Tensor) -> float:
    """Unbiased HSIC, averaged over chunks, of one pair."""
    sums = [0.0, 0.0, 0.0]
    for x, y in zip(u.split(CKA_CHUNK), v.split(CKA_CHUNK), strict=True):
        k, m = (x @ x.T).fill_diagonal_(0), (y @ y.T).fill_diagonal_(0)
        for i, (a, b) in enumerate([(k, m), (k, k), (m, m)]):
            n = len(x)
            product = a.sum() * b.sum() / ((n - 1) * (n - 2))
            cross = 2 / (n - 2) * (a.sum(0) @ b.sum(1))
            sums[i] += ((a * b).sum() + product - cross).item() / (n * (n - 3))
    return max(0.0, sums[0] / (sums[1] * sums[2]) ** 0.5)


PAIRWISE: dict[str, Callable[[Tensor, Tensor], float]] = {
    "frobenius": distance,
    "cosine": cosine,
    "cka-linear": cka,
}


def measure(method: str, E: int, T: int, rounds: int) -> dict[str, object]:
    """Seconds of both sides, in turn, and how far their values are apart."""
    outputs = [part.clone() for part in chunks(T, E)]
    resident = torch.cat(outputs, dim=1)
    every = list(itertools.combinations(range(E), 2))
    pairs = Random(0).sample(every, min(_PAIRS, len(every)))
    seconds: dict[str, list[float]] = {"streaming": [], "pairwise": []}
    for _ in range(rounds):
        start = time.perf_counter()
        similarity = streaming(method, E, iter(outputs))
        seconds["streaming"].append(time.perf_counter() - start)
        start = time.perf_counter()
        for u, v in pairs:
            PAIRWISE[method](resident[u], resident[v])
        spent = time.perf_counter() - start
        seconds["pairwise"].append(spent * len(every) / len(pairs))
    exact = [PAIRWISE[method](resident[u].double(), resident[v].double()) for u, v in pairs]
    values = torch.tensor(exact)
    if method == "frobenius":  # the layer's largest distance needs every pair
        flat = resident.flatten(1).double()
        values = 1 - values / torch.cdist(flat, flat).max()
    found = torch.stack([similarity[u, v] for u, v in pairs])
    ratios = [p / s for p, s in zip(seconds["pairwise"], seconds["streaming"], strict=True)]
    return {
        "method": method,
        "E": E,
        "T": T,
        "H": H,
        "pairs": f"{len(pairs)} of {len(every)}",
        "seconds": {side: statistics.median(values) for side, values in seconds.items()},
        "ratio": statistics.median(ratios),
        "difference": (found - values).abs().max().item(),
    }


def peak(side: str, method: str, E: int, T: int) -> float:
    """MB that a fresh process needs on top of what it had after its imports."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (side, method, E, T))


def _peak(side: str, method: str, E: int, T: int) -> float:
    streaming(method, 2, chunks(CHUNK, 2))  # libraries' own buffers
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = psutil.Process().memory_info().rss
    if side == "streaming":
        streaming(method, E, chunks(T, E))
    else:
        resident = torch.empty(E, T, H)
        for i, part in enumerate(chunks(T, E)):
            resident[:, i * CHUNK : (i + 1) * CHUNK] = part
        PAIRWISE[method](resident[0], resident[1])
    lines = Path("/proc/self/status").read_text().splitlines()
    highest = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    return (highest * 1024 - before) / 2**20


def main() -> None:
    """Measure, refuse what is wrong, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("-o", "--output", default="calibrate.json")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    shapes = list(itertools.product(PAIRWISE, EXPERTS, TOKENS))
    results = [measure(*shape, arguments.rounds) for shape in tqdm(shapes)]
    for result in results:
        if result["difference"] > TOLERANCE:
            raise SystemExit(f"values differ, no figure is given: {result}")
    memory = [
        {"method": m, "E": E, "T": T, **{s: peak(s, m, E, T) for s in ("streaming", "pairwise")}}
        for m, E, T in tqdm(shapes)
        if T == 2048 or (m == "cosine" and E in (16, 64))
    ]
    document = {"provenance": provenance.provenance(), "speed": results, "peak_mb": memory}
    provenance.save_json(arguments.output, document)
    print(as_text(results, memory))


def as_text(results: list[dict[str, object]], memory: list[dict[str, object]]) -> str:
    """For people."""
    speed = [
        [
            f"{r['method']} E={r['E']} T={r['T']}",
            f"{r['seconds']['streaming']:.3f}",
            f"{r['seconds']['pairwise']:.3f}",
            f"{r['ratio']:.1f}x",
            f"{r['difference']:.0e}",
        ]
        for r in results
    ]
    peaks = [
        [
            f"{m['method']} E={m['E']} T={m['T']}",
            f"{m['streaming']:.0f}",
            f"{m['pairwise']:.0f}",
            f"{m['streaming'] / m['pairwise']:.3f}",
        ]
        for m in memory
    ]
    head = ["H=512", "streaming s", "pairwise s", "ratio", "difference"]
    peak_head = ["peak memory, MB", "streaming", "pairwise", "share"]
    return provenance.text_table(head, speed) + "\n\n" + provenance.text_table(peak_head, peaks)


if __name__ == "__main__":
    main()
