"""Who finds whose blocks: vLLM's own requests, hashes and cache managers, without a model. And
which caches and stores are refused."""

from __future__ import annotations

from collections.abc import Callable
from inspect import unwrap
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sere.policy import Policy
from sere.serving import admission, prefix_cache, reuse
from sere.serving.prefix_cache import Prefixes
from sere.serving.session import ServingError
from sere.serving.tiers import EXACT, FAST

BLOCK = 4
PROMPT, ANSWER = list(range(10)), list(range(50, 60))  # two full blocks, then three that are mixed


class Engine:
    """As much of an engine as is needed to admit requests and to find their blocks."""

    def __init__(self, kinds: str = "f", rows: str = "decode", **settings: Any) -> None:
        """kinds: cache groups, f: full attention, s: sliding window, m: mamba."""
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_manager import KVCacheManager
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.engine.core import EngineCore

        prefix_cache._install()
        prefix_cache._install_in_events()
        init_none_hash(sha256)
        self.core = object.__new__(EngineCore)
        self.core.mm_receiver_cache = None
        self.core.request_block_hasher = get_request_block_hasher(BLOCK, sha256)
        self.core.scheduler = SimpleNamespace(hash_block_size=BLOCK)
        self.core.model_executor = SimpleNamespace(collective_rpc=lambda *_: [{"policy": None}])
        known = SimpleNamespace(default=FAST, policy=Policy(rows=rows), shadow=None)
        self.prefixes = Prefixes(SimpleNamespace(**{**vars(known), **settings}), 100)
        self.config = SimpleNamespace(
            compilation_config=SimpleNamespace(),
            additional_config={"sere": {}},
            model_config=SimpleNamespace(hf_config=None),  # where requests are checked, too
        )
        self.config.compilation_config._sere_prefixes = self.prefixes
        self.core.vllm_config = self.config
        groups = _groups(kinds)
        self.manager = KVCacheManager(groups, 512, BLOCK, BLOCK, enable_kv_cache_events=True)

    def admit(self, tier: Any, prompt: list[int], name: str = "any") -> Any:
        from vllm import SamplingParams
        from vllm.v1.engine import EngineCoreRequest

        params = SamplingParams(extra_args=tier and {"sere": tier})
        none = dict.fromkeys(
            ("mm_features", "pooling_params", "lora_request", "data_parallel_rank")
        )
        request = EngineCoreRequest(
            request_id=name,
            prompt_token_ids=prompt,
            sampling_params=params,
            arrival_time=0.0,
            cache_salt=None,
            **none,
        )
        return self.core.preprocess_add_request(request)[0]

    def found(self, tier: Any, prompt: list[int]) -> int:
        """How many tokens of a prompt a request would find."""
        found: int = self.manager.get_computed_blocks(self.admit(tier, prompt))[1]
        return found

    def prefill(self, request: Any) -> int:
        """Compute all tokens that are there, a block at a time; how many were found."""
        blocks, found, _ = self.manager.get_computed_blocks(request)
        hit: tuple[Any, ...] = (found, blocks)
        done = found
        while done < request.num_tokens:
            new = min(BLOCK, request.num_tokens - done)
            assert self.manager.allocate_slots(request, new, *hit) is not None
            done, hit = done + new, ()
            request.num_computed_tokens = done
        return found

    def decode(self, request: Any, tokens: list[int]) -> None:
        for token in tokens:
            request.append_output_token_ids(token)
            assert self.manager.allocate_slots(request, 1) is not None
            request.num_computed_tokens += 1

    def preempt(self, request: Any) -> None:
        self.manager.free(request)
        request.num_computed_tokens = 0

    def serve(self, tier: Any, prompt: list[int], answer: list[int], name: str = "any") -> int:
        """One request from first to last; how many tokens of its prompt were found."""
        request = self.admit(tier, prompt, name)
        found = self.prefill(request)
        self.decode(request, answer)
        self.manager.free(request)
        return found


def _groups(kinds: str) -> Any:
    from vllm.v1.kv_cache_interface import (
        FullAttentionSpec,
        KVCacheConfig,
        KVCacheGroupSpec,
        MambaSpec,
        SlidingWindowSpec,
    )

    attention = {"num_kv_heads": 1, "head_size": 4, "dtype": torch.float32}
    specs = {
        "f": FullAttentionSpec(BLOCK, **attention),
        "s": SlidingWindowSpec(BLOCK, **attention, sliding_window=2 * BLOCK),
        "m": MambaSpec(BLOCK, shapes=((4, 4),), dtypes=(torch.float32,), mamba_cache_mode="align"),
    }
    return KVCacheConfig(100, [], [KVCacheGroupSpec([kind], specs[kind]) for kind in kinds])


