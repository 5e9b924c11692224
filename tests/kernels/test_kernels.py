"""Kernels for GPUs, as far as a machine without one can tell: they compile for every architecture,
Triton's equal the specification in the interpreter, the CUDA source has no data race, and the right
one is chosen."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sere.kernels import Batch, Plan, cuda_kernel, implementations, new_counters, reroute
from sere.kernels.implementations import implementation_for, load
from sere.policy import Policy
from tests.kernels import cuda_on_host

GPUS = (80, 90, 100)
ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))


def arguments() -> tuple[Any, ...]:
    g = torch.Generator().manual_seed(0)
    ids = torch.rand(9, 32, generator=g).argsort(1)[:, :4].to(torch.int32)
    plan = Plan.build(torch.rand(32, 32, generator=g), Policy(S=1), K=4)
    rows = torch.ones(9, dtype=torch.int8)
    return ids, torch.rand(9, 4, generator=g), plan, rows, new_counters()


# --- Triton ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "files",
    [
        ("test_reroute.py", "triton_many_programs.py"),
        ("test_distinct.py", "test_pool.py"),
        ("triton_fused_topk.py",),
    ],
    ids=["operator", "distinct experts", "fused with top-k"],
)
def test_triton_equals_the_specification_in_the_interpreter(files: tuple[str, ...]) -> None:
    """The whole of test_reroute.py and test_distinct.py again, with Triton; once more in its
    many-programs form; and behind the fused top-k."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *(f"tests/kernels/{file}" for file in files)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "passed" in done.stdout and "skipped" not in done.stdout


@pytest.mark.parametrize(
    ("gpu", "E", "K"), [(80, 128, 8), (90, 60, 4), (90, 896, 16), (100, 60, 4)]
)
def test_triton_compiles_without_a_gpu(gpu: int, E: int, K: int) -> None:
    """The interpreter accepts what the compiler does not; and it fuses no multiplication with an
    addition, where the specification rounds in between."""
    pytest.importorskip("triton")
    from kernel_code import TRITON_KERNELS, figures, triton_compiled

    for kernel in TRITON_KERNELS:
        (code,) = figures(triton_compiled(kernel, E, K, gpu).asm["cubin"]).values()
        assert code["instructions"] > 100
        if "topk" not in kernel.__module__:
            assert code["fused_multiply_adds"] == 0


def test_triton_compiles_nothing_more_once_a_server_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """By Triton's own key of a compiled kernel, for an H100: the first call compiles every form,
    and no batch size, stride between rows or address asks for another."""
    pytest.importorskip("triton")
    from sere.kernels import triton_kernel

    keys: dict[str, set[str]] = {"first": set(), "later": set()}
    moment = "first"

    class Recorded:
        def __init__(self, kernel: Any) -> None:
            target = make_backend(GPUTarget("cuda", 90, 32))
            self.bind = create_function_from_signature(kernel.signature, kernel.params, target)
            self.name = kernel.__name__

        def __getitem__(self, grid: Any) -> Any:
            return lambda *args, **options: self.warmup(*args, grid=grid, **options)

        def warmup(self, *args: Any, grid: Any, **options: Any) -> None:
            _, *key = self.bind(*map(MockTensor.wrap_dtype, args), **options)
            keys[moment].add(f"{self.name} {key}")

    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend
    from triton.runtime.jit import MockTensor, create_function_from_signature

    for name in ("_all_at_once", "_vote", "_decide_and_move"):
        monkeypatch.setattr(triton_kernel, name, Recorded(getattr(triton_kernel, name)))
    monkeypatch.setattr(triton_kernel, "_PREPARED", set())
    plan = Plan.off(128)
    for T in (1, 2, 3, 16, 17, 128, 129, 512, 4096):
        for shift in (0, 1):  # where a tensor begins in its memory
            ids = torch.zeros(T * 8 + shift, dtype=torch.int32)[shift:].view(T, 8)
            weights = torch.zeros(T, 8 + shift)[:, shift:]
            rows = torch.zeros(T + shift, dtype=torch.int8)[shift:]
            triton_kernel.run(Batch(ids, weights, rows), plan, new_counters())
            moment = "later"
    assert len(keys["first"]) == 3
    assert keys["later"] == keys["first"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("renormalize", [True, False])
def test_the_fused_top_k_chooses_as_vllms_router(renormalize: bool, dtype: torch.dtype) -> None:
    """vLLM's router for CPUs leaves the order of the slots open: by expert."""
    pytest.importorskip("triton")
    from fused_topk import chosen
    from vllm.model_executor.layers.fused_moe.router.cpu_router import _softmax_topk

    logits = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)) * 3
    # It takes the softmax in the logits' precision, on vLLM's GPUs it is float32.
    logits, tolerance = logits.to(dtype), {torch.float32: 2e-6, torch.bfloat16: 7e-2}[dtype]
    theirs, mine = (
        torch.zeros(64, 128).scatter_(1, ids.long(), weights)
        for weights, ids in (
            _softmax_topk(logits, 8, renormalize),
            chosen(logits, 8, renormalize=renormalize),
        )
    )
    assert torch.equal(theirs != 0, mine != 0)
    torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=0.0)


