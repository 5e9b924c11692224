"""One real vLLM engine in a process of its own: read a job as JSON, print its results as JSON.

Run by `tests/engines.py`, and by hand. A job holds `options` for `vllm.LLM` and
`steps`, which may also follow in a line of their own, once the engine has started. Each is a list:
["generate", prompts, max_tokens, tiers, adapters], ["ask", requests],
["chat", chats, max_tokens, switches], ["next_beam", prompt, after, tokens],
["sessions", sessions, tokens], ["refused", tier], ["failing", step...],
["beam", prompts, width, tokens, tier], ["beam_online", ...], ["made_elsewhere", tier],
["said"],
["rpc", method, args...], ["counted", name], ["meet", folder] (all data-parallel ranks), a mishap:
["watch", table, tokens], ["watched", path],
["remove", path], ["replace", path, by], ["asleep"], ["killed", process], or a check that needs the
model in this process: ["capture"], ["captured"], ["addresses"].
"""

from __future__ import annotations

import asyncio
import atexit
import hashlib
import io
import json
import logging
import multiprocessing
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

RESULT = "RESULT "
SAID: list[tuple[str, str, str]] = []


class Steps:
    """What a job may ask of the engine."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm
        self.taken: dict[str, list[Any]] = {}
        self.asked: list[list[dict[str, Any]]] = []

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
        return [[list(out.token_ids), _plain(out.logprobs)] for out in outputs]

    def ask(self, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """A batch in which requests differ: prompt (text or ids), after, tier, regex, and the rest
        for vLLM's `SamplingParams`. Of each: prompt (ids), cached (tokens that were found in the
        cache), answers (token ids and logprobs, as `generate` has them).

        after: [ask, request, answer] of which this is the next turn, counted from 0. like: [ask,
        request] whose prompt it has.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import StructuredOutputsParams

        prompts, sampling = [], []
        for request in requests:
            more = dict(request)
            if "like" in more:
                which, turn = more.pop("like")
                more["prompt"] = self.asked[which][turn]["prompt"]
            ids = self._prompt(more.pop("prompt"), more.pop("after", None))
            prompts.append({"prompt_token_ids": ids})
            tier, regex = more.pop("tier", None), more.pop("regex", None)
            if regex is not None:
                more["structured_outputs"] = StructuredOutputsParams(regex=regex)
            more = {"temperature": 0, "logprobs": 5, "ignore_eos": True, **more}
            sampling.append(SamplingParams(extra_args=tier and {"sere": tier}, **more))
        found = self.llm.generate(prompts, sampling, use_tqdm=False)
        self.asked.append(
            [
                {
                    "prompt": list(r.prompt_token_ids),
                    "cached": r.num_cached_tokens,
                    "answers": [[list(o.token_ids), _plain(o.logprobs)] for o in r.outputs],
                }
                for r in found
            ]
        )
        return self.asked[-1]

    def _prompt(self, prompt: str | list[int], after: list[int] | None = None) -> list[int]:
        if isinstance(prompt, str):
            encode = self.llm.get_tokenizer()
            prompt = encode(prompt, add_special_tokens=False)["input_ids"]
        if after is None:
            return list(prompt)
        before = self.asked[after[0]][after[1]]
        return before["prompt"] + before["answers"][after[2]][0] + list(prompt)

    def chat(
        self,
        chats: list[list[tuple[str, Any]]],
        max_tokens: int,
        switches: dict[str, Any] | None = None,
    ) -> list[list[dict[str, Any]]]:
        """Turns of several chats, the n-th of all as one batch: what `ask` gives of each chat and
        turn. chats: text and tier of each turn; switches: the policy from a turn on."""
        said: list[list[int]] = [[] for _ in chats]
        answers: list[list[dict[str, Any]]] = [[] for _ in chats]
        for turn in range(len(chats[0])):
            if switches and str(turn) in switches:
                self.rpc("sere_policy", switches[str(turn)])
            for ids, chat in zip(said, chats, strict=True):
                ids += self._prompt(chat[turn][0])
            found = self.ask(
                [
                    {"prompt": ids, "tier": chat[turn][1], "max_tokens": max_tokens}
                    for ids, chat in zip(said, chats, strict=True)
                ]
            )
            for ids, own, one in zip(said, answers, found, strict=True):
                ids += one["answers"][0][0]
                own.append(one)
        return answers

    def next_beam(self, prompt: str | list[int], after: list[int] | None, tokens: int) -> Any:
        """The prompt's ids (see `ask`), and of its two best beams token ids and summed logprobs."""
        from vllm.sampling_params import BeamSearchParams

        ids = self._prompt(prompt, after)
        parameters = BeamSearchParams(beam_width=2, max_tokens=tokens, ignore_eos=True)
        (found,) = self.llm.beam_search([{"prompt_token_ids": ids}], parameters)
        return [ids, [[s.tokens, s.cum_logprob] for s in found.sequences]]

    def sessions(self, sessions: list[list[tuple[str, Any]]], tokens: int) -> list[dict[str, Any]]:
        """Streaming sessions side by side, as a front end sends them: what `ask` gives, of the
        first turn of all, then the next (all that was said before is part of a prompt). sessions:
        text and tier of each turn."""
        told: list[dict[str, Any]] = []
        said: list[list[int]] = [[] for _ in sessions]
        for turn in zip(*sessions, strict=True):
            for number, (text, tier) in enumerate(turn):
                said[number] += self._prompt(text)
                self._say(number, self._prompt(text), tokens, tier)
            for ids, answer in zip(said, self._collect(len(sessions), tokens), strict=True):
                told.append({"prompt": list(ids), "answers": [answer]})
                ids += answer[0][:-1]  # a session drops its last token
        for number in range(len(sessions)):
            self._say(number, [0], tokens, None, resumable=False)
        self.asked.append(told)
        return told

    def _say(
        self, number: int, ids: list[int], tokens: int, tier: Any, *, resumable: bool = True
    ) -> None:
        from vllm import SamplingParams

        engine = self.llm.llm_engine
        asked = SamplingParams(
            temperature=0,
            max_tokens=tokens,
            logprobs=5,
            ignore_eos=True,
            extra_args=tier and {"sere": tier},
        )
        prompt = {"prompt_token_ids": ids}
        request = engine.input_processor.process_inputs(
            str(number), prompt, asked, ("generate",), resumable=resumable
        )
        engine.engine_core.add_request(request)

    def _collect(self, sessions: int, tokens: int) -> list[list[Any]]:
        """Of each session so many token ids, and their logprobs."""
        found: list[list[Any]] = [[[], []] for _ in range(sessions)]
        while any(len(ids) < tokens for ids, _ in found):
            for output in self.llm.llm_engine.engine_core.get_output().outputs:
                ids, logprobs = found[int(output.request_id)]
                ids += output.new_token_ids
                scored = output.new_logprobs
                for row in zip(scored.logprob_token_ids, scored.logprobs, strict=True):
                    pairs = zip(*(values.tolist() for values in row), strict=True)
                    logprobs.append({str(token): value for token, value in pairs})
        return found

    def counted(self, name: str) -> int:
        """One of vLLM's own counters (of an engine with `disable_log_stats` false)."""
        return sum(metric.value for metric in self.llm.get_metrics() if metric.name == name)

    def refused(self, tier: Any) -> str:
        """What the engine says to a request for this tier; the engine must live on."""
        try:
            self.generate(["1+1>"], 1, [tier])
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "accepted"

    def beam(
        self, prompts: list[str], width: int, tokens: int, tier: Any = None, *, online: bool = False
    ) -> list[Any]:
        """[token ids, sum of their logprobs] of the beams of each prompt, as `LLM.beam_search` or
        as an API server finds them; what is said to a search that is refused."""
        from vllm.exceptions import VLLMValidationError
        from vllm.sampling_params import BeamSearchParams

        asked = BeamSearchParams(beam_width=width, max_tokens=tokens)
        asked.extra_args = None if tier is None else {"sere": tier}
        try:
            if online:
                return asyncio.run(_search_online(self.llm, prompts, asked))
            found = self.llm.beam_search([{"prompt": prompt} for prompt in prompts], asked)
        except VLLMValidationError as error:
            return [str(error)]
        return [[[b.tokens, b.cum_logprob] for b in one.sequences] for one in found]

    def beam_online(self, *arguments: Any) -> list[Any]:
        return self.beam(*arguments, online=True)

    def made_elsewhere(self, tier: Any) -> list[str]:
        """What the engine says to requests for this tier that another front end made: where they
        are handed in, and where its core takes them."""
        from vllm import SamplingParams

        engine, said = self.llm.llm_engine, []
        for take in (
            lambda r: engine.add_request(r.request_id, r, r.sampling_params),
            lambda r: engine.engine_core.add_request(r),
        ):
            request = engine.input_processor.process_inputs(
                "made",
                {"type": "token", "prompt_token_ids": [5]},
                SamplingParams(max_tokens=1),
                ("generate",),
            )
            request.sampling_params.extra_args = {"sere": tier}
            try:
                take(request)
                said.append("accepted")
            except Exception as error:
                said.append(f"{type(error).__name__}: {error}")
        return said

    def said(self) -> list[tuple[str, str, str]]:
        """(level, logger, message) of what was logged in this process since before the start."""
        return list(SAID)

    def failing(self, name: str, *arguments: Any) -> str:
        """What a step says that is to fail; the engine must live on."""
        try:
            getattr(self, name)(*arguments)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "nothing"

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

    def watch(self, table: str, tokens: int) -> None:
        """From now on measure the experts on all rows of prompts, until there are so many tokens,
        as an engine with `{"auto": {"traffic": ...}}` does from its start; table: of this model."""
        self.llm.collective_rpc(_watch, args=(table, tokens))

    def watched(self, path: str) -> list[str]:
        """Wait for the table that an engine makes of what it was asked, and write it to the path;
        what each rank says of it."""
        while self.rpc("sere_telemetry")[0]["inert"].startswith("the engine measures"):
            self.generate(["1+1>"], 1)
        made = [bytes(table) for table in self.rpc("sere_table")]
        Path(path).write_bytes(made[0])
        return [hashlib.sha256(table).hexdigest() for table in made]

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


