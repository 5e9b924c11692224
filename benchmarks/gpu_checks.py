"""All checks that need a GPU, in one command; correctness only, the result as JSON.

    python benchmarks/gpu_checks.py -o benchmarks/results/gpu_checks.json [--only NAME ...]

Each check has a limit of its own and says how long it took; what ended is in the result at once.
Engine checks need a CUDA build of a supported vLLM and are listed as
not run without it. Speed is another command, for when these pass:

    python benchmarks/bench_reroute.py -o benchmarks/results/reroute.json
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import fused_topk
import one_by_one
import torch

from sere import demo_model
from sere.kernels import (
    Batch,
    Plan,
    RowClass,
    implementation_for,
    implementations,
    new_counters,
    reference,
)
from sere.kernels.plan import Substitution
from sere.policy import Policy
from sere.results import provenance

GPU_IMPLEMENTATIONS = ("triton", "cuda")
DEVICE = "cuda"
Case = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, Policy]


def implementations_compile() -> str:
    """Every implementation that a GPU can have is there."""
    reasons = {name: implementations._obstacle(name, DEVICE) for name in GPU_IMPLEMENTATIONS}
    assert not any(reasons.values()), reasons
    return f"{', '.join(reasons)}; default: {implementation_for(torch.device(DEVICE))}"


def operator_equals_specification(batches: Iterable[Case] = ()) -> str:
    """Every regime on the GPU against the specification on the CPU, bit for bit, counters too."""
    cases = 0
    for ids, weights, similarity, rows, policy in batches or _batches():
        plan = _plan(similarity, policy, ids.shape[1])
        for dtype in (torch.int32, torch.int64):
            expected, scaled, counted = _specified(ids.to(dtype), weights, rows, plan)
            for name, run in _usable():
                counters = new_counters(DEVICE)
                batch, there = _batch(ids.to(dtype), weights, rows), plan.to(DEVICE)
                torch.full_like(batch.ids, -7)  # poison what the result will be allocated from
                got = run(batch, there, counters)
                where = (name, tuple(ids.shape), tuple(similarity.shape), policy)
                assert torch.equal(got.cpu(), expected), where
                assert torch.equal(batch.weights.cpu(), scaled), where
                assert torch.equal(counters.cpu(), counted), where
                cases += 1
    return f"{cases} batches equal"


def no_row_names_an_expert_twice() -> str:
    """Fewer experts than slots, weights of 0, duplicates to begin with, padding, every type: equal
    to the specification, and distinct where the input was."""
    g, cases = torch.Generator().manual_seed(2), 0
    weight_types = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    id_types = (torch.int32, torch.int64, torch.int16)
    for seed in range(240):
        E, K, T = ((8, 8), (32, 4), (128, 8), (60, 6))[seed % 4] + (
            (1, 7, 64, 1500)[seed // 4 % 4],
        )
        ids = torch.rand(T, E, generator=g).argsort(1)[:, :K]
        ids = ids.masked_fill(torch.rand(T, K, generator=g) < 0.05, -1)
        twice = seed % 5 == 4
        if twice:
            ids = torch.randint(-1, E + 1, (T, K), generator=g)
        weights = (torch.rand(T, K, generator=g) * 4).ceil() / 4 + 0.01 * (seed % 2)
        weights = weights.masked_fill(torch.rand(T, K, generator=g) < 0.1, 0)
        ids, weights = ids.to(id_types[seed % 3]), weights.to(weight_types[seed // 16 % 4])
        few = seed // 4 % 3 != 0  # nobody votes but the first row: experts run out
        rows = torch.randint(0, 6, (T,), generator=g).masked_fill(
            torch.arange(T) > 0, 0 if few else 1
        )
        policy = Policy(S=1, min_active=1, weights=("keep", "scale")[seed // 2 % 2])
        plan = _plan(torch.rand(E, E, generator=g), policy, K)
        rows = rows.to(torch.int8)
        expected, carried, counted = _specified(ids, weights, rows, plan)
        for name, run in _usable():
            counters, batch = new_counters(DEVICE), _batch(ids, weights, rows)
            got = run(batch, plan.to(DEVICE), counters).cpu()
            assert torch.equal(got, expected), (name, seed)
            assert torch.equal(batch.weights.cpu(), carried), (name, seed)
            assert torch.equal(counters.cpu(), counted), (name, seed)
            inside = got.long().masked_fill((got < 0) | (got >= E), E)
            named = torch.zeros(T, E + 1, dtype=torch.int64)
            named.scatter_add_(1, inside, torch.ones_like(inside))
            assert twice or (named[:, :E] <= 1).all(), (name, seed)
            cases += 1
    return f"{cases} batches equal"


def triton_compiles_once() -> str:
    """No batch size or address asks for another compilation after the first call."""
    import triton

    run, compiled = implementations.load("triton"), []
    hooks, name = triton.knobs.runtime, "jit_post_compile_hook"
    before = getattr(hooks, name)
    plan = _plan(torch.rand(96, 96), Policy(S=1), 6).to(DEVICE)
    try:
        for T in (8, 1, 2, 16, 17, 31, 128, 500, 512, 4096):
            ids = torch.rand(T, 96, device=DEVICE).argsort(1)[:, :6].to(torch.int32)
            rows = torch.ones(T + 1, dtype=torch.int8, device=DEVICE)[1:]
            run(Batch(ids, torch.rand(T, 6, device=DEVICE), rows), plan, None)
            setattr(hooks, name, lambda *args, **more: compiled.append(more))
    finally:
        setattr(hooks, name, before)
    assert not compiled, compiled[0]
    return "10 sizes"


def ranks_that_vote_together_agree(batches: Iterable[Case] = ()) -> str:
    """Halves of batches with the votes of both, against the specification; votes stay."""
    cases = 0
    for ids, weights, similarity, rows, policy in batches or _batches((3, 32, 257, 4096)):
        plan = _plan(similarity, policy, ids.shape[1])
        half, there = len(ids) // 2, plan.to(DEVICE)
        halves = [t.split([half, len(ids) - half]) for t in (ids, weights, rows)]
        parts = list(zip(*halves, strict=True))
        whole = reference.vote(Batch(ids, weights, rows), plan)
        for name, run in _usable():
            vote = implementations.load_vote(name)
            said = [vote(_batch(*part), there) for part in parts]
            votes = torch.stack(said).amin(0)
            where = (name, tuple(ids.shape), tuple(similarity.shape), policy)
            for part in parts:
                expected, carried, counted = _specified(*part, plan, whole)
                batch, counters = _batch(*part), new_counters(DEVICE)
                got = run(batch, there, counters, votes)
                assert torch.equal(votes.cpu(), whole), where
                assert torch.equal(got.cpu(), expected), where
                assert torch.equal(batch.weights.cpu(), carried), where
                assert torch.equal(counters.cpu(), counted), where
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
        expected, scaled, _ = _specified(ids, weights, rows, plan)
        for name, run in _usable():
            batch = _batch(ids, weights, rows)
            got = run(batch, plan.to(DEVICE), None)
            assert torch.equal(got.cpu(), expected), (name, seed)
            assert torch.equal(batch.weights.cpu(), scaled), (name, seed)
    return "equal"


def graph_replay_sees_new_rows_and_policy() -> str:
    """One captured graph; inputs, row classes, plan and counters change between replays."""
    replays = 0
    for name, run in _usable():
        for T in (32, 2048):
            batches = [b for b in _batches((T,)) if b[0].shape[1] == 8 and b[2].shape[0] == 128]
            ids, weights, similarity, rows, policy = (
                _there(x) if isinstance(x, torch.Tensor) else x for x in batches[0]
            )
            plan, counters = _plan(similarity, policy, 8), new_counters(DEVICE)
            batch = Batch(ids, weights, rows)
            run(batch, plan, counters)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = run(batch, plan, counters)
            for other_ids, other_weights, other_similarity, other_rows, other_policy in batches:
                ids.copy_(other_ids)
                weights.copy_(other_weights)
                rows.copy_(other_rows)
                new = _plan(other_similarity, other_policy, 8)
                plan.copy_(new)
                counters.zero_()
                out.fill_(-7)
                graph.replay()
                expected, scaled, counted = _specified(other_ids, other_weights, other_rows, new)
                assert torch.equal(out.cpu(), expected), (name, T, other_policy)
                assert torch.equal(weights.cpu(), scaled), (name, T, other_policy)
                assert torch.equal(counters.cpu(), counted), (name, T, other_policy)
                replays += 1
    return f"{replays} replays equal"


def fused_top_k_equals_specification() -> str:
    """Softmax, top-k and operator in one launch: the experts exactly, weights nearly as PyTorch's
    softmax; and bit for bit what the specification makes of the kernel's own top-k."""
    cases, arrived = 0, torch.zeros(1, dtype=torch.int32, device=DEVICE)
    batches = _batches((0, 1, 7, 33, 64), ((60, 4), (128, 8)))  # each shape and type is compiled
    for seed, (ids, _, similarity, rows, policy) in enumerate(batches):
        E, K, T = len(similarity), ids.shape[1], len(ids)
        logits = _logits(seed, T, E)
        plan, own = _plan(similarity, policy, K), (seed % 2 == 0)
        where = (T, E, K, policy, logits.dtype)
        expected, chosen = fused_topk.chosen(logits, K, renormalize=own, rows=rows)
        inputs = _there(logits), K, plan.to(DEVICE), _there(rows)
        weights, first = fused_topk.choose(inputs[0], K, inputs[3], renormalize=own)
        assert torch.equal(first.cpu(), chosen), where
        torch.testing.assert_close(weights.cpu(), expected, rtol=1e-5, atol=1e-30)
        counters = new_counters(DEVICE)
        scaled, got = fused_topk.run(*inputs, counters, renormalize=own, arrived=arrived)
        ids, weights, counted = _specified(chosen, weights.cpu(), rows, plan)
        assert torch.equal(got.cpu(), ids), where
        assert torch.equal(scaled.cpu(), weights), where
        assert torch.equal(counters.cpu(), counted), where
        assert arrived == 0, where
        cases += 1
    return f"{cases} batches equal"


