"""What the compiled GPU kernels are made of, without a GPU: instructions, registers, launches.

python benchmarks/kernel_code.py -o benchmarks/results/kernel_code.json
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fused_topk
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sere.kernels import cuda_kernel, triton_programs
from sere.kernels.cuda_variants import VARIANTS
from sere.results import provenance

GPUS = (80, 90, 100)
SHAPES = ((60, 4), (128, 8), (896, 16))
FORM_SHAPES = ((128, 8), (512, 10))
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
LAUNCHES = {
    "decode": "1",
    "large": "3 (a fill, the votes, the moves)",
    "fused with top-k, T <= 64": "1, and none for the top-k",
}

POINTERS = dict.fromkeys(
    ("ids", "out", "votes", "neighbours", "errors", "settings", "pool", "arrived"), "*i32"
)
POINTERS |= {"weights": "*fp32", "scales": "*fp32", "logits": "*bf16"}
POINTERS |= {"rows": "*i8", "counters": "*i64"}
_ALIGNED = {"logits", "arrived", "logits_row"}  # specialised; others are not, see `launched`
TRITON_KERNELS = (
    triton_programs._all_at_once,
    triton_programs._vote,
    triton_programs._decide_and_move,
    fused_topk._fused,
)


def triton_compiled(kernel: Any, E: int, K: int, gpu: int) -> Any:
    """Compile one Triton kernel for the types that vLLM uses, specialised as its launches are."""
    names = kernel.arg_names
    known = {**fused_topk.sizes(E, K), "ids_slot": 1, "weights_slot": 1}
    options = {name: known[name] for name in ("num_warps", "enable_fp_fusion")}
    constants = {name: value for name, value in known.items() if name in names}
    types = {"renormalize": "i1", **POINTERS, **dict.fromkeys(constants, "constexpr")}
    assert {*kernel.do_not_specialize} >= {*triton_programs.VARYING}
    assert {*kernel.do_not_specialize_on_alignment} >= {*triton_programs.POINTERS}
    source = ASTSource(
        kernel,
        signature={name: types.get(name, "i32") for name in names},
        constexprs=constants,
        attrs={
            (names.index(name),): [["tt.divisibility", 16]]
            for name in _ALIGNED.intersection(names)
            if name != "logits_row" or E % 16 == 0
        },
    )
    return triton.compile(source, target=GPUTarget("cuda", gpu, 32), options=options)


def figures(cubin: bytes) -> dict[str, dict[str, int]]:
    """By kernel: SASS instructions, barriers, registers, bytes of shared memory and of stack."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        sass = _run("-sass", file.name)
        usage = _run("--dump-resource-usage", file.name)
    found = {}
    for part in re.split(r"\n\s*Function : ", sass)[1:]:
        name = part.split()[0]
        code = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?(\w[\w.]*)", part)
        resources = re.search(rf"{re.escape(name)}:\s*(.*)", usage)
        used = dict(re.findall(r"(REG|STACK|SHARED):(\d+)", resources[1] if resources else ""))
        found[name] = {
            "instructions": sum(op != "NOP" for op in code),
            "barriers": sum(op.startswith("BAR") for op in code),
            "fused_multiply_adds": sum(op.startswith(("FFMA", "DFMA")) for op in code),
            "registers": int(used["REG"]),
            "shared_bytes": int(used["SHARED"]),
            "stack_bytes": int(used["STACK"]),
        }
    return found


def _run(*arguments: str) -> str:
    done = subprocess.run([CUOBJDUMP, *arguments], capture_output=True, text=True, check=True)
    return done.stdout


def every_kernel() -> Iterator[dict[str, Any]]:
    """One entry a kernel, shape (Triton compiles for each) and architecture."""
    for gpu in GPUS:
        cubin = cuda_kernel.compiled(f"sm_{gpu}", torch.int32, torch.float32)
        for name, found in figures(cubin).items():
            yield {"gpu": f"sm_{gpu}", "kernel": f"cuda {name}", "shape": "any", **found}
        for E, K in SHAPES:
            for kernel in TRITON_KERNELS:
                compiled = triton_compiled(kernel, E, K, gpu)
                ((name, found),) = figures(compiled.asm["cubin"]).items()
                found["shared_bytes"] = compiled.metadata.shared  # asked for at the launch
                shape = f"({E}, {K})"
                yield {"gpu": f"sm_{gpu}", "kernel": f"triton {name}", "shape": shape, **found}


def every_form() -> Iterator[dict[str, Any]]:
    """One entry a form of the CUDA kernel (see `cuda_variants`) and shape, for an H100."""
    for E, K in FORM_SHAPES:
        for form in (form for form in VARIANTS if form.fits(64, E, K)):
            switches = form.macros(E, K)
            cubin = cuda_kernel.compiled("sm_90", torch.int32, torch.float32, switches)
            found = figures(cubin)["reroute_lanes" if form.lanes else "reroute_at_once"]
            yield {"gpu": "sm_90", "form": form.name, "shape": f"({E}, {K})", **found}


def main() -> None:
    """Compile and count."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("-o", "--output", default="kernel_code.json")
    output = parser.parse_args().output
    entries, forms = list(every_kernel()), list(every_form())
    head = ["kernel", *(key for key in entries[0] if key != "kernel")]
    print(provenance.text_table(head, [[str(entry[key]) for key in head] for entry in entries]))
    print(f"launches a layer: {LAUNCHES}")
    about = {"provenance": provenance.provenance(), "launches": LAUNCHES}
    provenance.save_json(output, {**about, "kernels": entries, "forms": forms})


if __name__ == "__main__":
    main()
