"""How long the operator takes: every implementation beside the floor and a plain multi-launch form.

    python benchmarks/bench_reroute.py -o benchmarks/results/reroute.json

48 layers back to back (one captured CUDA graph, or plain calls on a CPU), each with inputs and a
plan of its own; all contestants take turns within a round. A case whose results are not those of
the specification is reported as wrong, without a time.

On a GPU also from the router's logits on: a top-k (vLLM's, and one in Triton) followed by the
operator, against both in one launch (`fused_topk.py`).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import fused_topk
import torch
from torch import Tensor
from tqdm import tqdm

from sere.kernels import Batch, Plan, reference
from sere.kernels.implementations import DEVICES, Implementation, installed, load
from sere.policy import Policy
from sere.results import provenance

LAYERS = 48
BATCHES = (1, 8, 32, 64, 128, 256, 512, 1024, 4096)
SHAPES = ((60, 4), (64, 6), (128, 4), (128, 8), (256, 8), (512, 10), (896, 16))
POLICY = Policy(S=1, rho=0.3)


@dataclass(frozen=True)
class Layer:
    """One layer's inputs; slots are sorted by weight, as the paper's code expects."""

    logits: Tensor
    ids: Tensor
    weights: Tensor  # rewritten by the operator, see `restore`
    fresh: Tensor
    similarity: Tensor
    plan: Plan
    rows: Tensor
    out: Tensor
    arrived: Tensor

    @property
    def batch(self) -> Batch:
        return Batch(self.ids, self.weights, self.rows)


def layers(T: int, E: int, K: int, device: str) -> list[Layer]:
    """48 random layers; experts are drawn unevenly, as real routers do."""
    made = []
    for seed in range(LAYERS):
        g = torch.Generator().manual_seed(seed)
        skew = torch.randn(E, generator=g)
        logits = (torch.randn(T, E, generator=g) + skew).to(torch.bfloat16)
        weights, ids = fused_topk.chosen(logits, K, renormalize=True)
        similarity = torch.rand(E, E, generator=g)
        made.append(
            Layer(
                logits.to(device),
                ids.to(device),
                weights.to(device, copy=True),
                weights.to(device),
                similarity.to(device),
                Plan.build(similarity.to(device), POLICY, K=K),
                torch.ones(T, dtype=torch.int8, device=device),
                torch.empty(T, K, dtype=torch.int32, device=device),
                torch.zeros(1, dtype=torch.int32, device=device),
            )
        )
    return made


def restore(case: list[Layer]) -> None:
    """The router's weights again, as every step of an engine has them."""
    torch._foreach_copy_([layer.weights for layer in case], [layer.fresh for layer in case])


def multi_launch(layer: Layer) -> Tensor:
    """The paper's rule in plain PyTorch, a kernel launch an operation (no rows, no small-batch
    rule: less work than the specification asks for)."""
    primary = torch.zeros(len(layer.similarity), dtype=torch.bool, device=layer.ids.device)
    # A value assigned through an index is copied from the host, which a capture refuses.
    primary.index_fill_(0, layer.ids[:, : POLICY.S].reshape(-1).long(), True)
    similarity = layer.similarity.masked_fill(~primary, -torch.inf)
    best, target = similarity.max(1)
    stays = primary | (best < POLICY.rho)
    own = torch.arange(len(primary), device=primary.device)
    return torch.where(stays, own, target)[layer.ids.long()].to(layer.ids.dtype)


def contestants(device: str, T: int) -> dict[str, Callable[[Layer], Tensor]]:
    """What is timed, by name; what starts at the logits has "top-k" in it."""
    kind = torch.device(device).type
    found: dict[str, Callable[[Layer], Tensor]] = {
        "floor": _floor(kind),
        "multi-launch": multi_launch,
    }
    for name in ("reference", *(n for n, kinds in DEVICES.items() if kind in kinds)):
        if name == "reference" or installed(name):
            run = load(name)
            found[name] = lambda x, run=run: run(x.batch, x.plan, None)
    return found if kind == "cpu" else found | from_logits(T)


def from_logits(T: int) -> dict[str, Callable[[Layer], Tensor]]:
    """Top-k and operator on a GPU: one after the other, and in one launch where that goes."""
    top_ks = {"ours": ours, "vLLM's": vllms} if _has_vllms_top_k() else {"ours": ours}
    operators = [name for name, kinds in DEVICES.items() if "cuda" in kinds and installed(name)]
    found: dict[str, Callable[[Layer], Tensor]] = {
        f"{top_k} top-k, {name}": partial(one_after_the_other, top_ks[top_k], load(name))
        for top_k, name in product(top_ks, operators)
    }
    return found | ({"fused top-k": fused} if T <= fused_topk.MAX_T else {})


def one_after_the_other(
    top_k: Callable[[Layer], tuple[Tensor, Tensor]], operator: Implementation, layer: Layer
) -> Tensor:
    """What an engine does."""
    weights, ids = top_k(layer)
    return operator(Batch(ids, weights, layer.rows), layer.plan, None)


def ours(layer: Layer) -> tuple[Tensor, Tensor]:
    """The fused kernel's own top-k, as a launch of its own."""
    return fused_topk.choose(layer.logits, layer.ids.shape[1], layer.rows, renormalize=True)