# --- CUDA C++ -----------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("cuda.core")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "sere"


@pytest.mark.parametrize("gpu", GPUS)
def test_cuda_compiles_without_a_gpu_or_a_toolkit(gpu: int, cache: Path) -> None:
    """A block's threads fit into the 65536 registers of an SM, whatever the types; and nothing is
    rounded once where the specification rounds twice."""
    from kernel_code import figures

    types = [(torch.int32, torch.float32), (torch.int64, torch.float64)]
    for ids, weights in types:
        kernels = figures(cuda_kernel.compiled(f"sm_{gpu}", ids, weights))
        assert len(kernels) == 3
        for kernel in kernels.values():
            assert kernel["registers"] * cuda_kernel.THREADS <= 65536
            assert kernel["fused_multiply_adds"] == 0
    assert len(list(cache.iterdir())) == 2


def test_compiled_kernels_are_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = cuda_kernel.compiled("sm_90", torch.int32, torch.float32)
    monkeypatch.setattr(cuda_kernel, "_compile", None)  # would raise
    assert cuda_kernel.compiled("sm_90", torch.int32, torch.float32) == first


def test_ranks_that_compile_at_once_leave_one_whole_file(cache: Path) -> None:
    code = (
        "import torch; from sere.kernels.cuda_kernel import compiled; "
        "compiled('sm_90', torch.int32, torch.float32)"
    )
    ranks = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3)]
    assert [rank.wait() for rank in ranks] == [0, 0, 0]
    (kept,) = cache.iterdir()
    assert kept.read_bytes() == cuda_kernel._compile(
        cuda_kernel.source_text(),
        "sm_90",
        {"ID": "int", "WEIGHT": "float"},
    )