def fused_top_k_in_a_graph() -> str:
    """Replayed with other logits; programs that arrive in any order leave the ticket ready."""
    plan = _plan(torch.rand(128, 128, generator=torch.Generator().manual_seed(0)), Policy(S=1), 8)
    on_gpu, arrived = plan.to(DEVICE), torch.zeros(1, dtype=torch.int32, device=DEVICE)
    logits = _there(_logits(0, 64, 128))

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
            weights, ids, _ = top_k(_there(logits), _there(logits), K, renormalize)
            assert torch.equal(ids.cpu(), chosen), (E, K, logits.dtype)
            torch.testing.assert_close(weights.cpu(), expected, rtol=1e-5, atol=1e-30)
    return "the same experts in the same order"


def memcheck_finds_nothing() -> str:
    """compute-sanitizer's memcheck over all forms of the kernels."""
    return _sanitizer("memcheck")


def racecheck_finds_nothing() -> str:
    """compute-sanitizer's racecheck (shared memory) over all forms of the kernels."""
    return _sanitizer("racecheck")


def _sanitizer(check: str) -> str:
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        raise ImportError("compute-sanitizer is not on the PATH")
    command = [tool, "--tool", check, "--error-exitcode", "9", sys.executable, __file__]
    done = subprocess.run([*command, "--sanitized"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-1500:]
    return "clean"


def sanitized() -> None:
    """What runs under the sanitizer: small, all forms."""
    for T in (9, 1100):  # one block, and many
        for number, (ids, weights, similarity, rows, policy) in enumerate(
            _batches((T,), ((32, 8),))
        ):
            if number not in (0, 4):
                continue
            plan = _plan(similarity, policy, 8).to(DEVICE)
            for _, run in _usable():
                run(_batch(ids, weights, rows), plan, new_counters(DEVICE))
    arrived = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    logits = _there(_logits(0, 9, 32))
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


# How many seconds each may take, what it compiles included.
CHECKS: dict[Callable[[], str], float] = {
    implementations_compile: 60,
    operator_equals_specification: 120,
    no_row_names_an_expert_twice: 120,
    ranks_that_vote_together_agree: 60,
    graph_replay_sees_new_rows_and_policy: 60,
    triton_compiles_once: 60,
    engine_with_graphs: 240,
    vllms_top_k_chooses_the_same: 60,
    memcheck_finds_nothing: 120,
    ten_thousand_random_batches: 120,
    fused_top_k_equals_specification: 150,
    fused_top_k_in_a_graph: 90,
    racecheck_finds_nothing: 180,
}


def _usable() -> Iterator[tuple[str, implementations.Implementation]]:
    for name in GPU_IMPLEMENTATIONS:
        if implementations._obstacle(name, DEVICE) is None:
            yield name, implementations.load(name)


def _there(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of its own on the device."""
    return tensor.to(DEVICE, copy=True)


def _batch(ids: torch.Tensor, weights: torch.Tensor, rows: torch.Tensor) -> Batch:
    """Copies on the device."""
    return Batch(_there(ids), _there(weights), _there(rows))


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
    ids: torch.Tensor,
    weights: torch.Tensor,
    rows: torch.Tensor,
    plan: Plan,
    votes: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """New ids, weights and counters of the specification."""
    counters, scaled = new_counters(), weights.clone()
    ids = reference.run(Batch(ids, scaled, rows), plan, counters, votes)
    return ids, scaled, counters


def _batches(
    sizes: tuple[int, ...] = (0, 1, 3, 32, 257, 4096),
    shapes: tuple[tuple[int, int], ...] = ((8, 2), (60, 4), (64, 6), (128, 8), (896, 16)),
) -> Iterator[Case]:
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
    by_name = {check.__name__: check for check in CHECKS}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", default="gpu_checks.json")
    parser.add_argument("--only", nargs="+", choices=by_name, default=list(by_name))
    parser.add_argument("--sanitized", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--serve", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU: nothing was run", file=sys.stderr)
        return 1
    if arguments.sanitized:
        sanitized()
        return 0
    if arguments.serve:
        one_by_one.serve(by_name, arguments.serve)
        return 0
    where = {**provenance.provenance(), "gpu": torch.cuda.get_device_name()}
    results = one_by_one.run(
        [sys.executable, __file__, "--serve"],
        {name: CHECKS[by_name[name]] for name in arguments.only},
        lambda so_far: provenance.save_json(
            arguments.output, {"provenance": where, "checks": so_far}
        ),
    )
    return int(one_by_one.failed(results))


if __name__ == "__main__":
    raise SystemExit(main())
