"""Which form of the CUDA kernel is fastest, for every shape and batch, in under 4 minutes.

    python benchmarks/bench_variants.py -o variants.json --adopt    # on a GPU
    python benchmarks/bench_variants.py --compile        # anywhere, before: fills the cache
    python benchmarks/bench_variants.py --device host    # dry run: the source on this CPU

48 layers in one captured graph, every form of `sere.kernels.cuda_variants` in turn, beside an empty
kernel and the figures of the paper's published kernel (measured on an H100 on 2026-11-27). Warm:
layers back to back. Cold: before each layer, other data goes through the caches, as an engine's
weights do; its own time is taken off. Off: routing switched off. Idle: no row is FAST.

A form that is not the specification bit for bit is reported as wrong, never chosen, and fails the
run. What is fastest with cold caches becomes `choices`; `--adopt` puts it where the operator looks.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # the host build is the tests'
from bench_reroute import LAYERS, Layer, layers, restore

from sere.kernels import Batch, Plan, new_counters, reference
from sere.kernels.cuda_choice import FILE, Choice, as_json, fastest
from sere.kernels.cuda_variants import MEASURED, VARIANTS, Variant
from sere.results import provenance

SHAPES = ((60, 4), (64, 6), (128, 4), (128, 8), (256, 8), (512, 10))
BATCHES = (1, 8, 32, 64, 128, 256, 512)
ONCE = (1, 64)  # where "off" and "idle" are timed
PUBLISHED = Path(__file__).parent / "results" / "reroute_h100.json"
FLUSH_BYTES = 64 * 2**20  # more than an H100's L2

Other = tuple[Callable[[], object], float]
"""What sends other data through the caches, and its microseconds a layer."""


@dataclass
class Device:
    """Where forms run: how one is called, and how a list of calls is timed."""

    name: str
    capability: tuple[int, int]
    run: Callable[[Variant, Layer, Tensor | None], Tensor]
    time: Callable[[Sequence[Callable[[], object]], Callable[[], None], int], float]
    torch_device: str


def main() -> int:
    """Measure; 1 if a form was wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("-o", "--output", default="variants.json")
    parser.add_argument("--device", choices=("cuda", "host"), default="cuda")
    parser.add_argument("--replays", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=200, help="begin no case after these")
    parser.add_argument("--compile", action="store_true", help="only fill the cache of kernels")
    parser.add_argument("--adopt", action="store_true", help=f"write the choices to {FILE.name}")
    arguments = parser.parse_args()
    if arguments.compile:
        return precompile(["sm_80", "sm_90", "sm_100"])
    if arguments.device == "host":
        device, shapes, batches = on_host(), ((32, 4),), (1, 9)
    else:
        device, shapes, batches = on_gpu(), SHAPES, BATCHES
        precompile([f"sm_{device.capability[0]}{device.capability[1]}"])
    result: dict[str, Any] = {
        "provenance": provenance.provenance(),
        "gpu": device.name,
        "capability": device.capability,
        "layers": LAYERS,
    }
    began, cases = time.monotonic(), []
    for E, K, T in ((E, K, T) for T in batches for E, K in shapes):
        if time.monotonic() - began > arguments.seconds:
            print(f"out of time before ({E}, {K}) T={T}")
            break
        cases.append(measured(device, T, E, K, arguments.replays))
        result |= {"cases": cases, "choices": as_json(chosen(cases))}
        provenance.save_json(arguments.output, result)
    print(as_text(cases))
    wrong = [
        (c["E"], c["K"], c["T"], f["name"]) for c in cases for f in c["forms"] if not f["right"]
    ]
    print(f"wrong: {wrong}" if wrong else "every form equals the specification")
    if arguments.adopt and not wrong:
        adopt(result, FILE)
    return int(bool(wrong))


def measured(device: Device, T: int, E: int, K: int, replays: int) -> dict[str, Any]:
    """One shape and batch: microseconds a layer of every form that serves it."""
    case = layers(T, E, K, device.torch_device)
    forms = [v for v in VARIANTS if v.fits(T, E, K, device.capability) and serves(v, T, K)]
    flush = _flush(device)
    alone = device.time([flush] * len(case), lambda: None, replays)
    figures = []
    for variant in forms:
        own = _with_lists(case, short=variant.short)
        figure: dict[str, Any] = {"name": variant.name, "variant": vars(variant)}
        figure["right"] = is_right(device, variant, own)
        if figure["right"]:
            figure["us"] = dict(timed(device, variant, own, (flush, alone), replays))
        figures.append(figure)
    floor = device.time([_empty(device)] * len(case), lambda: None, replays)
    return {"E": E, "K": K, "T": T, "floor": floor, "forms": figures}


