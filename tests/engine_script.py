"""One real vLLM engine in a process of its own: read a job as JSON, print its results as JSON.

Run by `test_serving.py` and by hand (`docs/serving.md`). A job holds `options` for `vllm.LLM` and
`steps`, each a list: ["generate", prompts, max_tokens, tiers], ["refused", tier], ["rpc", method,
args...], or a check that needs the model in this process: ["capture"], ["captured"], ["addresses"].
"""

from __future__ import annotations

import json
import sys
from typing import Any

RESULT = "RESULT "


class Steps:
    """What a job may ask of the engine."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm
        self.taken: dict[str, list[Any]] = {}

    def generate(
        self, prompts: list[str], max_tokens: int, tiers: list[Any] | None = None
    ) -> list[Any]:
        """[token ids, logprobs of the best five at each position] of each prompt.

        tiers: what each request asks of sere; None for those that ask nothing.
        """
        from vllm import SamplingParams

        sampling = [
            SamplingParams(
                temperature=0,
                max_tokens=max_tokens,
                logprobs=5,
                extra_args=None if tier is None else {"sere": tier},
            )
            for tier in tiers or [None] * len(prompts)
        ]
        outputs = [r.outputs[0] for r in self.llm.generate(prompts, sampling, use_tqdm=False)]
        return [
            [
                list(out.token_ids),
                [{str(t): lp.logprob for t, lp in position.items()} for position in out.logprobs],
            ]
            for out in outputs
        ]

    def refused(self, tier: Any) -> str:
        """What the engine says to a request for this tier; the engine must live on."""
        try:
            self.generate(["1+1>"], 1, [tier])
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "accepted"

    def rpc(self, method: str, *args: Any) -> Any:
        return self.llm.collective_rpc(method, args=tuple(args))

    def capture(self) -> None:
        """From now on keep what vLLM itself sees as the routers' choice, after our wrapper."""
        for name, layer in _moe_layers(self.llm):
            taken = self.taken.setdefault(name, [])
            layer.router.set_capture_fn(lambda ids, taken=taken: taken.append(ids.tolist()))

    def captured(self) -> dict[str, list[Any]]:
        return self.taken

    def addresses(self) -> list[int]:
        return [t.data_ptr() for _, layer in _moe_layers(self.llm) for t in layer.sere.buffers()]


def _moe_layers(llm: Any) -> list[tuple[str, Any]]:
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    found: list[tuple[str, Any]] = []
    llm.apply_model(
        lambda model: found.extend(
            (m.layer_name, m) for m in model.modules() if isinstance(m, MoERunner)
        )
    )
    return found


def main() -> None:
    job = json.loads(sys.stdin.read())
    from vllm import LLM

    steps = Steps(LLM(**job["options"]))
    results = [getattr(steps, name)(*arguments) for name, *arguments in job["steps"]]
    print(RESULT + json.dumps(results), flush=True)


if __name__ == "__main__":
    main()
