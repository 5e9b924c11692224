"""What maps add to a layer's output: every implementation against loops over rows and slots."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sere.kernels import RowClass, keeping
from sere.kernels.answers import NOTHING
from sere.kernels.implementations import load_answers

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NAMES = ["triton"] if INTERPRETED else ["reference", "numba"]
T, K, E = 7, 4, 12
BY_ROW = ("ids", "new", "weights", "rows", "hidden", "output")
SHAPES = [(4, 24, 24), (3, 40, 48), (0, 24, 24)]
"""R, H, and the width of the experts' input, which a kernel may want padded."""


def batch(dtype: torch.dtype, R: int, H: int, wide: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(R)
    ids = torch.stack([torch.randperm(E, generator=g)[:K] for _ in range(T)]).int()
    new = ids.clone()
    new[0, 1], new[2, 0], new[2, 3], new[4, 2], new[5, 1] = 20, 21, 22, 23, 24
    new[6] = ids[6].flip(0)  # in another order, and none of them gone
    ids[1, 2] = new[1, 2] = -1
    rows = torch.full((T,), int(RowClass.FAST), dtype=torch.int8)
    rows[3], rows[4], rows[5] = RowClass.EXACT, RowClass.VOID, keeping(1)
    return {
        "ids": ids,
        "new": new.long(),
        "weights": torch.rand(T, K, generator=g) + 0.1,
        "rows": rows,
        "hidden": torch.randn(T, wide, generator=g).to(dtype),
        "output": torch.randn(T, wide, generator=g).to(dtype),
        "down": torch.randn(E, R, H, generator=g).bfloat16(),
        "up": torch.randn(E, R, H, generator=g).bfloat16(),
        "centre": torch.randn(E, R, generator=g),
        "constant": torch.randn(E, H, generator=g),
    }


def by_hand(given: dict[str, Tensor], rank: int) -> Tensor:
    """The output [T, wide] in float64."""
    H, out = given["constant"].shape[1], given["output"].double()
    for t in range(T):
        for k in range(K):
            u = int(given["ids"][t, k])
            if u in given["new"][t].tolist() or given["rows"][t] == RowClass.VOID or rank < 0:
                continue
            down, up = (given[name][u, :rank].double() for name in ("down", "up"))
            inner = down @ given["hidden"][t, :H].double() - given["centre"][u, :rank]
            answer = given["constant"][u] + up.T @ inner
            out[t, :H] += given["weights"][t, k].double() * answer
    return out


def answered(module: Any, given: dict[str, Tensor], rank: int) -> Tensor:
    weights, output = given["weights"].clone(), given["output"].clone()
    live = torch.tensor([rank], dtype=torch.int32)
    module.keep_freed_(weights, given["ids"], given["new"], given["rows"], live)
    asked = (given["ids"], weights)
    inner = module.ask(given["hidden"], *asked, given["down"], given["centre"], live)
    assert inner.shape == (*weights.shape, given["down"].shape[1])
    module.answer_(output, *asked, inner, given["up"], given["constant"])
    return output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("R", "H", "wide"), SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_freed_slots_are_answered_and_other_rows_keep_every_bit(
    name: str, R: int, H: int, wide: int, dtype: torch.dtype
) -> None:
    given, module = batch(dtype, R, H, wide), load_answers(name)
    given["output"][1], given["output"][:, -1] = -0.0, -0.0  # which adding 0 would make +0
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.5, torch.float16: 0.05}[dtype]
    for rank in {R, max(R - 2, 0), 0}:
        found, wanted = answered(module, given, rank), by_hand(given, rank)
        torch.testing.assert_close(found.double(), wanted, atol=tolerance, rtol=1e-2)
        touched = [t for t in range(T) if not bits(found[t], given["output"][t])]
        assert touched == [0, 2, 5]
    assert bits(answered(module, given, NOTHING), given["output"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("R", "H", "wide"), [*SHAPES, (16, 2048, 2048), (99, 7, 7)])
@pytest.mark.parametrize("name", NAMES)
def test_a_row_is_answered_alike_to_the_bit_alone_and_in_any_company(
    name: str, R: int, H: int, wide: int, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    """One row, in another place, among copies; two threads, which share out a sum otherwise than
    one does where a batch is short."""
    given, module = batch(dtype, R, H, wide), load_answers(name)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    whole = answered(module, given, R)
    for rows in ([0], [2], [5], [5, 0], [2, 4, 3], [6, 5, 4, 3, 2, 1, 0], [0, 2, 5] * 11):
        part = {n: t[rows] if n in BY_ROW else t for n, t in given.items()}
        found = answered(module, part, R)
        assert all(bits(found[i], whole[row]) for i, row in enumerate(rows)), rows


def bits(one: Tensor, other: Tensor) -> bool:
    """Equality that tells -0 from +0."""
    whole = {2: torch.int16, 4: torch.int32}[one.element_size()]
    return torch.equal(one.view(whole), other.view(whole))


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
@pytest.mark.parametrize(("K", "R", "H"), [(8, 16, 2048), (6, 0, 2880)])
def test_triton_compiles_without_a_gpu(K: int, R: int, H: int) -> None:
    """The interpreter accepts what the compiler does not. For an H100, as vLLM's types are."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from sere.kernels import triton_answers

    sizes = {**triton_answers._sizes(K, R, H), "K_PADDED": triton.next_power_of_2(K)}
    types = {"hidden": "*bf16", "output": "*bf16", "down": "*bf16", "up": "*bf16", "rows": "*i8"}
    types |= dict.fromkeys(("ids", "new_ids", "rank"), "*i32")
    types |= dict.fromkeys(("weights", "centre", "constant", "inner"), "*fp32")
    types |= dict.fromkeys(("hidden_row", "output_row", "new_row", "new_slot"), "i32")
    for name in ("_keep_freed", "_ask", "_answer"):
        kernel = getattr(triton_answers, name)
        signature = {arg: types.get(arg, "constexpr") for arg in kernel.arg_names}
        known = {arg: sizes[arg] for arg, kind in signature.items() if kind == "constexpr"}
        source = ASTSource(kernel, signature, constexprs=known)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
        assert compiled.asm["cubin"]


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_triton_answers_the_same_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "19 passed" in done.stdout
