"""All checks that need a GPU, in one command; correctness only, the result as JSON.

    python benchmarks/gpu_checks.py -o benchmarks/results/gpu_checks.json

Each check prints one line. Engine checks need a CUDA build of a supported vLLM and are listed as
not run without it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from sere import demo_model, report
from sere.kernels import Plan, RowClass, new_counters, reroute
from sere.policy import Policy


def operator_equals_specification() -> str:
    """Every regime on the GPU against the CPU, bit for bit."""
    cases = 0
    for ids, weights, similarity, rows, policy in _batches():
        K = ids.shape[1]
        expected = reroute(ids, weights, Plan.build(similarity, policy, K=K), rows)
        plan = Plan.build(similarity.cuda(), policy, K=K)
        got = reroute(ids.cuda(), weights.cuda(), plan, rows.cuda())
        assert torch.equal(got.cpu(), expected), (ids.shape, similarity.shape, policy)
        cases += 1
    return f"{cases} batches equal"


def graph_replay_sees_new_rows_and_policy() -> str:
    """One captured graph; row classes, inputs and plan change between replays."""
    batches = [b for b in _batches() if b[0].shape == (32, 8) and b[2].shape[0] == 128]
    ids, weights, similarity, rows, policy = (
        x.cuda() if isinstance(x, torch.Tensor) else x for x in batches[0]
    )
    plan, counters = Plan.build(similarity, policy, K=8), new_counters("cuda")
    reroute(ids, weights, plan, rows, counters)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = reroute(ids, weights, plan, rows, counters)
    for other_ids, other_weights, other_similarity, other_rows, other_policy in batches:
        ids.copy_(other_ids)
        weights.copy_(other_weights)
        rows.copy_(other_rows)
        new = Plan.build(other_similarity, other_policy, K=8)
        plan.copy_(new)
        graph.replay()
        expected = reroute(other_ids, other_weights, new, other_rows)
        assert torch.equal(out.cpu(), expected), other_policy
    return f"{len(batches)} replays equal"


def engine_with_graphs() -> str:
    """The demo model in vLLM with CUDA graphs: off equals S=K, S=1 touches fewer experts."""
    from sere.calibrate import calibrate
    from sere.serving.engine import Engine
    from sere.tasks import examples

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
    operator_equals_specification,
    graph_replay_sees_new_rows_and_policy,
    engine_with_graphs,
]


def _batches() -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, Policy]]:
    g = torch.Generator().manual_seed(0)
    classes = torch.tensor([RowClass.FAST, RowClass.FAST, RowClass.EXACT, RowClass.VOID])
    for E, K in [(8, 2), (60, 4), (64, 6), (128, 8), (896, 16)]:
        for T in (0, 1, 3, 32, 257):
            for policy in (Policy(S=1), Policy(S=2, rho=0.6), Policy(S=1, max_active=max(K, 12))):
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
    output = parser.parse_args().output
    if not torch.cuda.is_available():
        print("no GPU: nothing was run", file=sys.stderr)
        return 1
    results: dict[str, Any] = {}
    for check in CHECKS:
        try:
            results[check.__name__] = f"ok: {check()}"
        except ImportError as error:
            results[check.__name__] = f"not run: {error}"
        except Exception as error:  # one failing check must not hide the others
            results[check.__name__] = f"FAILED: {type(error).__name__}: {error}"
        print(f"{check.__name__}: {results[check.__name__]}", flush=True)
    where = {**report.provenance(), "gpu": torch.cuda.get_device_name()}
    report.save_json(output, {"provenance": where, "checks": results})
    return int(any(result.startswith("FAILED") for result in results.values()))


if __name__ == "__main__":
    raise SystemExit(main())
