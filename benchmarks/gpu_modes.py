"""Engine modes that no CPU runs, each in a process of its own, with re-routing on.

    python benchmarks/gpu_modes.py -o modes.json [--modes ngram,fp8,preemption]
    python benchmarks/gpu_modes.py --modes eager --shape qwen1.5-moe-a2.7b --layers 1    # on a CPU

For each: S=K writes what "off" writes; S=1 moves slots; in eager steps no row that reaches the
experts names one twice; an exact request among fast ones writes what it writes with re-routing off;
requests that a token ends are counted so far and no further; no step was left to stock routing as
something failed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sere.policy import Policy
from sere.results import provenance

TOKENS, RANK = 24, 4
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4}
MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "eager": {"enforce_eager": True},
    "ngram": {"speculative_config": NGRAM},
    "fp8": {"quantization": "fp8"},
    "fp8 blocks": {"quantization": "fp8_per_block"},
    "lora": {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8},
    "nothing compiled while serving": {"jit_monitor_mode": "error", "operator": "triton"},
    "chunked prefill": {"max_num_batched_tokens": 64, "enable_chunked_prefill": True},
    "preemption": {"num_gpu_blocks_override": 24},
}


def main() -> int:
    """0 if every mode passed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("-o", "--output", default="modes.json")
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--timeout", type=int, default=240, help="seconds a mode may take")
    parser.add_argument("--shape", default="qwen3-30b-a3b")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--only", help="one mode, in this process")
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps(checked(arguments.only, arguments.shape, arguments.layers)))
        return 0
    result: dict[str, Any] = {"provenance": provenance.provenance(), "modes": {}}
    for mode in arguments.modes.split(","):
        result["modes"][mode] = found = _in_a_process(mode, arguments)
        print(f"{mode}: {found}", flush=True)
        provenance.save_json(arguments.output, result)
    return int(not all(found.get("passed") for found in result["modes"].values()))