async def _search_online(llm: Any, prompts: list[str], asked: Any) -> list[Any]:
    """The searches of all prompts at once, each beside one that asks for nothing."""
    from vllm.entrypoints.generate.beam_search.online import BeamSearchOnlineMixin
    from vllm.sampling_params import BeamSearchParams

    class Client:
        """As much of vLLM's asynchronous engine as a search calls."""

        vllm_config = llm.llm_engine.vllm_config
        input_processor = llm.llm_engine.input_processor

        async def generate(self, prompt: Any, params: Any, name: str, **_: Any) -> Any:
            await asyncio.sleep(0)  # others come between
            llm.llm_engine.add_request(name, prompt, params)
            while llm.llm_engine.has_unfinished_requests():
                outputs = llm.llm_engine.step()
            yield outputs[0]

    class Server(BeamSearchOnlineMixin):
        renderer = llm.llm_engine.renderer
        engine_client = Client()

    async def search(i: int, params: Any) -> list[Any]:
        ids = Server.renderer.get_tokenizer().encode(prompts[i])
        prompt = {"type": "token", "prompt_token_ids": ids}
        (found,) = [one async for one in Server().beam_search(prompt, str(id(params)), params)]
        return [[list(ids) + list(b.token_ids), b.cumulative_logprob] for b in found.outputs]

    plain = BeamSearchParams(beam_width=asked.beam_width, max_tokens=asked.max_tokens)
    searches = [search(i, params) for i in range(len(prompts)) for params in (asked, plain)]
    return list(await asyncio.gather(*searches))


