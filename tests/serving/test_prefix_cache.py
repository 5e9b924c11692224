"""With the cache of prefixes on, what is promised stock routing is stock, bit for bit: tokens and
logprobs of the real engine, against an engine that never heard of sere and caches nothing."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from sere.demo_model.tasks import examples
from sere.serving import frontend
from tests.engines import Starting, run_engine
from tests.servers import Server
from tests.serving.test_telemetry import value

pytestmark = pytest.mark.engine

SAID = [e.prompt for e in examples(32, seed=3, split="held_out")]
SYSTEM = " ".join(SAID[:9])  # longer than two blocks
BLOCK, TOKENS = 32, 40
OPTIONS = {
    "block_size": BLOCK,
    "max_model_len": 512,
    "num_gpu_blocks_override": 56,
    "disable_log_stats": False,
}

# By chat the tier of each turn; the policy is S=1, S=2 in the third turn, stock in the last.
TIERS: list[list[Any]] = [
    [None, None, None, None],
    ["exact", "exact", "exact", None],
    [None, "exact", "S=3", "exact"],
    ["exact", None, "exact", None],
]
S1 = {"S": 1, "min_active": 1}  # also where a request is alone
POOL = {**S1, "pool": 0.375}
SWITCHES = {"2": {"S": 2}, "3": None}
CHATS = [
    [[SYSTEM * (turn == 0) + SAID[9 + 4 * chat + turn], tiers[turn]] for turn in range(4)]
    for chat, tiers in enumerate(TIERS)
]
PROMISED = [
    (chat, turn)
    for chat in range(4)
    for turn in range(4)
    if TIERS[chat][turn] == "exact" or turn == 3
]

# Next turns, each of another fast answer: its own is the first that could find the answer's blocks.
FOUR = {"prompt": SYSTEM + SAID[0], "max_tokens": TOKENS, "temperature": 1.0, "seed": 0, "n": 4}
NEXT: dict[str, dict[str, Any]] = {
    "logprobs": {"logprobs": 20},
    "n=4": {"temperature": 1.0, "seed": 1, "n": 4},
    "structured output": {"regex": "[0-9]{6}"},
}
TURN = {"prompt": SAID[1], "max_tokens": 6, "tier": "exact"}
# Each pair is forced to say the same, and there is no room for all of them.
CROWD = [
    {"prompt": SYSTEM + one, "tier": tier, "max_tokens": 150, "allowed_token_ids": [30]}
    for one in SAID[:6]
    for tier in (None, "exact")
]
# Several, as a row that is alone has nobody's experts to move to.
SESSIONS = [
    [[SYSTEM + SAID[i], "exact"], [SAID[i + 1], None], [SAID[i + 2], "exact"], [SAID[i + 3], None]]
    for i in range(4)
]
# The same, of turns that are independent from the second on (the other two sessions stay fast), and
# each of those turns as one request beside others.
OWN = [
    [[SYSTEM + SAID[i], None], *([SAID[i + n], "independent" if i < 2 else None] for n in (1, 2))]
    for i in range(4)
]
OWN_AT_ONCE = [
    {"like": [8, turn], "tier": "independent", "max_tokens": TOKENS} for turn in (4, 5, 8, 9)
]


@pytest.fixture(scope="module")
def alone() -> Starting:
    """vLLM alone, which starts while the other engine does."""
    return Starting(options=OPTIONS)


@pytest.fixture(scope="module")
def served(table_path: Path, alone: Starting) -> dict[str, Any]:
    """What the engine that re-routes answered. Its scheduler is in a process of its own, in which
    vLLM finds the plug-in by its entry point."""
    nexts = [{**TURN, **more, "after": [4, 0, i]} for i, more in enumerate(NEXT.values())]
    steps: dict[str, list[Any]] = {
        "first": ["rpc", "sere_policy", S1],
        "chats": ["chat", CHATS, TOKENS, SWITCHES],  # the first four asked
        "told": ["rpc", "sere_telemetry"],
        "on": ["rpc", "sere_policy", S1],
        "four": ["ask", [FOUR]],
        "next": ["ask", nexts],
        "beam": ["next_beam", SAID[1], [4, 0, 3], 6],
        "crowd": ["ask", CROWD],
        "preempted": ["counted", "vllm:num_preemptions"],
        "session": ["sessions", SESSIONS, TOKENS],
        "pool": ["rpc", "sere_policy", POOL],
        "own": ["sessions", OWN, TOKENS],
        "own, at once": ["ask", [*OWN_AT_ONCE, {**TURN, "tier": "fast"}]],
        "on again": ["rpc", "sere_policy", S1],
        "behind": ["ask", [{**TURN, "after": [7, 12 + i, 0]} for i in range(4)]],
        "all rows": ["failing", "rpc", "sere_policy", {"S": 1, "rows": "all"}],
        "alive": ["ask", [TURN]],
    }
    options = {**OPTIONS, "enable_prefix_caching": True}
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    sere = {"table": str(table_path), **POOL}
    answers = run_engine(list(steps.values()), sere=sere, options=options, env=env)
    return dict(zip(steps, answers, strict=True))


@pytest.fixture(scope="module")
def stock(served: dict[str, Any], alone: Starting) -> dict[str, Any]:
    """What vLLM alone answers to the same prompts."""
    turns = [
        {"prompt": served["chats"][chat][turn]["prompt"], "max_tokens": TOKENS}
        for chat in range(4)
        for turn in range(4)
    ]
    nexts = [
        {"max_tokens": 6, **more, "prompt": turn["prompt"]}
        for more, turn in zip(NEXT.values(), served["next"], strict=True)
    ]
    crowd = [{**asked, "tier": None} for asked in CROWD]
    session = [{"prompt": turn["prompt"], "max_tokens": TOKENS} for turn in served["session"]]
    behind = [{"prompt": turn["prompt"], "max_tokens": 6} for turn in served["behind"]]
    steps: dict[str, list[Any]] = {
        "chats": ["ask", turns],
        "next": ["ask", nexts],
        "beam": ["next_beam", served["beam"][0], None, 6],
        "crowd": ["ask", crowd],
        "session": ["ask", session],
        "behind": ["ask", behind],
    }
    return dict(zip(steps, alone.run(list(steps.values())), strict=True))


def test_every_turn_that_promises_stock_is_stock(
    served: dict[str, Any], stock: dict[str, Any]
) -> None:
    """Whoever spoke before, and whatever the policy was then."""
    for chat, turn in PROMISED:
        assert served["chats"][chat][turn]["answers"] == stock["chats"][4 * chat + turn]["answers"]


def test_prompts_of_fast_turns_are_stock_too(served: dict[str, Any], stock: dict[str, Any]) -> None:
    """So their first tokens are; the rest of their answers is not, or nothing was tested."""
    changed = 0
    for chat in range(4):
        for turn in range(4):
            ids, logprobs = served["chats"][chat][turn]["answers"][0]
            exact_ids, exact_logprobs = stock["chats"][4 * chat + turn]["answers"][0]
            assert (ids[0], logprobs[0]) == (exact_ids[0], exact_logprobs[0])
            changed += (chat, turn) not in PROMISED and logprobs != exact_logprobs
    assert changed == 16 - len(PROMISED)


def test_prompts_and_exact_answers_are_found_again(served: dict[str, Any]) -> None:
    """By the next turn, whatever its tier: these blocks, all of them, and no others."""
    for chat, turns in enumerate(served["chats"]):
        for turn in range(1, 4):
            before = turns[turn - 1]
            kept = len(before["prompt"])
            if TIERS[chat][turn - 1] == "exact":
                kept += TOKENS - 1
            assert turns[turn]["cached"] == kept // BLOCK * BLOCK > 0


def test_what_is_prefilled_again_is_counted(served: dict[str, Any]) -> None:
    again = 0
    for chat, turns in enumerate(served["chats"]):
        for turn in range(3):
            if TIERS[chat][turn] != "exact":
                prompt = len(turns[turn]["prompt"])
                again += (prompt + TOKENS) // BLOCK - prompt // BLOCK
    assert served["told"][0]["prefix_tokens_prefilled_again"] == again * BLOCK > 0


@pytest.mark.parametrize("which", NEXT)
def test_a_turn_of_any_kind_is_stock(
    which: str, served: dict[str, Any], stock: dict[str, Any]
) -> None:
    """Behind one of four fast answers to one prompt, which all of them find; four that are asked
    at once also find what the first of them computes."""
    index = list(NEXT).index(which)
    found, alone = served["next"][index], stock["next"][index]
    assert found["answers"] == alone["answers"]
    alike = len(found["answers"])
    assert alike == NEXT[which].get("n", 1)
    shared = len(served["four"][0]["prompt"]) if alike == 1 else len(found["prompt"]) - 1
    assert found["cached"] == shared // BLOCK * BLOCK > 0


def test_beam_search_behind_a_fast_answer_is_stock(
    served: dict[str, Any], stock: dict[str, Any]
) -> None:
    assert served["beam"] == stock["beam"]


def test_a_preempted_exact_request_goes_on_with_blocks_of_its_own(
    served: dict[str, Any], stock: dict[str, Any]
) -> None:
    assert served["preempted"] > 0
    changed = 0
    for asked, found, alone in zip(CROWD, served["crowd"], stock["crowd"], strict=True):
        if asked["tier"] == "exact":
            assert found["answers"] == alone["answers"]
        else:
            changed += found["answers"] != alone["answers"]
    assert changed


def test_a_session_is_stock_as_soon_as_it_is_exact(
    served: dict[str, Any], stock: dict[str, Any]
) -> None:
    """Its fast turns then count as never computed, and nobody else finds them."""
    same = [
        found["answers"] == alone["answers"]
        for found, alone in zip(served["session"], stock["session"], strict=True)
    ]
    assert all(same[:4] + same[8:12]) and not any(same[4:8])
    for found, alone in zip(served["behind"], stock["behind"], strict=True):
        assert found["answers"] == alone["answers"]


def test_a_session_is_its_own_as_soon_as_it_is_independent(served: dict[str, Any]) -> None:
    """As the whole in one request beside others would be: nothing is left of its fast turns."""
    turns = [served["own"][turn] for turn in (4, 5, 8, 9)]
    for turn, whole in zip(turns, served["own, at once"], strict=False):
        assert turn["prompt"] == whole["prompt"]
        assert turn["answers"] == whole["answers"]


def test_a_live_engine_refuses_to_reroute_prompts(served: dict[str, Any]) -> None:
    """They would be found by exact requests. The refusal ends nothing."""
    assert "--no-enable-prefix-caching" in served["all rows"]
    assert served["alive"][0]["answers"]


@pytest.mark.modes
def test_a_turn_over_http_is_stock(server: Server) -> None:
    """Compared with the same turn under a `cache_salt`, which finds nothing."""
    prompts = [" ".join(SAID[i : i + 3]) for i in range(8)]
    fast = server.complete(prompts, TOKENS, ignore_eos=True, return_token_ids=True)["choices"]
    turns = [one["prompt_token_ids"] + one["token_ids"] + [30] for one in fast]
    asked = {"max_tokens": 6, "logprobs": 5, "vllm_xargs": {"sere": "exact"}}
    asyncio.run(asyncio.sleep(frontend.FRESH_S))
    before = server.get("/metrics")
    found, alone = (server.complete(turns, **asked, **more) for more in ({}, {"cache_salt": "own"}))
    for one, other in zip(found["choices"], alone["choices"], strict=True):
        assert one["logprobs"] == other["logprobs"]
    asyncio.run(asyncio.sleep(frontend.FRESH_S))
    after, name = server.get("/metrics"), "sere_prefix_tokens_prefilled_again_total"
    again = 0
    for one in fast:
        prompt = len(one["prompt_token_ids"])
        again += (prompt + TOKENS) // BLOCK - prompt // BLOCK
    assert value(after, name, engine=0) - value(before, name, engine=0) == again * BLOCK > 0
