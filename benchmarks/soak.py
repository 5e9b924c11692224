"""A server under many clients that want different things, and some of which go away.

    cd benchmarks/results
    python ../soak.py --stock -o soak_stock.json
    python ../soak.py --against soak_stock.json -o soak.json

vLLM's own OpenAI server serves the demo model under S=1, on loopback. Clients ask, streaming or
not, for all tiers; some ask for what is no tier, some hang up in mid-answer. Checked: every exact
answer is the one that its prompt gets alone; malformed requests get 400 and no request 5xx; memory
of the server's processes after the first quarter, against stock vLLM's; sere's rows against vLLM's
own token counters; the server answers at the end. It stops after `--requests`, or `--seconds`,
whichever is first.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import aiohttp
import numpy as np
import psutil
from prometheus_client.parser import text_string_to_metric_families

sys.path.append(str(Path(__file__).parent.parent))

from sere.calibration.calibrate import calibrate
from sere.demo_model.tasks import examples
from sere.results import provenance
from sere.serving.server import NAME
from tests.servers import Server, openai_server

CLIENTS, PROMPTS = 16, 96
LONGEST = 96  # characters, which are tokens
KINDS = {"exact": 45, "fast": 25, "S=2": 15, "malformed": 15}
MALFORMED = ["fastest", "S=0", "S=-1", "", 3, ["exact"], "S=" + "9" * 20]
HANGS_UP_ONE_IN = 8
NOISE_MB = 40.0
"""Growth after the first quarter that is no leak, whatever stock vLLM does."""


@dataclass(frozen=True)
class Question:
    """A prompt, and how many tokens are asked for."""

    prompt: str
    max_tokens: int


@dataclass
class Log:
    """What the clients saw. reroutes: whether the server does; stock takes any tier."""

    reroutes: bool = True
    kinds: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    hung_up: int = 0
    in_stream: int = 0
    streamed: int = 0
    compared: int = 0
    memory: list[tuple[float, int, dict[str, float]]] = field(default_factory=list)
    """(seconds, requests sent, MB by process) in turn"""

    @property
    def sent(self) -> int:
        return self.kinds.total()


def questions(random: Random) -> list[Question]:
    """Of random length: one task, or several that were solved before it."""
    found = []
    for _ in range(PROMPTS):
        *solved, task = examples(
            random.randint(1, 8), seed=random.randrange(10**6), split="held_out"
        )
        before = "".join(f"{e.prompt}{e.answer}\n" for e in solved)
        room = max(LONGEST - len(task.prompt), 0)
        prompt = (before[len(before) - room :] if len(before) > room else before) + task.prompt
        found.append(Question(prompt[-LONGEST:], random.randint(2, 24)))
    return found


class Client:
    """Asks one server, and writes down what it says."""

    def __init__(self, server: Server, session: aiohttp.ClientSession, log: Log) -> None:
        self._url = f"{server.url}/v1/completions"
        self._session = session
        self._log = log

    async def answer(
        self, question: Question, tier: Any, *, stream: bool, patience: int | None = None
    ) -> tuple[int, str]:
        """(status, text); hangs up after `patience` pieces.

        vLLM checks a streaming request when its stream has begun: the status is then the code of
        the error in the stream.
        """
        body: dict[str, Any] = {
            "model": NAME,
            "prompt": question.prompt,
            "max_tokens": question.max_tokens,
            "temperature": 0,
            "stream": stream,
            "vllm_xargs": {"sere": tier},
        }
        async with self._session.post(self._url, json=body) as response:
            if response.status != 200:
                return response.status, await response.text()
            if not stream:
                return 200, (await response.json())["choices"][0]["text"]
            text, pieces = "", 0
            async for line in response.content:
                if line.startswith(b"data: {"):
                    piece = json.loads(line[6:])
                    if error := piece.get("error"):
                        self._log.in_stream += 1
                        return int(error["code"]), str(error["message"])
                    text += piece["choices"][0]["text"]
                    pieces += 1
                if patience is not None and pieces >= patience:
                    response.close()
                    self._log.hung_up += 1
                    break
            return 200, text

    async def one(self, question: Question, right: str, random: Random) -> None:
        """One random request, checked."""
        kind = random.choices(list(KINDS), list(KINDS.values()))[0]
        tier = random.choice(MALFORMED) if kind == "malformed" else kind
        stream = random.random() < 0.75
        patience = (
            random.randint(1, 6) if stream and not random.randrange(HANGS_UP_ONE_IN) else None
        )
        self._log.kinds[kind] += 1
        self._log.streamed += stream
        status, text = await self.answer(question, tier, stream=stream, patience=patience)
        self._log.statuses[status] += 1
        if status != (400 if kind == "malformed" and self._log.reroutes else 200):
            self._log.wrong.append(f"{kind} {tier!r}: {status} {text[:200]}")
        elif kind == "exact":
            self._log.compared += 1
            if text != right and (patience is None or not right.startswith(text)):
                self._log.wrong.append(f"{question}: {text!r}, alone {right!r}")


def server_memory_mb() -> dict[str, float]:
    """Resident memory of each process that this one started."""
    found: Counter[str] = Counter()
    for process in psutil.Process().children(recursive=True):
        name = "engine" if "EngineCore" in "".join(process.cmdline()) else "front end, others"
        found[name] += process.memory_info().rss / 2**20
    return {name: round(mb, 1) for name, mb in found.items()}


def counters(server: Server) -> dict[str, float]:
    """Of vLLM and of sere's first layer."""
    found: Counter[str] = Counter()
    for family in text_string_to_metric_families(server.get("/metrics")):
        for sample in family.samples:
            if sample.labels.get("layer", "0") == "0":
                row_class = sample.labels.get("row_class", "")
                found[sample.name + (f"_{row_class}" if row_class else "")] += sample.value
    wanted = {
        "sere_rows_total_fast": "rows_fast",
        "sere_rows_total_exact": "rows_exact",
        "sere_steps_total": "steps",
        "sere_active_experts_before_total": "active_before",
        "sere_active_experts_after_total": "active_after",
        "vllm:prompt_tokens_total": "prompt_tokens",
        "vllm:prefix_cache_hits_total": "cached_tokens",
        "vllm:generation_tokens_total": "generated_tokens",
        "vllm:num_requests_running": "running",
        "vllm:num_requests_waiting": "waiting",
    }
    return {short: found[name] for name, short in wanted.items()}