def _in_a_process(mode: str, arguments: argparse.Namespace) -> dict[str, Any]:
    flags = ["--only", mode, "--shape", arguments.shape, "--layers", str(arguments.layers)]
    operator = MODES[mode].get("operator")
    try:
        done = subprocess.run(
            [sys.executable, __file__, *flags],
            env={**os.environ, **({"SERE_KERNEL": operator} if operator else {})},
            capture_output=True,
            text=True,
            timeout=arguments.timeout,
        )
    except subprocess.TimeoutExpired:
        return {"passed": False, "reason": f"not finished in {arguments.timeout} s"}
    if done.returncode:
        return {"passed": False, "reason": (done.stdout + done.stderr)[-1500:]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def checked(mode: str, shape: str, layers: int) -> dict[str, Any]:
    """What holds in one mode."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from sere.serving.engine import Engine
    from sere.speed.setup import Load, subject

    load = Load((8,), input_len=96, output_len=TOKENS)
    with subject(shape, None, load, layers=layers) as served, TemporaryDirectory() as folder:
        options = {**served.options, **MODES[mode]}
        options.pop("operator", None)
        adapter = _adapter(Path(folder), served.folder) if mode == "lora" else None
        engine = Engine(served.folder, served.table, batch=8, **options)
        prompts = load.prompts(8, 0, served.vocabulary)

        def tokens(policy: Policy | None, **asked: Any) -> list[list[int]]:
            engine.set_policy(policy)
            return _written(engine, prompts, adapter, **asked)

        off, all_kept = tokens(None), tokens(Policy(S=served.K))
        engine.reset_stats()
        tokens(Policy(S=1))
        moved = sum(layer["slots_rerouted"] for layer in engine.stats().values())
        mixed = tokens(Policy(S=1), tiers=["exact", *[None] * 7])
        (told,) = engine.llm.collective_rpc("sere_telemetry")
        holds = {
            "S=K writes what off writes": off == all_kept,
            "S=1 moves slots": moved > 0,
            "exact among fast is stock": mixed[0] == off[0],
            "no step failed": told["unclassified_steps"] == 0,
        }
        if mode in ("plain", "eager"):  # drafts and recomputation are rows as well
            holds["ended requests are not counted on"] = _stops(engine, prompts, mixed)
        if mode == "lora":
            plain = _written(engine, prompts, None)
            holds["the adapter changes what is written"] = plain[::2] != mixed[::2]
        if options["enforce_eager"]:  # no step of a graph can be recorded
            holds["rows name distinct experts"] = _distinct(engine, prompts)
    return {"passed": all(holds.values()), **holds, "slots moved": moved}


def _written(
    engine: Any,
    prompts: list[list[int]],
    adapter: Any,
    tiers: Sequence[str | None] = (None,) * 8,
    **more: Any,
) -> list[list[int]]:
    """Token ids of each prompt. adapter: a LoRA request for every second one, or None. more: for
    vLLM's `SamplingParams`."""
    from vllm import SamplingParams

    sampling = [
        SamplingParams(
            temperature=0,
            max_tokens=TOKENS,
            ignore_eos=True,
            detokenize=False,
            extra_args={"sere": tier} if tier else None,
            **more,
        )
        for tier in tiers
    ]
    given = [{"prompt_token_ids": ids} for ids in prompts]
    adapters = [None if i % 2 else adapter for i in range(len(prompts))] if adapter else None
    done = engine.llm.generate(given, sampling, use_tqdm=False, lora_request=adapters)
    return [list(one.outputs[0].token_ids) for one in done]


def _adapter(folder: Path, model: str) -> Any:
    """A random one, as PEFT saves them, of the queries and of every expert's projections."""
    import torch
    from safetensors.torch import save_file
    from vllm.lora.request import LoRARequest

    config = json.loads((Path(model) / "config.json").read_text())
    H, N = config["hidden_size"], config["moe_intermediate_size"]
    width = config.get("head_dim", H // config["num_attention_heads"])
    sizes = {"self_attn.q_proj": (H, width * config["num_attention_heads"])}
    for expert in range(config["num_experts"]):
        sizes |= {f"mlp.experts.{expert}.{name}_proj": (H, N) for name in ("gate", "up")}
        sizes[f"mlp.experts.{expert}.down_proj"] = (N, H)
    random, pairs = torch.Generator().manual_seed(0), {}
    for layer in range(config["num_hidden_layers"]):
        for name, (into, out) in sizes.items():
            module = f"base_model.model.model.layers.{layer}.{name}"
            pairs[f"{module}.lora_A.weight"] = torch.randn(RANK, into, generator=random) * 0.05
            pairs[f"{module}.lora_B.weight"] = torch.randn(out, RANK, generator=random) * 0.05
    save_file(pairs, folder / "adapter_model.safetensors")
    modules = ["q_proj", "gate_proj", "up_proj", "down_proj"]
    about = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": modules}
    (folder / "adapter_config.json").write_text(json.dumps(about))
    return LoRARequest("random", 1, str(folder))


def _stops(engine: Any, prompts: list[list[int]], written: list[list[int]]) -> bool:
    """Whether as many rows were counted as tokens came, where a token ends the requests."""
    stops = sorted({answer[3 + i] for i, answer in enumerate(written)})
    engine.reset_stats()
    ended = _written(engine, prompts, None, stop_token_ids=stops)
    rows = {layer["rows_fast"] for layer in engine.stats().values()}
    return rows == {sum(map(len, ended)) - len(prompts)}


def _distinct(engine: Any, prompts: list[list[int]]) -> bool:
    engine.llm.collective_rpc("sere_record", args=(True,))
    engine.generate(prompts, 4, to_the_end=True)
    (recorded,) = engine.llm.collective_rpc("sere_recording")
    engine.llm.collective_rpc("sere_record", args=(False,))
    rows = [row for steps in recorded.values() for _, _, _, ids, _ in steps for row in ids]
    return bool(rows) and all(len(set(row)) == len(row) for row in rows)


if __name__ == "__main__":
    raise SystemExit(main())
