"""One vLLM engine whose policy can be switched between batches.

Stock and re-routed decoding then run interleaved in one process family, so that their ratio does
not depend on what else the machine was doing. Stock here is the same engine with re-routing off.
It equals an engine without the plug-in to the bit (tested), unless stock vLLM would take an expert
kernel that routes inside itself: `Engine.kernels` tells.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sere.kernels import COUNTERS
from sere.policy import Policy
from sere.serving.asking import KEY
from sere.serving.symbols import lacking

PLUGIN = "sere"


@dataclass(frozen=True)
class Batch:
    """What one batch of prompts gave.

    texts: completions, in order. tokens: how many were generated. decode_s: seconds from the
    first token of the last request to begin until the last token of all; decoded: tokens
    generated in that time.
    """

    texts: list[str]
    token_ids: list[list[int]]
    decoded: int
    decode_s: float


def to_follow(table: str | Path, policies: Iterable[Policy | None]) -> dict[str, Any]:
    """Settings of an engine that can be switched to all of these: linear maps are loaded, and
    graphs know of pools, where one asks for them; and requests may ask to be independent, where the
    first of those can have such rows."""
    given = [policy for policy in policies if policy]
    maps = any(policy.frees_anywhere for policy in given)
    pools = [policy.pool or 1 for policy in given if policy.pools]
    pool = {"S": 1, "pool": pools[0]} if pools else {}
    return {"table": str(Path(table).absolute()), "maps": maps, **pool}


class Engine:
    """A vLLM engine with re-routing loaded; greedy decoding."""

    def __init__(
        self,
        model: str | Path,
        table: str | Path | None,
        *,
        batch: int,
        policies: Iterable[Policy | None] = (),
        **options: Any,
    ) -> None:
        """Start the engine with re-routing off.

        table: None for stock vLLM, where no policy can be set. batch: requests decoded together at
        most. policies: those that will be set. options: passed on to `vllm.LLM`.
        """
        prepare(needed=table is not None)
        from vllm import LLM

        if reason := lacking("bench"):
            raise RuntimeError(f"no engine to measure with: {reason}")

        self.llm = LLM(
            str(model),
            max_num_seqs=batch,
            enable_prefix_caching=False,
            disable_log_stats=False,
            additional_config={KEY: to_follow(table, policies)} if table else {},
            **options,
        )
        if table:
            self.set_policy(None)

    def set_policy(self, policy: Policy | None) -> None:
        """Switch the live engine; None is stock routing."""
        self.llm.collective_rpc("sere_policy", args=(policy.to_dict() if policy else None,))

    def kernels(self) -> dict[str, list[str]]:
        """Names of the expert kernels, "serving" and those that "stock" vLLM would have taken."""
        workers = self.llm.collective_rpc("sere_description")
        names = {"serving": "kernels", "stock": "stock_kernels"}
        return {
            key: sorted({kernel for worker in workers for kernel in worker[name]})
            for key, name in names.items()
        }

    def close(self) -> None:
        """End the engine's own process, if it has one, so that the device is free for another."""
        self.llm.llm_engine.engine_core.shutdown()

    def probe(self) -> dict[str, float]:
        """What the device can do: see `sere.serving.probe`."""
        return dict(self.llm.collective_rpc("sere_probe")[0])

    def generate(
        self,
        prompts: Sequence[str] | Sequence[list[int]],
        max_tokens: int,
        *,
        to_the_end: bool = False,
        tiers: Sequence[str | None] | None = None,
    ) -> Batch:
        """Greedy completions of one batch, with the time that decoding took.

        prompts: texts, or token ids (whose completions have no text).
        to_the_end: decode `max_tokens` tokens for every prompt, whatever the model says.
        tiers: what each request asks of sere; None for those that ask nothing.
        """
        from vllm import SamplingParams

        texts = all(isinstance(prompt, str) for prompt in prompts)
        sampling = [
            SamplingParams(
                temperature=0,
                max_tokens=max_tokens,
                ignore_eos=to_the_end,
                detokenize=texts,
                extra_args={KEY: tier} if tier else None,
            )
            for tier in tiers or [None] * len(prompts)
        ]
        given = list(prompts) if texts else [{"prompt_token_ids": ids} for ids in prompts]
        requests = self.llm.generate(given, sampling, use_tqdm=False)
        lengths = [len(r.outputs[0].token_ids) for r in requests]
        begun = max(r.metrics.first_token_ts for r in requests)
        ended = max(r.metrics.last_token_ts for r in requests)
        return Batch(
            [r.outputs[0].text for r in requests],
            [list(r.outputs[0].token_ids) for r in requests],
            sum(lengths) - len(lengths),
            ended - begun,
        )

    def reset_stats(self) -> None:
        """Set all counters to zero."""
        self.llm.collective_rpc("sere_reset")

    def stats(self) -> dict[int, dict[str, int]]:
        """Counters by decoder layer and name (tensor-parallel ranks agree, pipeline stages have
        layers of their own)."""
        stats: dict[int, dict[str, int]] = {}
        for worker in self.llm.collective_rpc("sere_stats"):
            stats.update(worker)
        assert all(tuple(layer) == COUNTERS for layer in stats.values())
        return stats


def prepare(*, needed: bool = True) -> None:
    """Before vLLM is imported for an engine of ours: the plug-in must be allowed where it is
    needed; unless the user says otherwise, the CPU's cache is small and vLLM logs errors only
    (sere's own among them)."""
    if needed:
        check_plugin_allowed()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")


def check_plugin_allowed() -> None:
    """Raise if `VLLM_PLUGINS` names plug-ins and not this one: vLLM would ignore our settings."""
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN not in allowed.split(","):
        raise RuntimeError(
            f"VLLM_PLUGINS={allowed!r} does not name {PLUGIN!r}: vLLM would serve without "
            f"re-routing; unset it or add {PLUGIN!r}"
        )
