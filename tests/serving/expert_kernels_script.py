"""vLLM's own code that sorts slots by expert, unchanged, in Triton's interpreter: the one that
serves gpt-oss in MXFP4 on Hopper (`OAITritonExperts`). Only CUDA builds bring it (`make
cuda-import`).

Reads batches as JSON, each [E, ids, weights]; prints for each how many slots every expert gets,
which slot stands at each place of the sorted array, and where each slot looks for its result.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from typing import Any

RESULT = "SORTED "


def interpretable(function: Any, module: Any) -> None:
    """Let the interpreter find what kernels within functions refer to, as the compiler does."""
    inner = getattr(function, "fn", function)
    names = inner.__code__.co_freevars
    for name, cell in zip(names, inner.__closure__ or (), strict=True):
        if not hasattr(module, name):
            setattr(module, name, cell.cell_contents)
            if getattr(cell.cell_contents, "fn", None) is not None:
                interpretable(cell.cell_contents, module)


def main() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    import torch
    import vllm.config  # noqa: F401 - before platforms, as in an engine

    from tests.serving.cuda_platform import take_for_cuda

    take_for_cuda()
    experts = "vllm.model_executor.layers.fused_moe.experts"
    vllms = importlib.import_module(f"{experts}.gpt_oss_triton_kernels_moe")
    interpretable(importlib.import_module("triton_kernels.routing").sort_tokens, vllms)
    answers = []
    for E, ids, weights in json.load(sys.stdin):
        batch = torch.tensor(ids, dtype=torch.int32), torch.tensor(weights)
        sizes, gather, scatter = vllms.make_routing_data(*batch, E)
        answers.append([t.tolist() for t in (sizes.expt_hist, gather.src_indx, scatter.src_indx)])
    print(RESULT + json.dumps(answers), flush=True)


if __name__ == "__main__":
    main()
