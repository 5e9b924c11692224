"""All checks that need a GPU, in one command; correctness only, the result as JSON.

    python benchmarks/gpu_checks.py -o benchmarks/results/gpu_checks.json

Each check prints one line. Engine checks need a CUDA build of a supported vLLM and are listed as
not run without it. Speed is another command, for when these pass:

    python benchmarks/bench_reroute.py -o benchmarks/results/reroute.json
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fused_topk
import torch

from sere import demo_model
from sere.kernels import Plan, RowClass, implementation_for, implementations, new_counters
from sere.kernels.plan import Substitution
from sere.policy import Policy
from sere.results import provenance

GPU_IMPLEMENTATIONS = ("triton", "cuda")


def implementations_compile() -> str:
    """Every implementation that a GPU can have is there."""
    reasons = {name: implementations._obstacle(name, "cuda") for name in GPU_IMPLEMENTATIONS}
    assert not any(reasons.values()), reasons
    return f"{', '.join(reasons)}; default: {implementation_for(torch.device('cuda'))}"


def operator_equals_specification() -> str:
    """Every regime on the GPU against the specification on the CPU, bit for bit, counters too."""
    cases = 0
    for ids, weights, similarity, rows, policy in _batches():
        plan = _plan(similarity, policy, ids.shape[1])
        for dtype in (torch.int32, torch.int64):
            expected, scaled, counted = _specified(ids.to(dtype), weights, plan, rows)
            for name, run in _usable():
                counters = new_counters("cuda")
                inputs = ids.to(dtype).cuda(), weights.cuda(), plan.to("cuda"), rows.cuda()
                torch.full_like(inputs[0], -7)  # poison what the result will be allocated from
                got = run(*inputs, counters)
                where = (name, tuple(ids.shape), tuple(similarity.shape), policy)
                assert torch.equal(got.cpu(), expected), where
                assert torch.equal(inputs[1].cpu(), scaled), where
                assert torch.equal(counters.cpu(), counted), where
                cases += 1
    return f"{cases} batches equal"


def ranks_that_vote_together_route_as_one_batch() -> str:
    """Halves of batches, their votes combined, against the specification of the whole."""
    cases = 0
    for ids, weights, similarity, rows, policy in _batches((3, 32, 257, 4096)):
        plan = _plan(similarity, policy, ids.shape[1])
        expected, scaled, _ = _specified(ids, weights, plan, rows)
        half, there = len(ids) // 2, plan.to("cuda")
        halves = [t.cuda().split([half, len(ids) - half]) for t in (ids, weights, rows)]
        parts = list(zip(*halves, strict=True))
        for name, run in _usable():
            vote = implementations.load_vote(name)
            votes = torch.stack([vote(i, w, there, r) for i, w, r in parts]).amin(0)
            moved = [(i, w.clone(), r) for i, w, r in parts]
            got = [run(i, w, there, r, None, votes) for i, w, r in moved]
            where = (name, tuple(ids.shape), tuple(similarity.shape), policy)
            assert torch.equal(torch.cat(got).cpu(), expected), where
            assert torch.equal(torch.cat([w for _, w, _ in moved]).cpu(), scaled), where
            cases += 1
    return f"{cases} batches equal"


def ten_thousand_random_batches() -> str:
    """Small random batches with everything odd in them, all implementations."""
    g = torch.Generator().manual_seed(1)
    for seed in range(10_000):
        E, K, T = ((8, 2), (32, 4), (60, 4), (128, 8))[seed % 4] + (seed % 40 + 1,)
        ids = torch.rand(T, E, generator=g).argsort(1)[:, :K].to(torch.int32)
        ids = ids.masked_fill(torch.rand(T, K, generator=g) < 0.05, (-1, E)[seed % 2])
        weights = (torch.rand(T, K, generator=g) * 4).ceil() / 4
        weights = weights.masked_fill(torch.rand(T, K, generator=g) < 0.05, 0)
        rows = torch.randint(0, 3 + seed % 4, (T,), generator=g).to(torch.int8)
        threshold = {"rho": (seed % 5) / 5} if seed % 2 else {"tau": (seed % 7) ** 3 / 1000}
        policy = Policy(S=1 + seed % K, max_active=K + seed % (E - K), **threshold)
        plan = _plan(torch.rand(E, E, generator=g), policy, K)
        expected, scaled, _ = _specified(ids, weights, plan, rows)
        for name, run in _usable():
            on_gpu = weights.cuda()
            got = run(ids.cuda(), on_gpu, plan.to("cuda"), rows.cuda(), None)
            assert torch.equal(got.cpu(), expected), (name, seed)
            assert torch.equal(on_gpu.cpu(), scaled), (name, seed)
    return "equal"


def graph_replay_sees_new_rows_and_policy() -> str:
    """One captured graph; inputs, row classes, plan and counters change between replays."""
    replays = 0
    for name, run in _usable():
        for T in (32, 2048):
            batches = [b for b in _batches((T,)) if b[0].shape[1] == 8 and b[2].shape[0] == 128]
            ids, weights, similarity, rows, policy = (
                x.cuda() if isinstance(x, torch.Tensor) else x for x in batches[0]
            )
            plan, counters = _plan(similarity, policy, 8), new_counters("cuda")
            run(ids, weights, plan, rows, counters)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = run(ids, weights, plan, rows, counters)
            for other_ids, other_weights, other_similarity, other_rows, other_policy in batches:
                ids.copy_(other_ids)
                weights.copy_(other_weights)
                rows.copy_(other_rows)
                new = _plan(other_similarity, other_policy, 8)
                plan.copy_(new)
                counters.zero_()
                out.fill_(-7)
                graph.replay()
                expected, scaled, counted = _specified(other_ids, other_weights, new, other_rows)
                assert torch.equal(out.cpu(), expected), (name, T, other_policy)
                assert torch.equal(weights.cpu(), scaled), (name, T, other_policy)
                assert torch.equal(counters.cpu(), counted), (name, T, other_policy)
                replays += 1
    return f"{replays} replays equal"


def fused_top_k_equals_specification() -> str:
    """Softmax, top-k and operator in one launch: the experts exactly, weights nearly as PyTorch's
    softmax; and bit for bit what the specification makes of the kernel's own top-k."""
    cases, arrived = 0, torch.zeros(1, dtype=torch.int32, device="cuda")
    for seed, (ids, _, similarity, rows, policy) in enumerate(_batches((0, 1, 7, 33, 64))):
        E, K, T = len(similarity), ids.shape[1], len(ids)
        logits = _logits(seed, T, E)
        plan, own = _plan(similarity, policy, K), (seed % 2 == 0)
        where = (T, E, K, policy, logits.dtype)
        expected, chosen = fused_topk.chosen(logits, K, renormalize=own, rows=rows)
        inputs = logits.cuda(), K, plan.to("cuda"), rows.cuda()
        weights, first = fused_topk.choose(inputs[0], K, inputs[3], renormalize=own)
        assert torch.equal(first.cpu(), chosen), where
        torch.testing.assert_close(weights.cpu(), expected, rtol=1e-5, atol=1e-30)
        counters = new_counters("cuda")
        scaled, got = fused_topk.run(*inputs, counters, renormalize=own, arrived=arrived)
        ids, weights, counted = _specified(chosen, weights.cpu(), plan, rows)
        assert torch.equal(got.cpu(), ids), where
        assert torch.equal(scaled.cpu(), weights), where
        assert torch.equal(counters.cpu(), counted), where
        assert arrived == 0, where
        cases += 1
    return f"{cases} batches equal"


