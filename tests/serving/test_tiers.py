"""What requests may ask for, each on its own, in one batch of the real engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import sere
from sere.demo_model.tasks import examples
from sere.kernels import RowClass, keeping
from sere.policy import PolicyError
from sere.serving.settings import Settings
from sere.serving.tiers import EXACT, FAST, RequestTiers, Tier
from tests.engines import BATCH_INVARIANT, run_engine

PROMPTS = [e.prompt for e in examples(16, seed=3, split="held_out")]
TOKENS = 12
K = 4
# Every second request is exact; the others ask for nothing.
MIXED = ["exact", None] * 8
POOL = {"S": 1, "pool": 0.375}


# --- what may be written --------------------------------------------------------------------------


def test_tiers_are_ordered_and_print_as_written() -> None:
    written = ["independent", "fast", "S=1", "S=2", "exact"]
    tiers = [Tier.parse(one) for one in written]
    assert tiers == sorted(tiers)
    assert [str(tier) for tier in tiers] == written
    assert Tier.parse({"S": 2}) == Tier.parse("S=2")


@pytest.mark.parametrize(
    "asked", ["Exact", "S=0", "S=", "S=1.5", {"S": True}, {"S": 0}, {"s": 1}, {}, 3, 2.0, [], True]
)
def test_what_is_no_tier_is_refused(asked: Any) -> None:
    with pytest.raises(PolicyError, match='expected "exact", "fast"'):
        Tier.parse(asked)


def test_requests_have_the_class_they_asked_for_until_they_leave() -> None:
    tiers = RequestTiers(FAST, K)
    assert tiers.classes(["a", "b"]) == RowClass.FAST
    tiers.add("a", "exact")
    tiers.add("b", {"S": 2})
    tiers.add("c", None)
    tiers.add("d", {"S": 9})
    order = ["c", "d", "b", "a"]
    exact, fast = int(RowClass.EXACT), int(RowClass.FAST)
    assert tiers.classes(order).tolist() == [fast, exact, keeping(2), exact]
    tiers.remove({"a", "unknown"})
    tiers.add("b", None)  # the same name again, another request
    assert tiers.classes(order).tolist() == [fast, exact, fast, fast]
    tiers.remove(["d"])
    assert tiers.classes(order) == RowClass.FAST


def test_the_default_tier_holds_for_requests_that_ask_nothing() -> None:
    tiers = RequestTiers(EXACT, K)
    tiers.add("a", "fast")
    assert tiers.classes(["a", "b"]).tolist() == [RowClass.FAST, RowClass.EXACT]


def test_what_slips_past_the_front_end_does_not_stop_a_worker() -> None:
    tiers = RequestTiers(FAST, K)
    tiers.add("a", {"nonsense": 1})
    assert tiers.classes(["a"]).tolist() == [RowClass.EXACT]


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"default": "slow"}, "default='slow': expected \"exact\""),
        ({"cap": 7}, "cap=7: expected"),
        ({"default": "exact", "cap": "S=2"}, 'default="exact" is better than cap="S=2"'),
        ({"union": "global"}, "union='global': expected \"rank\""),
        ({"any_version": "yes"}, "any_version='yes': expected true or false"),
    ],
)
def test_bad_settings_name_what_was_expected(
    given: dict[str, Any], reason: str, table_path: Path
) -> None:
    with pytest.raises(PolicyError) as error:
        Settings.parse({"table": str(table_path), **given}, model_folder=None, model_default={})
    assert reason in str(error.value)


# --- in the engine --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine(table_path: Path) -> dict[str, Any]:
    """One engine, whose policy is switched; every run has the same sixteen prompts."""
    generate = ["generate", PROMPTS, TOKENS]
    beams, beams_online = (["beam" + kind, PROMPTS[:3], 2, 5] for kind in ("", "_online"))
    steps: dict[str, list[Any]] = {
        "said": ["said"],
        "stock policy": ["rpc", "sere_policy", None],
        "stock": generate,
        "stock, alone": ["generate", PROMPTS[:1], TOKENS],
        "mixed, off": [*generate, MIXED],
        "stock beams": beams,
        "stock beams online": beams_online,
        "S=1 policy": ["rpc", "sere_policy", {"S": 1}],
        "S=1": generate,
        "reset": ["rpc", "sere_reset"],
        "mixed, S=1": [*generate, MIXED],
        "mixed stats": ["rpc", "sere_stats"],
        "reset 2": ["rpc", "sere_reset"],
        "exact": [*generate, ["exact"] * 16],
        "exact stats": ["rpc", "sere_stats"],
        "all rows": ["rpc", "sere_policy", {"S": 1, "rows": "all"}],
        "mixed, all rows": [*generate, MIXED],
        "exact beams": [*beams, "exact"],
        "fast beams": beams,
        "exact beams online": [*beams_online, "exact"],
        "fast beams online": beams_online,
        "beams, malformed": [*beams, "fastest"],
        "beams online, malformed": [*beams_online, "fastest"],
        "S=2 policy": ["rpc", "sere_policy", {"S": 2}],
        "mixed, S=2": [*generate, MIXED],
        "S=1 again": ["rpc", "sere_policy", {"S": 1}],
        "record": ["rpc", "sere_record", True],
        "keeping": [*generate, ["S=2", None, {"S": 4}, "fast"] * 4],
        "recording": ["rpc", "sere_recording"],
        "pool": ["rpc", "sere_policy", POOL],
        "independent": [*generate, ["independent", None] * 8],
        "independent, among others": [*generate, ["independent", "exact"] * 8],
        "alone": ["generate", PROMPTS[:1], TOKENS, ["independent"]],
        "pool for few": ["rpc", "sere_policy", {**POOL, "batches": {"1": None}}],
        "reset 3": ["rpc", "sere_reset"],
        "independent, among stock": [*generate, ["independent", None] * 8],
        "independent stats": ["rpc", "sere_stats"],
        "malformed": ["refused", "fastest"],
        "made elsewhere": ["made_elsewhere", "fastest"],
        "above the cap": ["refused", "exact"],
        "within the cap": ["refused", "S=3"],
    }
    settings = {"table": str(table_path), **POOL, "cap": "exact"}
    return dict(zip(steps, run_engine(list(steps.values()), sere=settings), strict=True))


@pytest.mark.engine
def test_an_engine_says_once_what_it_re_routes(engine: dict[str, Any]) -> None:
    ours = [(level, said) for level, name, said in engine["said"] if name.startswith("vllm.sere")]
    ((level, line),) = [one for one in ours if one[1].startswith("sere ")]
    assert level == "INFO"
    for part in (
        f"sere {sere.__version__} on vLLM 0.32.0: S=1 pool=0.375, table demo.safetensors",
        "layers 0-3",
        "rows: decode, expert kernel CPUUnquantizedExperts",
        "operator numba",
    ):
        assert part in line, line
    assert not any("NOTHING" in said for _, said in ours)


@pytest.mark.engine
@pytest.mark.parametrize("run", ["mixed, off", "mixed, S=1", "mixed, all rows", "mixed, S=2"])
def test_an_exact_request_does_not_depend_on_its_neighbours_policy(
    run: str, engine: dict[str, Any]
) -> None:
    """Tokens and logprobs, bit for bit; the neighbours' do change."""
    assert engine[run][0::2] == engine["stock"][0::2]
    assert (engine[run][1::2] == engine["stock"][1::2]) is (run == "mixed, off")