def vllms(layer: Layer) -> tuple[Tensor, Tensor]:
    """`topk_softmax` of vLLM's CUDA build."""
    from vllm.model_executor.layers.fused_moe.router.fused_topk_router import fused_topk as top_k

    weights, ids, _ = top_k(layer.logits, layer.logits, layer.ids.shape[1], renormalize=True)
    return weights, ids


def fused(layer: Layer) -> Tensor:
    """Both in one launch."""
    K = layer.ids.shape[1]
    return fused_topk.run(
        *(layer.logits, K, layer.plan, layer.rows, None), renormalize=True, arrived=layer.arrived
    )[1]


def _has_vllms_top_k() -> bool:
    try:
        import vllm._custom_ops  # noqa: F401
    except ImportError:
        return False
    return hasattr(torch.ops._moe_C, "topk_softmax")


def _floor(kind: str) -> Callable[[Layer], Tensor]:
    """The least that a launch costs: an empty kernel, or a copy of the ids on a CPU."""
    if kind == "cpu":
        return lambda layer: layer.ids.clone()
    import triton

    @triton.jit
    def empty() -> None:
        pass

    def launch(layer: Layer) -> Tensor:
        empty[(1,)](num_warps=1)
        return layer.out

    return launch


def bytes_moved(T: int, E: int, K: int) -> int:
    """Ids and weights read, ids written, and one line of 32 neighbours an expert, int32."""
    return 4 * (3 * T * K + E * min(E - 1, 32))


def is_right(name: str, run: Callable[[Layer], Tensor], case: list[Layer]) -> bool:
    """Whether every layer's result is the specification's, in memory poisoned before."""
    if name in ("floor", "multi-launch"):
        return True  # the multi-launch form leaves out min_active, and where slots are freed
    restore(case)
    for layer in case[:8]:
        torch.full_like(layer.ids, -7)  # freed at once: the next result's memory
        weights = layer.fresh.clone()
        expected = reference.run(layer.batch._replace(weights=weights), layer.plan, None)
        if not torch.equal(run(layer), expected):
            return False
        if "top-k" not in name and not torch.equal(layer.weights, weights):
            return False  # a top-k has weights of its own
    return True


def timer(run: Callable[[Layer], Tensor], case: list[Layer]) -> Callable[[], float]:
    """A function that runs all layers once and returns microseconds a layer."""

    def all_layers() -> None:
        for layer in case:
            run(layer)

    if case[0].ids.device.type == "cpu":

        def on_cpu() -> float:
            restore(case)
            began = time.perf_counter()
            all_layers()
            return (time.perf_counter() - began) / LAYERS * 1e6

        return on_cpu
    all_layers()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        all_layers()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def on_gpu() -> float:
        restore(case)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / LAYERS * 1e3

    return on_gpu


def measure(case: list[Layer], device: str, rounds: int) -> dict[str, Any]:
    """Median and quartiles of every contestant, microseconds a layer; None where it is wrong."""
    runs = contestants(device, len(case[0].ids))
    right = {name: is_right(name, run, case) for name, run in runs.items()}
    timers = {name: timer(run, case) for name, run in runs.items() if right[name]}
    times: dict[str, list[float]] = {name: [] for name in timers}
    for turn in range(rounds + 3):
        for name, once in timers.items():
            elapsed = once()
            if turn >= 3:
                times[name].append(elapsed)
    result: dict[str, Any] = dict.fromkeys(runs)
    for name, values in times.items():
        low, middle, high = statistics.quantiles(values, n=4)
        result[name] = {"median_us": middle, "quartiles_us": [low, high]}
    return result


def main() -> int:
    """Measure; 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("-o", "--output", default="reroute.json")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", type=int, nargs=2, action="append", metavar=("E", "K"))
    parser.add_argument("--batch", type=int, nargs="+", default=BATCHES)
    arguments = parser.parse_args()

    cases = [(E, K, T) for E, K in arguments.shape or SHAPES for T in arguments.batch]
    results, names = [], list(contestants(arguments.device, T=1))
    if arguments.device == "cpu":
        print("not timed without a GPU: a top-k before the operator, and both in one launch")
    elif not _has_vllms_top_k():
        print("not timed: vLLM's topk_softmax (no CUDA build of vLLM here)")
    for E, K, T in tqdm(cases, desc="cases"):
        times = measure(layers(T, E, K, arguments.device), arguments.device, arguments.rounds)
        results.append({"E": E, "K": K, "T": T, "bytes": bytes_moved(T, E, K), "times": times})

    def cell(times: dict[str, Any], name: str) -> str:
        if name not in times:
            return "-"
        return "WRONG" if times[name] is None else f"{times[name]['median_us']:.1f}"

    rows = [
        [f"({r['E']}, {r['K']}) T={r['T']}", str(r["bytes"]), *(cell(r["times"], n) for n in names)]
        for r in results
    ]
    print(provenance.text_table(["us a layer, median", "bytes", *names], rows))
    where = provenance.provenance()
    if arguments.device != "cpu":
        where["gpu"] = torch.cuda.get_device_name()
    provenance.save_json(
        arguments.output, {"provenance": where, "layers": LAYERS, "cases": results}
    )
    return int(any(None in r["times"].values() for r in results))


if __name__ == "__main__":
    raise SystemExit(main())
