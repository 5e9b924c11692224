"""One real vLLM engine in a process of its own: read a job as JSON, print its results as JSON.

Run by `test_serving.py` and by hand (`docs/serving.md`). A job holds `options` for `vllm.LLM` and
`steps`, each a list: ["generate", prompts, max_tokens, tiers, adapters], ["refused", tier],
["rpc", method, args...], ["meet", folder] (all data-parallel ranks), a mishap: ["remove", path],
["replace", path, by], ["asleep"], ["killed", process], or a check that needs the model in this
process: ["capture"], ["captured"], ["addresses"].
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil

RESULT = "RESULT "


class Steps:
    """What a job may ask of the engine."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm
        self.taken: dict[str, list[Any]] = {}

    def generate(
        self,
        prompts: list[str],
        max_tokens: int,
        tiers: list[Any] | None = None,
        adapters: list[str | None] | None = None,
    ) -> list[Any]:
        """[token ids, logprobs of the best five at each position] of each prompt.

        tiers: what each request asks of sere; None for those that ask nothing. adapters: the folder
        of each request's LoRA adapter; None for those without.
        """
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        sampling = [
            SamplingParams(
                temperature=0,
                max_tokens=max_tokens,
                logprobs=5,
                extra_args=None if tier is None else {"sere": tier},
            )
            for tier in tiers or [None] * len(prompts)
        ]
        loras = adapters and [path and LoRARequest(path, 1, path) for path in adapters]
        requests = self.llm.generate(prompts, sampling, lora_request=loras, use_tqdm=False)
        outputs = [r.outputs[0] for r in requests]
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

    def meet(self, folder: str) -> None:
        """Wait until all data-parallel ranks are here."""
        Path(folder).mkdir(exist_ok=True)
        Path(folder, os.environ["VLLM_DP_RANK"]).touch()
        while len(list(Path(folder).iterdir())) < int(os.environ["VLLM_DP_SIZE"]):
            time.sleep(0.05)

    def capture(self) -> None:
        """From now on keep what vLLM itself sees as the routers' choice, after our wrapper."""
        for name, layer in _moe_layers(self.llm):
            taken = self.taken.setdefault(name, [])
            layer.router.set_capture_fn(lambda ids, taken=taken: taken.append(ids.tolist()))

    def captured(self) -> dict[str, list[Any]]:
        return self.taken

    def forget(self) -> bool:
        """Empty the prefix cache."""
        emptied: bool = self.llm.reset_prefix_cache()
        return emptied

    def remove(self, path: str) -> None:
        Path(path).unlink()

    def replace(self, path: str, by: str) -> None:
        """Put another file in the place of one, as `sere calibrate` and `cp` + `mv` do."""
        temporary = shutil.copy(by, f"{path}.new")
        Path(temporary).replace(path)

    def asleep(self) -> int:
        """What sleep mode of level 2 does to a model's buffers, and what waking up does (vLLM's
        GPU worker: kept on the host, unmapped, copied back); how many there are of sere's."""

        def sleep_and_wake(model: Any) -> int:
            kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
            for _, buffer in model.named_buffers():
                buffer.zero_()
            for name, buffer in model.named_buffers():
                buffer.copy_(kept[name])
            return sum(".sere." in name for name in kept)

        (count,) = self.llm.apply_model(sleep_and_wake)
        return int(count)

    def killed(self, process: str) -> str:
        """Kill the process of that name in the middle of a run: what the caller is told."""
        (victim,) = (
            child
            for child in psutil.Process().children(recursive=True)
            if process in "".join(child.cmdline())
        )
        timer = threading.Timer(1.0, victim.kill)
        timer.start()
        try:
            for _ in range(1000):
                self.generate(["add 12+34:"] * 32, 100)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "nothing"

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