def fused_top_k_in_a_graph() -> str:
    """Replayed with other logits; programs that arrive in any order leave the ticket ready."""
    plan = _plan(torch.rand(128, 128, generator=torch.Generator().manual_seed(0)), Policy(S=1), 8)
    on_gpu, arrived = plan.to("cuda"), torch.zeros(1, dtype=torch.int32, device="cuda")
    logits = _logits(0, 64, 128).cuda()

    def launch() -> torch.Tensor:
        return fused_topk.run(logits, 8, on_gpu, None, None, renormalize=True, arrived=arrived)[1]

    launch()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = [launch() for _ in range(8)]
    for seed in range(0, 600, 3):  # one type of logits
        new = _logits(seed, 64, 128)
        logits.copy_(new)
        for ids in out:
            ids.fill_(-7)
        graph.replay()
        _, expected = fused_topk.specification(new, 8, plan, None, None, renormalize=True)
        assert all(torch.equal(ids.cpu(), expected) for ids in out), seed
    return "200 replays of 8 launches equal"


def vllms_top_k_chooses_the_same() -> str:
    """vLLM's `topk_softmax` against the specification of the fused form."""
    from vllm.model_executor.layers.fused_moe.router.fused_topk_router import fused_topk as top_k

    if not hasattr(torch.ops._moe_C, "topk_softmax"):
        raise ImportError("this vLLM has no CUDA kernels")
    for seed, (E, K) in enumerate(((60, 4), (64, 6), (128, 8), (256, 8), (512, 10))):
        for renormalize in (True, False):
            logits = _logits(seed, 64, E, spoilt=False)
            expected, chosen = fused_topk.chosen(logits, K, renormalize=renormalize)
            weights, ids, _ = top_k(logits.cuda(), logits.cuda(), K, renormalize)
            assert torch.equal(ids.cpu(), chosen), (E, K, logits.dtype)
            torch.testing.assert_close(weights.cpu(), expected, rtol=1e-5, atol=1e-30)
    return "the same experts in the same order"