def serves(variant: Variant, T: int, K: int) -> bool:
    """Whether a launch of this form is meant for so many rows: no block without any."""
    return variant.blocks <= T and (variant.lanes or T * K <= 8192)


def timed(
    device: Device, variant: Variant, case: list[Layer], other: Other, replays: int
) -> Iterator[tuple[str, float]]:
    """Microseconds a layer, by what is going on."""
    T = len(case[0].ids)

    def calls(of: list[Layer]) -> list[Callable[[], object]]:
        return [lambda layer=layer: device.run(variant, layer, counters) for layer in of]

    counters = new_counters(device.torch_device)  # as in an engine

    def fresh() -> None:
        restore(case)
        torch._foreach_copy_([x.out for x in case], [x.ids for x in case])

    flush, alone = other
    both = [call for one in calls(case) for call in (flush, one)]
    yield "warm", device.time(calls(case), fresh, replays)
    yield "cold", device.time(both, fresh, replays) - alone
    if T in ONCE:
        off = [replace(x, plan=Plan.off(len(x.similarity), x.ids.device)) for x in case]
        off = _with_lists(off, short=variant.short)
        yield "off", device.time(calls(off), fresh, replays)
        void = [replace(x, rows=torch.zeros_like(x.rows)) for x in case]
        yield "idle", device.time(calls(void), fresh, replays)


def _with_lists(case: list[Layer], *, short: bool) -> list[Layer]:
    if not short:
        return case
    return [
        replace(x, plan=replace(x.plan, neighbours=x.plan.neighbours.to(torch.int16))) for x in case
    ]


def is_right(device: Device, variant: Variant, case: list[Layer]) -> bool:
    """Whether ids, weights and counters are the specification's, in plain batches and odd ones."""
    for layer in (case[0], *odd(case)):
        expected, counted = new_counters(device.torch_device), new_counters(device.torch_device)
        wanted = Batch(layer.ids, layer.fresh.clone(), layer.rows)
        ids = reference.run(wanted, layer.plan, expected)
        layer.out.copy_(layer.ids)
        layer.weights.copy_(layer.fresh)
        found = device.run(variant, layer, counted)
        same = torch.equal(found, ids) and torch.equal(layer.weights, wanted.weights)
        if not (same and torch.equal(counted, expected)):
            return False
    return True


def odd(case: list[Layer]) -> Iterator[Layer]:
    """Every row class, padding, weights of 0, a tolerance and scales; and more slots than active
    experts."""
    for number, layer in enumerate(case[1:4]):
        g = torch.Generator().manual_seed(number)
        T, K = layer.ids.shape
        plan = Plan(*(t.clone() for t in vars(layer.plan).values()))
        plan.errors.random_(0, 3000)
        plan.scales.uniform_()
        settings = [1, 1, 2**31 - 1, 2_000_000 if number == 1 else -1, 1, 0, 0]
        plan.settings.copy_(torch.tensor(settings, dtype=torch.int32))
        rows = torch.randint(0, 5, (T,), generator=g).to(torch.int8)
        if number == 2:  # one row has a say
            rows = torch.zeros(T, dtype=torch.int8).index_fill_(0, torch.tensor([0]), 1)
        gone = torch.rand(T, K, generator=g) < 0.1
        ids = layer.ids.cpu().masked_fill(gone, -1).to(layer.ids.device)
        fresh = layer.fresh.cpu().masked_fill(torch.rand(T, K, generator=g) < 0.1, 0)
        yield replace(
            layer,
            ids=ids,
            fresh=fresh.to(ids.device),
            weights=layer.fresh.clone(),
            rows=rows.to(ids.device),
            out=layer.out.clone(),
            plan=plan,
        )


# --- where ----------------------------------------------------------------------------------------


def on_gpu() -> Device:
    """The first GPU."""
    from sere.kernels.cuda_kernel import launch

    def run(variant: Variant, layer: Layer, counters: Tensor | None) -> Tensor:
        ids = layer.out if variant.in_place else layer.ids  # `out` was filled with the ids
        batch = Batch(ids, layer.weights, layer.rows)
        return launch(variant, batch, layer.plan, counters, out=layer.out)

    def time_(
        calls: Sequence[Callable[[], object]], fresh: Callable[[], None], replays: int
    ) -> float:
        for call in calls[:2]:
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        times = []
        for _ in range(replays + 2):
            fresh()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / LAYERS * 1e3)
        return statistics.median(times[2:])

    name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    return Device(name, capability, run, time_, "cuda")