async def soaked(
    server: Server, requests: int, seconds: float, seed: int, *, reroutes: bool
) -> dict[str, Any]:
    """Everything between a server that has started and the result."""
    random, log = Random(seed), Log(reroutes)
    asked = questions(random)
    timeout = aiohttp.ClientTimeout(total=120)
    connector = aiohttp.TCPConnector(limit=CLIENTS)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        client = Client(server, session, log)
        right = [(await client.answer(q, "exact", stream=False))[1] for q in asked]
        before, began = counters(server), time.monotonic()

        async def work(own: Random) -> None:
            while log.sent < requests and time.monotonic() - began < seconds:
                number = own.randrange(len(asked))
                await client.one(asked[number], right[number], own)

        async def watch() -> None:
            while True:
                passed = time.monotonic() - began
                log.memory.append((round(passed, 1), log.sent, server_memory_mb()))
                await asyncio.sleep(2)

        watching = asyncio.create_task(watch())
        await asyncio.gather(*(work(Random(f"{seed} {i}")) for i in range(CLIENTS)))
        took = time.monotonic() - began
        watching.cancel()
        await asyncio.sleep(2)  # what was hung up on is taken out of the batch
        after = counters(server)
        healthy = server.get("/health") == ""
        again = [(await client.answer(q, "exact", stream=False))[1] for q in asked]
    return {
        "seconds": round(took, 1),
        "clients": CLIENTS,
        "requests": dict(log.kinds),
        "requests_sent": log.sent,
        "streamed": log.streamed,
        "hung_up": log.hung_up,
        "refused_in_stream": log.in_stream,
        "statuses": {str(status): n for status, n in sorted(log.statuses.items())},
        "exact_answers_compared": log.compared,
        "wrong": log.wrong,
        "healthy": healthy and again == right,
        "counters": accounts(before, after, log),
        "memory": growth(log),
    }