@pytest.mark.engine
def test_a_batch_of_exact_requests_is_stock(engine: dict[str, Any]) -> None:
    assert engine["exact"] == engine["stock"] != engine["S=1"]
    for layer in engine["exact stats"][0].values():
        assert layer["steps"] == layer["rows_fast"] == layer["slots_rerouted"] == 0
        assert layer["rows_exact"] > 16 * TOKENS


@pytest.mark.engine
def test_exact_rows_are_counted_as_such(engine: dict[str, Any]) -> None:
    lengths = [len(tokens) for tokens, _ in engine["mixed, S=1"]]
    for layer in engine["mixed stats"][0].values():
        assert layer["rows_fast"] == sum(lengths[1::2]) - 8
        assert layer["rows_exact"] == sum(map(len, PROMPTS)) + sum(lengths[0::2]) - 8


@pytest.mark.engine
def test_a_request_keeps_at_least_its_own_best_experts(engine: dict[str, Any]) -> None:
    kept_two = moved = 0
    for batches in engine["recording"][0].values():
        for ids, weights, rows, new_ids, new_weights in batches:
            for row, kind in enumerate(rows):
                order = torch.tensor(weights[row]).argsort(descending=True, stable=True).tolist()
                same = [ids[row][slot] == new_ids[row][slot] for slot in order]
                if kind == keeping(2):
                    kept_two += 1
                    moved += not all(same)
                    best = {ids[row][slot] for slot in order[:2]}
                    # Another slot that goes to one of them may carry its weight.
                    carried = zip(new_ids[row], new_weights[row], strict=True)
                    assert best <= {expert for expert, weight in carried if weight}
                if kind == RowClass.EXACT:
                    assert all(same)
    assert kept_two > 100 and moved > 20


@pytest.mark.engine
def test_an_independent_request_does_not_depend_on_its_neighbours(engine: dict[str, Any]) -> None:
    """Tokens and logprobs, bit for bit, beside fast and exact requests and whatever the policy has
    for the others, and alone."""
    answers = engine["independent"][0::2]
    assert answers == engine["independent, among others"][0::2]
    assert answers == engine["independent, among stock"][0::2]
    assert answers != engine["stock"][0::2]
    assert engine["independent"][1::2] != engine["independent, among stock"][1::2]
    assert_alike(engine["alone"], answers[:1], engine["stock, alone"] == engine["stock"][:1])
    for layer in engine["independent stats"][0].values():
        assert layer["rows_independent"] == sum(len(tokens) for tokens, _ in answers) - 8
        assert layer["slots_rerouted"] > 0