def _plain(logprobs: list[Any]) -> list[dict[str, float]]:
    return [{str(t): lp.logprob for t, lp in position.items()} for position in logprobs]


def _watch(worker: Any, table: str, tokens: int) -> None:
    from sere.serving.auto import Traffic
    from sere.serving.traffic import Watched
    from sere.table import Table

    asked = Traffic(share=1, rows=tokens, tokens=tokens, stable=1)
    worker.sere_watch(Watched(asked, "frobenius", None, Table.load(table).fingerprint, {}))


def _moe_layers(llm: Any) -> list[tuple[str, Any]]:
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    found: list[tuple[str, Any]] = []
    llm.apply_model(
        lambda model: found.extend(
            (m.layer_name, m) for m in model.modules() if isinstance(m, MoERunner)
        )
    )
    return found


def _answers(options: dict[str, Any], next_steps: Callable[[], str]) -> str:
    """Results as JSON; the steps (also JSON) are asked for once the engine has started."""
    make = logging.getLogRecordFactory()

    def kept(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        if len(SAID) < 1000:
            SAID.append((record.levelname, record.name, record.getMessage()))
        return record

    logging.setLogRecordFactory(kept)
    from vllm import LLM

    steps = Steps(LLM(**options))
    asked = json.loads(next_steps())
    return json.dumps([getattr(steps, name)(*arguments) for name, *arguments in asked])


def serve(
    options: dict[str, Any],
    variables: dict[str, str],
    paths: list[str],
    log: str,
    pipe: Connection,
    spawns: bool,
) -> None:
    """The engine in a fork of a process that has imported vLLM and nothing else (tests/engines.py):
    takes steps from `pipe` and answers there.

    variables: the whole environment. paths: further folders to import from. log: the file for all
    that is printed. spawns: whether what it starts imports vLLM for itself.
    """
    _settle(variables, log, log, spawns=spawns)
    sys.path[:0] = paths
    pipe.send(_answers(options, pipe.recv))
    atexit._run_exitfuncs()  # a forked process runs none by itself: engines end their children so


def execute(
    code: str, arguments: list[str], variables: dict[str, str], given: str, out: str, errors: str
) -> None:
    """Like `serve`, of any program: its source, and what stands in `sys.argv` and on stdin."""
    _settle(variables, out, errors)
    sys.argv, sys.stdin = ["-c", *arguments], io.StringIO(given)
    try:
        exec(code, {"__name__": "__main__"})
    finally:
        atexit._run_exitfuncs()


def _settle(variables: dict[str, str], out: str, errors: str, *, spawns: bool = False) -> None:
    from tests.forked import fork_what_is_spawned, settle

    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    settle(variables, out, errors)
    if not spawns:
        fork_what_is_spawned()


def main() -> None:
    job = json.loads(sys.stdin.readline())
    given = json.dumps(job["steps"]) if "steps" in job else None
    print(RESULT + _answers(job["options"], lambda: given or sys.stdin.readline()), flush=True)


if __name__ == "__main__":
    main()