def on_host() -> Device:
    """The same source compiled for this CPU; times are of no use."""
    from tests.kernels import cuda_warps_on_host

    def run(variant: Variant, layer: Layer, counters: Tensor | None) -> Tensor:
        ids = layer.out if variant.in_place else layer.ids
        batch = Batch(ids, layer.weights, layer.rows)
        return cuda_warps_on_host.run(_small(variant), batch, layer.plan, counters)

    def time_(
        calls: Sequence[Callable[[], object]], fresh: Callable[[], None], replays: int
    ) -> float:
        fresh()
        began = time.perf_counter()
        for call in calls[:2]:
            call()
        return (time.perf_counter() - began) * 1e6

    return Device("host", (9, 0), run, time_, "cpu")


def _small(variant: Variant) -> Variant:
    """Threads are slow here."""
    return replace(variant, threads=64, blocks=min(variant.blocks, 2))


def _empty(device: Device) -> Callable[[], object]:
    if device.torch_device == "cpu":
        return lambda: None
    import triton

    @triton.jit
    def empty() -> None:
        pass

    return lambda: empty[(1,)](num_warps=1)


def _flush(device: Device) -> Callable[[], object]:
    """Sends other data through the caches."""
    count = FLUSH_BYTES // 4 if device.torch_device == "cuda" else 4
    data = torch.zeros(count, device=device.torch_device)
    return lambda: data.add_(1)


def precompile(architectures: Sequence[str]) -> int:
    """Compile every form for every shape, in as many processes as there are cores."""
    wanted = {
        (architecture, tuple(sorted(v.macros(E, K).items())))
        for architecture in architectures
        for E, K in SHAPES
        for v in VARIANTS
        if v.fits(1, E, K, (int(architecture[3:-1]), int(architecture[-1])))
    }
    with ProcessPoolExecutor() as pool:
        list(pool.map(_compile, sorted(wanted)))
    print(f"{len(wanted)} kernels are compiled")
    return 0


def _compile(wanted: tuple[str, tuple[tuple[str, str], ...]]) -> None:
    from sere.kernels.cuda_kernel import compiled

    compiled(wanted[0], torch.int32, torch.float32, dict(wanted[1]))


# --- what follows ---------------------------------------------------------------------------------


def chosen(cases: Sequence[dict[str, Any]]) -> list[Choice]:
    """The form to take by shape and batch, from times with cold caches."""
    found = []
    for E, K in sorted({(c["E"], c["K"]) for c in cases}):
        times = {
            c["T"]: {Variant(**f["variant"]): f["us"]["cold"] for f in c["forms"] if f["right"]}
            for c in cases
            if (c["E"], c["K"]) == (E, K)
        }
        found += [Choice(E, K, T, variant) for T, variant in fastest(times).items()]
    return found


def adopt(result: dict[str, Any], file: Path) -> None:
    """Put the choices of this GPU beside those of others."""
    known = json.loads(file.read_text()) if file.exists() else {"gpus": {}}
    wanted = ("provenance", "capability", "choices")
    known["gpus"][result["gpu"]] = {name: result[name] for name in wanted}
    file.write_text(json.dumps(known, indent=1) + "\n")
    print(f"written: {file}")


def as_text(cases: Sequence[dict[str, Any]]) -> str:
    """The three fastest forms of each case, beside the floor, today's and the published kernel."""
    published = {
        (row["E"], row["K"], row["T"]): row["published"]
        for row in json.loads(PUBLISHED.read_text())["rows"]
    }
    lines = []
    for case in cases:
        right = [f for f in case["forms"] if f["right"]]
        now = next((f for f in right if f["name"] == MEASURED.name), None)
        best = sorted(right, key=lambda f: f["us"]["cold"])[:3]
        known = published.get((case["E"], case["K"], case["T"]))
        lines.append(
            [
                f"({case['E']}, {case['K']}) T={case['T']}",
                f"{case['floor']:.1f}",
                f"{known:.1f}" if known else "-",
                _times(now) if now else "-",
                "; ".join(f"{f['name']}: {_times(f)}" for f in best),
            ]
        )
    head = ["us a layer", "floor", "published", MEASURED.name, "fastest: cold, warm (off, idle)"]
    return provenance.text_table(head, lines)


def _times(figure: dict[str, Any]) -> str:
    us = figure["us"]
    more = f" ({us['off']:.1f}, {us['idle']:.1f})" if "off" in us else ""
    return f"{us['cold']:.1f}, {us['warm']:.1f}{more}"


if __name__ == "__main__":
    raise SystemExit(main())