@pytest.fixture(scope="module")
def invariant(mapped_path: Path) -> dict[str, Any]:
    """An engine under VLLM_BATCH_INVARIANT whose policy moves nothing but independent rows, for
    which linear maps answer."""
    answer = "generate"
    steps: dict[str, list[Any]] = {
        "said": ["said"],
        "together": [answer, PROMPTS, TOKENS],
        "among exact": [answer, PROMPTS, TOKENS, [None, "exact"] * 8],
        "reset": ["rpc", "sere_reset"],
        "five": [answer, PROMPTS[6:11], TOKENS],
        "stats": ["rpc", "sere_stats"],
        "alone": [answer, PROMPTS[8:9], TOKENS],
        "exact, alone": [answer, PROMPTS[1:2], TOKENS, ["exact"]],
        **{f"for {tier}": ["refused", tier] for tier in ("independent", "exact", "fast", "S=2")},
    }
    found = run_engine(
        list(steps.values()),
        sere={
            "table": str(mapped_path),
            "S": K,
            "pool": 0.375,
            "fill": "linear",
            "default": "independent",
        },
        env={"VLLM_BATCH_INVARIANT": "1"},
        paths=(BATCH_INVARIANT,),
    )
    return dict(zip(steps, found, strict=True))


@pytest.mark.engine
def test_an_engine_that_promises_batch_invariance_keeps_it_and_re_routes(
    invariant: dict[str, Any],
) -> None:
    """Tokens and logprobs, bit for bit, of rows for which maps answer."""
    answers = invariant["together"]
    assert invariant["among exact"][0::2] == answers[0::2]
    assert invariant["among exact"][1::2] != answers[1::2]
    steady = invariant["exact, alone"] == invariant["among exact"][1:2]
    assert_alike(invariant["five"], answers[6:11], steady)
    assert_alike(invariant["alone"], answers[8:9], steady)
    for layer in invariant["stats"][0].values():
        assert layer["slots_rerouted"] > 0 == layer["rows_fast"]


@pytest.mark.engine
def test_under_that_promise_each_request_is_told_what_it_may_ask_for(
    invariant: dict[str, Any],
) -> None:
    assert invariant["for independent"] == invariant["for exact"] == "accepted"
    for tier in ("fast", "S=2"):
        assert f'"{tier}" depends on it: ask for "exact" or "indep' in invariant[f"for {tier}"]


@pytest.mark.engine
def test_a_policy_for_independent_rows_alone_is_said_to_be_one(invariant: dict[str, Any]) -> None:
    said = [line for _, name, line in invariant["said"] if name.startswith("vllm.sere")]
    assert not any("NOTHING IS RE-ROUTED" in line for line in said)
    (line,) = (one for one in said if one.startswith(f"sere {sere.__version__}"))
    assert 'rows: decode, of requests that are "independent" (of others none: S=4 keeps' in line


def assert_alike(found: list[Any], wanted: list[Any], steady: bool) -> None:
    """Answers in batches of two sizes; steady: whether stock routing gives the same bits in both on
    this CPU, as it does with AVX-512 and with AVX2."""
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in wanted]
    assert found == wanted or not steady


@pytest.mark.engine
def test_malformed_requests_are_answered(engine: dict[str, Any]) -> None:
    assert engine["malformed"].startswith("VLLMValidationError: \"sere\": 'fastest': expected")
    handed_in, in_the_core = engine["made elsewhere"]
    assert handed_in == in_the_core == engine["malformed"]
    assert engine["above the cap"] == engine["within the cap"] == "accepted"


@pytest.mark.engine
def test_a_beam_search_has_the_tier_that_it_asks_for(engine: dict[str, Any]) -> None:
    """Its steps are prompts, so that a policy for all rows matters. On a server each search runs
    beside one that asks for nothing, and neither asks for the other."""
    stock, online = engine["stock beams"], engine["stock beams online"]
    assert engine["exact beams"] == stock != engine["fast beams"]
    assert engine["exact beams online"][0::2] == online[0::2] != engine["fast beams online"][0::2]
    assert engine["exact beams online"][1::2] == engine["fast beams online"][1::2]


@pytest.mark.engine
@pytest.mark.parametrize("kind", ["beams", "beams online"])
def test_a_beam_search_for_what_is_no_tier_is_refused(kind: str, engine: dict[str, Any]) -> None:
    (said,) = engine[f"{kind}, malformed"]
    assert said.startswith("\"sere\": 'fastest': expected")
