"""vLLM's OpenAI server on a GPU, as a user starts it: processes of its own, CUDA graphs, chunked
prefill, prefix cache.

    python benchmarks/gpu_server.py -o server_checks.json

Tiers over HTTP and the metrics; a turn behind a fast answer finds its prompt's blocks and none that
the fast answer wrote; exact requests that are preempted among fast ones. Runs without a GPU, too.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sere import demo_model
from sere.calibration.calibrate import calibrate
from sere.demo_model.tasks import examples
from sere.results import provenance
from sere.serving.server import NAME, Server, serving

BLOCK, TOKENS = 32, 40
PROMPTS = [" ".join(e.prompt for e in examples(4, seed=s, split="held_out")) for s in range(16)]
SERE = {"S": 1, "min_active": 1}
_FRESH_S = 1.0  # metrics are asked for at most twice a second


def main() -> int:
    """0 if all holds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("-o", "--output", default="server_checks.json")
    arguments = parser.parse_args()
    options = {
        "dtype": "bfloat16" if torch.cuda.is_available() else "float32",
        "enforce_eager": not torch.cuda.is_available(),
        "max_model_len": 512,
        "max_num_batched_tokens": 512,
        "block_size": BLOCK,
        "num_gpu_blocks_override": 100,  # a crowd does not fit
        "enable_prefix_caching": True,
        "enable_prompt_tokens_details": True,
    }
    result: dict[str, Any] = {"provenance": provenance.provenance(), "checks": {}}
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "demo.table"
        calibrate(demo_model.NAME, table, samples=64, progress=False)
        sere = {"table": str(table), **SERE}
        environment = {"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ}
        with serving(str(demo_model.PATH), options, sere, environment) as server:
            for check in (tiers, turns, preempted):
                result["checks"][check.__name__] = _verdict(check, server)
                provenance.save_json(arguments.output, result)
    print(json.dumps(result["checks"], indent=1))
    return int(not all(found["passed"] for found in result["checks"].values()))


def _verdict(check: Callable[[Server], dict[str, Any]], server: Server) -> dict[str, Any]:
    try:
        return check(server)
    except (AssertionError, urllib.error.URLError) as error:
        return {"passed": False, "reason": f"{type(error).__name__}: {error}"}


def tiers(server: Server) -> dict[str, Any]:
    """Exact answers do not depend on company; what is no tier is HTTP 400; rows are counted."""
    together = _complete(server, PROMPTS, tier="exact")
    mixed = [
        _complete(server, PROMPTS[i : i + 1], tier="exact" if i % 2 else "fast")[0]
        for i in range(len(PROMPTS))
    ]
    fast = _complete(server, PROMPTS, tier="fast")
    try:
        _complete(server, PROMPTS[:1], tier="fastest")
        status = 200
    except urllib.error.HTTPError as error:
        status = error.code
    pairs = list(zip(mixed, together, strict=True))[1::2]
    alike = [mine["token_ids"] == alone["token_ids"] for mine, alone in pairs]
    changed = sum(a["token_ids"] != b["token_ids"] for a, b in zip(fast, together, strict=True))
    rows = _metric(server, "sere_rows_total", row_class="fast")
    return {
        "passed": changed > 0 and status == 400 and rows > 0 and all(alike),
        "fast answers that differ": changed,
        "exact answers alike in a batch and alone": sum(alike),
        "of": len(alike),
        "what is no tier": status,
        "fast rows": rows,
    }


def turns(server: Server) -> dict[str, Any]:
    """The next turn of a chat: exact, behind a fast answer and behind an exact one."""
    found: dict[str, Any] = {}
    for tier in ("fast", "exact"):
        first = _complete(server, PROMPTS[:4], tier=tier, cache_salt=f"behind {tier}")
        prompts = [one["prompt_token_ids"] + one["token_ids"] + [30] for one in first]
        cached = []
        for prompt in prompts:
            asked = {"tier": "exact", "cache_salt": f"behind {tier}"}
            answer = _ask(server, [prompt], **asked)
            cached.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
        kept = [len(one["prompt_token_ids"]) + (tier == "exact") * (TOKENS - 1) for one in first]
        found[tier] = {"cached": cached, "allowed": [n // BLOCK * BLOCK for n in kept]}
    again = _metric(server, "sere_prefix_tokens_prefilled_again_total")
    exactly = all(one["cached"] == one["allowed"] for one in found.values())
    return {"passed": exactly and again > 0, **found, "prefilled again": again}


def preempted(server: Server) -> dict[str, Any]:
    """A crowd that does not fit: exact requests among it answer as they do alone."""
    asked = [PROMPTS[i % 16] for i in range(32)]
    before = _metric(server, "vllm:num_preemptions_total")
    crowd = _complete(server, asked, tier="exact", tokens=200, cache_salt="crowd")
    preemptions = _metric(server, "vllm:num_preemptions_total") - before
    alone = [
        _complete(server, [prompt], tier="exact", tokens=200, cache_salt="alone")[0]
        for prompt in PROMPTS[:4]
    ]
    same = [a["token_ids"] == b["token_ids"] for a, b in zip(crowd, alone, strict=False)]
    return {"passed": preemptions > 0 and all(same), "preemptions": preemptions, "same": sum(same)}


def _ask(
    server: Server, prompts: list[Any], *, tier: str, tokens: int = TOKENS, **more: Any
) -> dict[str, Any]:
    body = {
        "model": NAME,
        "prompt": prompts,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        "vllm_xargs": {"sere": tier},
        **more,
    }
    request = urllib.request.Request(
        f"{server.url}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=300) as response:
        answer: dict[str, Any] = json.load(response)
    return answer


def _complete(server: Server, prompts: list[Any], **asked: Any) -> list[dict[str, Any]]:
    return list(_ask(server, prompts, **asked)["choices"])


def _metric(server: Server, name: str, **labels: str) -> float:
    """Summed over its series that have these labels."""
    time.sleep(_FRESH_S)
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=60) as response:
        text = response.read().decode()
    wanted = [f'{key}="{value}"' for key, value in labels.items()]
    series = re.findall(rf"^{name}(\{{.*\}})? (\S+)$", text, re.MULTILINE)
    return sum(float(value) for own, value in series if all(one in own for one in wanted))


if __name__ == "__main__":
    raise SystemExit(main())