@pytest.mark.parametrize("kinds", ["f", "fs", "fm"])
@pytest.mark.parametrize(("tier", "prefix"), [("fast", 8), ("S=2", 8), (None, 8), ("exact", 20)])
def test_fast_answers_are_found_by_nobody_exact_ones_and_prompts_by_all(
    tier: Any, prefix: int, kinds: str
) -> None:
    engine = Engine(kinds)
    engine.serve(tier, PROMPT, ANSWER)
    for other in ("exact", "S=2", None):
        assert engine.found(other, [*PROMPT, *ANSWER, 70, 71]) == prefix


def test_a_preempted_request_finds_its_own_again_and_no_other_does() -> None:
    engine = Engine()
    fast, other, exact = (engine.admit(t, PROMPT, str(t)) for t in ("fast", "S=2", "exact"))
    for request in (fast, other, exact):
        engine.prefill(request)
        engine.decode(request, ANSWER)
    hashes = [request.block_hashes for request in (fast, other, exact)]
    assert hashes[0][:2] == hashes[1][:2] == hashes[2][:2]
    assert len({one for own in hashes for one in own[2:]}) == 9
    assert {len(one) for own in hashes for one in own} == {32}  # stores want them of one length
    for request in (fast, other, exact):
        engine.preempt(request)
        assert engine.prefill(request) == 16  # all full blocks but one: a token must be computed


def test_what_is_prefilled_again_is_counted_once() -> None:
    engine = Engine()
    engine.serve("fast", PROMPT, ANSWER)
    assert engine.prefixes.again == 0
    engine.serve("exact", PROMPT + ANSWER + [70], [])
    engine.serve("exact", PROMPT + ANSWER + [71], [])
    assert engine.prefixes.again == 12
    (told, *_) = engine.core.collective_rpc("sere_telemetry", None, (), None)
    assert told == {"policy": None, "prefix_tokens_prefilled_again": 12}


def test_what_is_counted_takes_no_more_memory_than_there_are_blocks() -> None:
    engine = Engine()
    for first in range(0, 1000, 10):
        engine.serve("fast", [first, *PROMPT], ANSWER)
    assert len(engine.prefixes._answers) == 100


def test_the_default_tier_decides_for_those_that_ask_nothing() -> None:
    engine = Engine(default=EXACT)
    engine.serve(None, PROMPT, ANSWER)
    assert engine.serve("exact", PROMPT + ANSWER, []) == 16
    engine.serve({"S": "nonsense"}, [9, *PROMPT], ANSWER)
    assert engine.serve("exact", [9, *PROMPT, *ANSWER], []) == 8


# --- prompts that are re-routed -------------------------------------------------------------------


def test_with_all_rows_fast_requests_share_among_themselves_until_a_policy_is_set() -> None:
    engine = Engine(rows="all")
    turn = PROMPT + ANSWER
    assert [engine.serve(t, turn, []) for t in ("fast", "exact", "fast", "exact")] == [0, 0, 16, 16]
    engine.core.collective_rpc("sere_policy", None, (None,), None)
    assert [engine.serve(tier, turn, []) for tier in ("fast", "exact", "fast")] == [0, 16, 16]


def test_with_all_rows_and_the_shadow_check_they_share_nothing() -> None:
    engine = Engine(rows="all", shadow="on")
    assert [engine.serve("fast", PROMPT, []) for _ in range(2)] == [0, 0]


# --- sessions -------------------------------------------------------------------------------------