def test_a_cache_that_cannot_be_written_is_no_obstacle(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    assert len(cuda_kernel.compiled("sm_90", torch.int32, torch.float32)) > 1000


@pytest.mark.skipif(not cuda_on_host.COMPILER, reason="no g++")
def test_cuda_has_no_data_race(tmp_path: Path) -> None:
    """ThreadSanitizer over the source, a block being several threads: every barrier is needed."""
    program = tmp_path / "races"
    cuda_on_host.build(program, torch.int32, torch.float32, "-fsanitize=thread", "-DRACES")
    assert subprocess.run([program], capture_output=True).returncode == 0


# The last lines before a barrier.
BARRIERS = (
    "    vote(batch, settings, pool, shared, 0, T);\n",
    "        critical += aim(batch, decision, shared, rows, movable, s, first, slots);\n",
    "            hold(batch, rows, first, slots, active);\n    ",
    "        carry(batch, decision, shared, rows, first, slots, active);\n",
)


@pytest.mark.skipif(not cuda_on_host.COMPILER, reason="no g++")
@pytest.mark.parametrize("line", BARRIERS)
def test_the_race_test_finds_a_missing_barrier(line: str, tmp_path: Path) -> None:
    before, barrier, after = cuda_kernel.source_text().partition(f"{line}    __syncthreads();\n")
    if not barrier:
        before, barrier, after = cuda_kernel.source_text().partition(
            f"{line}        __syncthreads();\n"
        )
    assert barrier
    (tmp_path / "reroute.cu").write_text(f"{before}{line}{after}")
    program = tmp_path / "races"
    first = f"-I{tmp_path}"  # found before the real one
    cuda_on_host.build(
        program, torch.int32, torch.float32, "-fsanitize=thread", "-DRACES", include=first
    )
    assert subprocess.run([program], capture_output=True).returncode != 0


def test_cuda_says_which_sizes_it_serves() -> None:
    assert implementations.LIMITS["cuda"] == (cuda_kernel.MAX_E, cuda_kernel.MAX_K)
    ids, weights, _, rows, counters = arguments()
    with pytest.raises(ValueError, match=r"E=2048.*E=1024"):
        cuda_kernel.run(Batch(ids, weights, rows), Plan.off(2048), counters)


# --- which one ----------------------------------------------------------------------------------


def test_cpus_are_served_by_numba() -> None:
    assert implementation_for(torch.device("cpu")) == "numba"
    assert implementation_for(torch.device("meta")) == "reference"


def test_an_implementation_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(implementations.ENVIRONMENT, "reference")
    assert implementation_for(torch.device("cpu")) == "reference"
    monkeypatch.setenv(implementations.ENVIRONMENT, "fastest")
    with pytest.raises(ValueError, match=r"fastest.*numba"):
        implementation_for(torch.device("cpu"))


def test_what_serves_instead_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    implementations._chosen.cache_clear()
    monkeypatch.setenv(implementations.ENVIRONMENT, "triton")
    with pytest.warns(UserWarning, match="no triton kernel: it does not run on cpu; numba serves"):
        assert implementation_for(torch.device("cpu")) == "numba"
    monkeypatch.delenv(implementations.ENVIRONMENT)
    monkeypatch.setitem(implementations.NEEDS, "numba", ("no_such_library",))
    implementations._chosen.cache_clear()
    with pytest.warns(UserWarning, match="no_such_library is not installed; reference serves"):
        assert implementation_for(torch.device("cpu")) == "reference"
    implementations._chosen.cache_clear()


@pytest.fixture
def on_gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A machine on which everything compiles and loads."""
    monkeypatch.delenv(implementations.ENVIRONMENT, raising=False)
    monkeypatch.setattr(implementations, "installed", lambda name: True)
    monkeypatch.setattr(cuda_kernel, "obstacle", lambda: None)
    implementations._chosen.cache_clear()
    yield monkeypatch
    implementations._chosen.cache_clear()


def test_nvidia_gpus_are_served_by_cuda_without_a_word(on_gpus: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert implementation_for(torch.device("cuda"), E=896, K=16) == "cuda"
        assert implementation_for(torch.device("xpu")) == "triton"


def test_where_cuda_cannot_be_triton_serves_and_one_line_says_why(
    on_gpus: pytest.MonkeyPatch,
) -> None:
    """ROCm; a machine without NVIDIA's packages; a driver that refuses; a model too large."""

    def chosen(why: str, **sizes: int) -> None:
        implementations._chosen.cache_clear()
        with pytest.warns(UserWarning, match=f"no cuda kernel: {why}; triton serves") as said:
            for _ in range(3):
                assert implementation_for(torch.device("cuda"), **sizes) == "triton"
        assert len(said) == 1

    chosen("it goes to E=1024, K=32", E=2048, K=8)
    chosen("it goes to E=1024, K=32", E=64, K=40)
    with on_gpus.context() as machine:
        machine.setattr(cuda_kernel, "obstacle", lambda: "CUDAError: no driver")
        chosen("CUDAError: no driver")
    with on_gpus.context() as machine:
        machine.setattr(implementations, "installed", lambda name: name != "cuda")
        chosen("cuda.core, cuda.bindings is not installed")
    with on_gpus.context() as machine:
        machine.setattr(torch.version, "hip", "7.0")
        chosen("it is for NVIDIA GPUs")


# --- the operator as PyTorch sees it ------------------------------------------------------------


def test_the_operator_keeps_pytorchs_promises() -> None:
    """Schema, fake kernel, tracing with fixed and with dynamic shapes."""
    ids, weights, plan, rows, counters = arguments()
    operator = torch.ops.sere.route.default
    parts = (plan.neighbours, plan.errors, plan.scales, plan.settings, plan.pool)
    for more in ((rows, counters), (None, None)):
        torch.library.opcheck(operator, (ids, weights, *parts, *more))


def test_torch_compile_sees_one_graph() -> None:
    ids, weights, plan, rows, counters = arguments()

    def layer(ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return reroute(ids, weights * 2, plan, rows, counters)[0] + 1

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(
        compiled(ids, weights), load("reference")(Batch(ids, weights, rows), plan, None) + 1
    )
    assert counters[0] == 1
    plan.copy_(Plan.off(32))  # seen by what was compiled before
    assert torch.equal(compiled(ids, weights), ids + 1)