def sanitizer_finds_nothing() -> str:
    """compute-sanitizer's memcheck and racecheck over both forms of the kernels."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        raise ImportError("compute-sanitizer is not on the PATH")
    for check in ("memcheck", "racecheck"):
        command = [tool, "--tool", check, "--error-exitcode", "9", sys.executable, __file__]
        done = subprocess.run([*command, "--sanitized"], capture_output=True, text=True)
        assert done.returncode == 0, f"{check}: {done.stdout[-1500:]}"
    return "memcheck and racecheck are clean"


def sanitized() -> None:
    """What runs under the sanitizer: small, both forms."""
    for T in (33, 2048):
        for ids, weights, similarity, rows, policy in _batches((T,), ((128, 8),)):
            plan = _plan(similarity, policy, 8).to("cuda")
            for _, run in _usable():
                run(ids.cuda(), weights.cuda(), plan, rows.cuda(), new_counters("cuda"))
    arrived = torch.zeros(1, dtype=torch.int32, device="cuda")
    logits = _logits(0, 33, 128).cuda()
    fused_topk.run(logits, 8, plan, None, None, renormalize=True, arrived=arrived)
    torch.cuda.synchronize()


def engine_with_graphs() -> str:
    """The demo model in vLLM with CUDA graphs: off equals S=K, S=1 touches fewer experts."""
    from sere.calibration.calibrate import calibrate
    from sere.demo_model.tasks import examples
    from sere.serving.engine import Engine

    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "demo.safetensors"
        calibrate(demo_model.NAME, table, samples=64, progress=False)
        engine = Engine(demo_model.PATH, table, batch=32, dtype="bfloat16", max_model_len=128)
        prompts = [example.prompt for example in examples(32, seed=3, split="held_out")]
        stock = engine.generate(prompts, 16)
        engine.set_policy(Policy(S=4))
        assert engine.generate(prompts, 16).token_ids == stock.token_ids
        engine.set_policy(Policy(S=1))
        engine.reset_stats()
        engine.generate(prompts, 16)
        for layer in engine.stats().values():
            assert layer["active_after"] < layer["active_before"]
            assert layer["rows_exact"] == sum(map(len, prompts)), layer
    return "32 prompts"


CHECKS: list[Callable[[], str]] = [
    implementations_compile,
    operator_equals_specification,
    ranks_that_vote_together_route_as_one_batch,
    ten_thousand_random_batches,
    graph_replay_sees_new_rows_and_policy,
    fused_top_k_equals_specification,
    fused_top_k_in_a_graph,
    vllms_top_k_chooses_the_same,
    sanitizer_finds_nothing,
    engine_with_graphs,
]

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, Policy]


def _usable() -> Iterator[tuple[str, implementations.Implementation]]:
    for name in GPU_IMPLEMENTATIONS:
        if implementations._obstacle(name, "cuda") is None:
            yield name, implementations.load(name)


def _logits(seed: int, T: int, E: int, *, spoilt: bool = True) -> torch.Tensor:
    """[T, E] in one of three types, with ties; spoilt: with -inf, and a row without a softmax."""
    g = torch.Generator().manual_seed(seed)
    logits = (torch.randn(T, E, generator=g) * 12).round() / 4
    if spoilt:
        logits = logits.masked_fill(torch.rand(T, E, generator=g) < 0.05, -torch.inf)
        logits[T // 2 : T // 2 + 1, 0] = (torch.nan, torch.inf)[seed % 2]
    return logits.to((torch.float32, torch.bfloat16, torch.float16)[seed % 3])


def _plan(similarity: torch.Tensor, policy: Policy, K: int) -> Plan:
    """With errors and scales as varied as the similarities."""
    return Plan.build(
        similarity, policy, K=K, substitution=Substitution(similarity.T, similarity + 0.1)
    )


def _specified(
    ids: torch.Tensor, weights: torch.Tensor, plan: Plan, rows: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """New ids, scaled weights and counters of the specification."""
    counters, scaled = new_counters(), weights.clone()
    ids = implementations.load("reference")(ids, scaled, plan, rows, counters)
    return ids, scaled, counters


def _batches(
    sizes: tuple[int, ...] = (0, 1, 3, 32, 257, 4096),
    shapes: tuple[tuple[int, int], ...] = ((8, 2), (60, 4), (64, 6), (128, 8), (896, 16)),
) -> Iterator[Batch]:
    g = torch.Generator().manual_seed(0)
    classes = torch.tensor([RowClass.FAST, RowClass.FAST, RowClass.EXACT, RowClass.VOID])
    policies = (Policy(S=1), Policy(S=2, rho=0.6), Policy(S=1, tau=0.02))
    for E, K in shapes:
        capped = Policy(S=1, tau=0.001, max_active=max(K, 12))
        for T in sizes:
            for policy in (*policies, Policy(S=1, max_active=max(K, 12)), capped):
                if policy.max_active and policy.max_active > E:
                    continue
                ids = torch.rand(T, E, generator=g).argsort(1)[:, :K].to(torch.int32)
                weights = (torch.rand(T, K, generator=g) * 4).ceil() / 4  # ties
                similarity = torch.rand(E, E, generator=g)
                rows = classes[torch.randint(0, 4, (T,), generator=g)].to(torch.int8)
                yield ids, weights, similarity, rows, policy


def main() -> int:
    """Run every check; 0 if none failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", default="gpu_checks.json")
    parser.add_argument("--sanitized", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU: nothing was run", file=sys.stderr)
        return 1
    if arguments.sanitized:
        sanitized()
        return 0
    results: dict[str, Any] = {}
    for check in CHECKS:
        try:
            results[check.__name__] = f"ok: {check()}"
        except ImportError as error:
            results[check.__name__] = f"not run: {error}"
        except Exception as error:  # one failing check must not hide the others
            results[check.__name__] = f"FAILED: {type(error).__name__}: {error}"
        print(f"{check.__name__}: {results[check.__name__]}", flush=True)
    where = {**provenance.provenance(), "gpu": torch.cuda.get_device_name()}
    provenance.save_json(arguments.output, {"provenance": where, "checks": results})
    return int(any(result.startswith("FAILED") for result in results.values()))


if __name__ == "__main__":
    raise SystemExit(main())