def test_a_session_that_is_cut_short_and_hashed_anew_stays_keyed() -> None:
    """vLLM takes a session's last token back, and 0.33 with drafts hashes all of it again."""
    engine = Engine()
    fast, exact = (engine.admit(tier, PROMPT) for tier in ("fast", "exact"))
    for request in (fast, exact):
        request.append_output_token_ids(ANSWER)
        del request._all_token_ids[15:], request.block_hashes[15 // BLOCK :]
        request.append_output_token_ids(ANSWER)
    assert fast.block_hashes[:2] == exact.block_hashes[:2]
    assert not set(fast.block_hashes[2:]) & set(exact.block_hashes[2:])
    before = list(fast.block_hashes)
    fast.block_hashes.clear()
    fast.update_block_hashes()
    assert fast.block_hashes == before


# --- KV events ------------------------------------------------------------------------------------


def test_events_tell_keyed_blocks_apart() -> None:
    engine = Engine()
    engine.serve("fast", PROMPT, ANSWER)
    keys = [key for event in engine.manager.take_events() for key in event.extra_keys]
    assert keys[:2] == [None, None]
    assert len(keys) == 5 and len(set(keys[2:])) == 1 and len(keys[2][0]) == 32
    engine.serve("exact", PROMPT, ANSWER)
    keys = [key for event in engine.manager.take_events() for key in event.extra_keys or [None]]
    assert set(keys) == {None}


# --- what start-up says ---------------------------------------------------------------------------


@pytest.mark.parametrize("rows", ["decode", "all"])
def test_the_self_check_passes(rows: str) -> None:
    engine = Engine(rows=rows)
    prefix_cache.self_check(engine.config, engine.prefixes)


def test_the_self_check_passes_where_no_request_may_be_exact() -> None:
    """It asks for what every engine gives."""
    engine = Engine()
    admission.wrap_engine()
    engine.config.compilation_config._sere_cap = FAST
    prefix_cache.self_check(engine.config, engine.prefixes)


def test_the_self_check_notices_requests_that_come_in_past_us(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = Engine()
    core = type(engine.core)
    monkeypatch.setattr(core, "preprocess_add_request", unwrap(core.preprocess_add_request))
    with pytest.raises(ServingError, match="start with --no-enable-prefix-caching"):
        prefix_cache.self_check(engine.config, engine.prefixes)


def _config(connector: str | None, caching: bool = True, **more: Any) -> Any:
    from vllm.config import KVTransferConfig

    transfer = connector and KVTransferConfig(kv_connector=connector, kv_role="kv_both", **more)
    cache = SimpleNamespace(enable_prefix_caching=caching)
    return SimpleNamespace(cache_config=cache, kv_transfer_config=transfer)


def _several(*names: str) -> Any:
    children = [{"kv_connector": name, "kv_role": "kv_both"} for name in names]
    return _config("MultiConnector", kv_connector_extra_config={"connectors": children})


@pytest.mark.parametrize(
    "make",
    [
        lambda: _config("LMCacheConnectorV1"),
        lambda: _config("HF3FSKVConnector", caching=False),
        lambda: _several("NixlConnector", "LMCacheMPConnector"),
        lambda: _config("NixlConnector", kv_connector_module_path="elsewhere"),
    ],
)
def test_connectors_that_find_by_tokens_are_refused(make: Callable[[], Any]) -> None:
    reason = reuse.obstacle_to_reuse(make())
    assert reason and "may find blocks by their tokens alone; start without it" in reason


@pytest.mark.parametrize(
    "make",
    [
        lambda: _config(None),
        lambda: _config(None, caching=False),
        *(lambda name=name: _config(name) for name in reuse.BY_HASH + reuse.BY_REQUEST),
        lambda: _several("NixlConnector", "OffloadingConnector"),
    ],
)
def test_others_are_not(make: Callable[[], Any]) -> None:
    assert reuse.obstacle_to_reuse(make()) is None


def test_answers_are_not_fetched_as_prompts() -> None:
    extra = {"kv_connector_extra_config": {"bidirectional_kv_xfer": True}}
    reason = reuse.obstacle_to_reuse(_config("NixlConnector", **extra))
    assert reason and "remove bidirectional_kv_xfer" in reason


def test_a_vllm_that_cannot_tell_blocks_apart_caches_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reuse, "lacking", lambda feature: f"vLLM lacks {feature}")
    assert reuse.obstacle_to_reuse(_config(None, caching=False)) is None
    assert "--no-enable-prefix-caching" in (reuse.obstacle_to_reuse(_config(None)) or "")


def test_rows_all_needs_an_engine_that_was_started_with_it() -> None:
    rows = {rows: Policy(rows=rows) for rows in ("decode", "all")}

    def refused(started: str, then: str, caching: bool = True) -> bool:
        config = _config(None, caching)
        return reuse.obstacle_to_rows(config, rows[started], rows[then]) is not None

    assert refused("decode", "all")
    assert not refused("decode", "all", caching=False)
    assert not any(refused("all", then) for then in rows)