def accounts(before: dict[str, float], after: dict[str, float], log: Log) -> dict[str, Any]:
    """sere's rows beside vLLM's tokens.

    The last token of an answer is never an input, hence `rows_expected`. vLLM schedules ahead: it
    may run one row after an answer has ended, and rows of requests that were hung up on before
    their tokens were counted; so there may be more rows than expected, within `rows_allowed`.
    """
    own = {name: int(after[name] - before[name]) for name in after}
    answered = log.statuses[200]
    expected = own["prompt_tokens"] - own["cached_tokens"] + own["generated_tokens"] - answered
    allowed = expected + answered + log.hung_up * (LONGEST + 2)
    rows = own["rows_fast"] + own["rows_exact"]
    return {
        **own,
        "rows_expected": expected,
        "rows_allowed": allowed,
        "consistent": expected <= rows <= allowed
        and 0 < own["active_after"] <= own["active_before"]
        and 0 < own["steps"] <= own["rows_fast"]
        and after["running"] == after["waiting"] == 0,
    }


def growth(log: Log) -> dict[str, Any]:
    """A line through what is there after the first quarter of the requests.

    vLLM uses the blocks of its KV cache in turn, and each becomes resident when it is first used:
    a quarter should be more requests than there are blocks (4096).
    """
    kept = [(n, sum(mb.values())) for _, n, mb in log.memory if n >= log.sent / 4]
    slope = float(np.polyfit(*zip(*kept, strict=True), 1)[0])
    total = slope * (kept[-1][0] - kept[0][0])
    return {
        "mb_first": round(kept[0][1], 1),
        "mb_last": round(kept[-1][1], 1),
        "mb_per_1000_requests": round(1000 * slope, 2),
        "growth_mb": round(total, 1),
        "allowed_mb": NOISE_MB,
        "over_time": log.memory,
    }


def complaints(result: dict[str, Any]) -> list[str]:
    """What a server that can be trusted would not have done."""
    found = list(result["wrong"])
    if not result["healthy"]:
        found.append("the server does not answer as it did at the start")
    if not (result["stock"] or result["counters"]["consistent"]):
        found.append(f"counters contradict each other: {result['counters']}")
    if result["memory"]["growth_mb"] > result["memory"]["allowed_mb"]:
        found.append(f"memory grew by {result['memory']['growth_mb']} MB")
    return found


def main() -> None:
    """Soak, and keep the figures; exit status 1 if there is something to complain about."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", default="soak.json")
    parser.add_argument("-n", "--requests", type=int, default=30_000)
    parser.add_argument("--seconds", type=float, default=330)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stock", action="store_true", help="without sere, to compare memory")
    parser.add_argument(
        "--against", type=Path, help="result of --stock: memory may grow as much as there"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "sere.table"
        calibrate("demo", table, progress=False)
        sere = None if arguments.stock else {"table": str(table), "S": 1, "min_active": 1}
        with openai_server(sere) as server:
            result = asyncio.run(
                soaked(
                    server,
                    arguments.requests,
                    arguments.seconds,
                    arguments.seed,
                    reroutes=not arguments.stock,
                )
            )
    made = {"provenance": provenance.provenance(), "seed": arguments.seed, "stock": arguments.stock}
    result = {**made, **result}
    if arguments.against:
        stock = json.loads(arguments.against.read_text())["memory"]
        result["memory"]["allowed_mb"] = max(NOISE_MB, stock["growth_mb"])
    result["complaints"] = complaints(result)
    provenance.save_json(arguments.output, result)
    print(json.dumps({k: v for k, v in result.items() if k != "memory"}, indent=1))
    print({k: v for k, v in result["memory"].items() if k != "over_time"})
    if result["complaints"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
