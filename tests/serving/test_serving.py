"""The plug-in in the real vLLM engine (CPU), on the bundled model."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import urllib.error
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any

import pytest
import torch

from sere import demo_model
from sere.calibration.calibrate import calibrate
from sere.demo_model.tasks import examples
from sere.kernels import RowClass, reroute
from sere.models.loading import load_tokenizer
from sere.policy import Policy, PolicyError
from sere.serving import contract, symbols, vllm_plugin
from sere.serving.contract import REROUTING
from sere.serving.engine import check_plugin_allowed, prepare
from sere.serving.may_ask import check_request
from sere.serving.may_start import check_config
from sere.serving.refusal import ServingError
from sere.serving.session import stage_of
from sere.serving.vllm_plugin import register
from sere.serving.wiring import install, install_in_worker
from sere.serving.worker import self_check, sere_description, sere_layers, sere_merge
from sere.table import FILE_NAME, Table
from tests.engines import EXPERT_MAP, OPTIONS, EngineFailure, environment, run_engine
from tests.servers import Server
from tests.serving.harness import check_answers, check_prompt

pytestmark = pytest.mark.engine

PROMPTS = [e.prompt for e in examples(24, seed=7, split="held_out")]
TOKENS = 12
GENERATE = ["generate", PROMPTS, TOKENS]
ALONE = ["generate", PROMPTS[:1], TOKENS]
PER_LAYER = {"1": {"S": 2}, "2": {"tau": 0.02}}
S1 = {"S": 1, "rho": 0.0}
LINEAR = {"S": 1, "min_active": 1, "fill": "linear", "layers": {"2": {"fill": "constant"}}}


@pytest.fixture(scope="session")
def without_plugin() -> list[Any]:
    """Stock vLLM: the plug-in is not even loaded."""
    return run_engine([GENERATE, ALONE], env={"VLLM_PLUGINS": ""})


@pytest.fixture(scope="session")
def with_plugin(table_path: Path) -> dict[str, Any]:
    """One engine, started with S=1, its policy switched while it lives."""
    steps: dict[str, list[Any]] = {
        "addresses": ["addresses"],
        "S=1": GENERATE,
        "S=1 stats": ["rpc", "sere_stats"],
        "alone": ALONE,
        "off": ["rpc", "sere_policy", None],
        "reset": ["rpc", "sere_reset"],
        "stock": GENERATE,
        "S=K": ["rpc", "sere_policy", {"S": 4}],
        "S=K run": GENERATE,
        "S=K stats": ["rpc", "sere_stats"],
        "rho": ["rpc", "sere_policy", {"S": 1, "rho": 1.01}],
        "rho run": GENERATE,
        "all": ["rpc", "sere_policy", {"S": 1, "rows": "all"}],
        "reset again": ["rpc", "sere_reset"],
        "all run": GENERATE,
        "all stats": ["rpc", "sere_stats"],
        "on": ["rpc", "sere_policy", {"S": 1, "rho": 0.2, "layers": PER_LAYER}],
        "capture": ["capture"],
        "record": ["rpc", "sere_record", True],
        "captured run": ["generate", PROMPTS, 4],
        "recording": ["rpc", "sere_recording"],
        "captured": ["captured"],
        "addresses after": ["addresses"],
    }
    results = run_engine(list(steps.values()), sere={"table": str(table_path), **S1})
    return dict(zip(steps, results, strict=True))


@pytest.mark.parametrize("policy", ["stock", "S=K run", "rho run"])
def test_switched_off_is_bit_identical_to_an_engine_without_the_plugin(
    policy: str, with_plugin: dict[str, Any], without_plugin: list[Any]
) -> None:
    assert with_plugin[policy] == without_plugin[0]


def test_a_batch_of_one_is_bit_identical_to_stock(
    with_plugin: dict[str, Any], without_plugin: list[Any]
) -> None:
    assert with_plugin["alone"] == without_plugin[1]


def test_rerouting_touches_fewer_experts_and_changes_decoding(
    with_plugin: dict[str, Any], without_plugin: list[Any]
) -> None:
    for layer in with_plugin["S=1 stats"][0].values():
        assert layer["active_after"] < 0.8 * layer["active_before"]
        assert layer["slots_rerouted"] > 0
    for layer in with_plugin["S=K stats"][0].values():
        assert layer["active_after"] == layer["active_before"] > 0
        assert layer["slots_rerouted"] == 0
    assert with_plugin["S=1"] != without_plugin[0]


def test_prefill_is_exact_by_default(
    with_plugin: dict[str, Any], without_plugin: list[Any]
) -> None:
    def first(run: list[Any]) -> list[Any]:
        return [(tokens[0], logprobs[0]) for tokens, logprobs in run]

    assert first(with_plugin["S=1"]) == first(without_plugin[0])
    assert first(with_plugin["all run"]) != first(without_plugin[0])


def test_every_row_has_its_class(with_plugin: dict[str, Any]) -> None:
    generated = sum(len(tokens) for tokens, _ in with_plugin["S=1"])
    for layer in with_plugin["S=1 stats"][0].values():
        assert layer["rows_fast"] == generated - len(PROMPTS)
        assert layer["rows_exact"] == sum(map(len, PROMPTS))  # the tokenizer is per character
        assert layer["steps"] == TOKENS - 1
    for layer in with_plugin["all stats"][0].values():
        assert layer["rows_exact"] == 0


def test_prefill_mixed_with_decode_is_told_apart_row_by_row(table_path: Path) -> None:
    """Three requests at a time and few tokens a step: prompts are chunked between decode rows."""
    results = run_engine(
        [GENERATE, ["rpc", "sere_stats"], ["refused", "exact"], ["refused", "S=2"]],
        sere={"table": str(table_path), **S1, "cap": "S=2"},
        options={"max_num_seqs": 3, "max_num_batched_tokens": 8, "enable_chunked_prefill": True},
    )
    generated = sum(len(tokens) for tokens, _ in results[0])
    for layer in results[1][0].values():
        assert layer["rows_fast"] == generated - len(PROMPTS)
        assert layer["rows_exact"] == sum(map(len, PROMPTS))
    assert 'this server gives at most "S=2", "exact" was asked for' in results[2]
    assert results[3] == "accepted"


def test_ids_inside_vllm_are_the_specifications(
    with_plugin: dict[str, Any], table_path: Path
) -> None:
    table = Table.load(table_path)
    policy = Policy(S=1, rho=0.2, layers=PER_LAYER)
    moved = scaled = 0
    for index, batches in with_plugin["recording"][0].items():
        seen = with_plugin["captured"][f"model.layers.{index}.mlp.experts"]
        assert len(batches) == len(seen) == 4
        for (ids, weights, rows, _, new_weights), inside in zip(batches, seen, strict=True):
            before = torch.tensor(ids, dtype=torch.int32)
            after, expected = reroute(
                before,
                torch.tensor(weights),
                table.plan(int(index), policy),
                torch.tensor(rows, dtype=torch.int8),
            )
            assert after.tolist() == inside
            assert torch.equal(torch.tensor(new_weights), expected)
            exact = torch.tensor(rows) == RowClass.EXACT
            assert torch.equal(after[exact], before[exact])
            moved += int((after != before).sum())
            scaled += int((expected != torch.tensor(weights)).sum())
    assert moved > 100 and scaled > 10


def test_experts_are_given_distinct_ids(with_plugin: dict[str, Any]) -> None:
    """What vLLM itself captures behind its routers: every row that re-routing changed names K
    experts, and freed slots are among them."""
    changed = freed = 0
    for index, batches in with_plugin["recording"][0].items():
        seen = with_plugin["captured"][f"model.layers.{index}.mlp.experts"]
        for (ids, _, _, _, new_weights), inside in zip(batches, seen, strict=True):
            for before, after, weights in zip(ids, inside, new_weights, strict=True):
                if before != after:
                    assert len(set(after)) == len(before)
                    changed += 1
                    freed += weights.count(0)
    assert changed > 100 and freed > 10


def test_switching_writes_into_the_same_buffers(with_plugin: dict[str, Any]) -> None:
    assert with_plugin["addresses"] == with_plugin["addresses after"]


# --- the ways vLLM runs ---------------------------------------------------------------------------

# Workers are processes; the engine's core is one where that is said too, and beside them in one.
# All are forks, except in the first mode.
OWN_CORE = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
MODES: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "multi-process": (
        {},
        {**OWN_CORE, "VLLM_WORKER_MULTIPROC_METHOD": "spawn"},
    ),
    "tensor parallel": ({"tensor_parallel_size": 2}, {}),
    "expert parallel": ({"tensor_parallel_size": 2, "enable_expert_parallel": True}, OWN_CORE),
    "pipeline parallel": ({"pipeline_parallel_size": 2, "async_scheduling": False}, {}),
    "torch.compile": ({"enforce_eager": False}, {}),
    "bfloat16": ({"dtype": "bfloat16"}, {}),
}


@pytest.mark.modes
@pytest.mark.parametrize("mode", MODES)
def test_engine_modes(mode: str, mapped_path: Path, without_plugin: list[Any]) -> None:
    """Re-routed, with linear maps in the place of experts, and off again."""
    options, env = MODES[mode]
    if mode == "torch.compile" and shutil.which("g++") is None:
        pytest.skip("torch.compile needs g++ on the CPU")
    paths: tuple[Path, ...] = (EXPERT_MAP,) if mode == "expert parallel" else ()
    steps = [GENERATE, ["rpc", "sere_stats"], ["rpc", "sere_record", True]]
    steps += [["generate", PROMPTS, 4, ["exact", None] * 12], ["rpc", "sere_recording"]]
    steps += [["rpc", "sere_telemetry"], ["rpc", "sere_policy", LINEAR], GENERATE]
    steps += [["generate", PROMPTS, 4, ["exact", None] * 12]]
    steps += [["rpc", "sere_policy", {**LINEAR, "rows": "all"}], ["generate", PROMPTS[:1], 1]]
    steps += [["rpc", "sere_policy", None], GENERATE]
    # Of two ranks that refuse, the second's answer must not be taken for that to the next call.
    steps += [["failing", "rpc", "sere_policy", {"S": 99}], ["rpc", "sere_layers"]]
    sere: dict[str, Any] = {"table": str(mapped_path), **S1, "maps": True}
    if "enforce_eager" not in options:
        sere["shadow"] = {"every": 2, "bound": 1e3}
    spawns = mode == "multi-process"
    ran = run_engine(steps, sere=sere, options=options, env=env, paths=paths, spawns=spawns)
    on, stats, _, mixed, recording, told, _, linear, apart, _, prompt, _, off, refused, bound = ran
    assert "S=99" in refused
    assert bound == [sorted(map(int, rank)) for rank in recording]
    if mode == "pipeline parallel":
        # vLLM 0.32's CPU engine by itself dies of its first step here: KeyError in its scheduler.
        stock = without_plugin[0]
    else:
        stock_env = {**env, "VLLM_PLUGINS": "expert_map"}
        stock = run_engine([GENERATE], options=options, env=stock_env, paths=paths)[0]
    assert off == stock
    assert on != stock
    # An exact request's tokens, whatever its neighbours get.
    for beside in (mixed, apart):
        assert [o[0] for o in beside[0::2]] == [s[0][:4] for s in stock[0::2]]
    if mode == "multi-process":
        assert apart[0::2] == [[tokens[:4], said[:4]] for tokens, said in stock[0::2]]
    if mode != "bfloat16":
        check_prompt(prompt, PROMPTS[0], mapped_path, LINEAR)
    if mode == "torch.compile":  # elsewhere requests reach the engine one by one
        check_answers(linear, PROMPTS, mapped_path, LINEAR)
    layers = _checked_ranks(recording, staged=mode == "pipeline parallel")
    assert sorted(map(int, layers)) == list(Table.load(mapped_path).layers)
    for rank in told:
        # Tensor-parallel ranks find the same, and would fall back together.
        assert rank == told[0] or mode == "pipeline parallel"
        # Some checks find no token moved: which requests meet in a step is a matter of timing.
        checks, errors = (
            [layer[name] for layer in rank["shadow"].values()] for name in ("checks", "error_sum")
        )
        assert "shadow" not in sere or (all(checks) and 0 < sum(errors) < sum(checks))
    generated = sum(len(tokens) for tokens, _ in on)
    for layer in (layer for rank in stats for layer in rank.values()):
        assert layer["rows_fast"] == generated - len(PROMPTS)
        assert layer["active_after"] < 0.8 * layer["active_before"]


def _checked_ranks(recording: list[dict[str, Any]], *, staged: bool) -> dict[str, Any]:
    """What all ranks recorded: the same, bit for bit, or (staged) each its own layers."""
    merged: dict[str, Any] = {}
    for rank in recording:
        assert rank
        assert staged or rank == recording[0]  # ids and weights, before and after, and classes
        assert not (staged and set(rank) & set(merged))
        merged |= rank
    assert all(batches for batches in merged.values())
    return merged


@pytest.mark.modes
def test_openai_server_answers(server: Server, without_plugin: list[Any]) -> None:
    """`--additional-config` on the command line; greedy text equals the in-process engine's where a
    request asks to be exact, and is another's where it does not (a row alone loses no expert)."""

    def complete(prompts: list[str] = PROMPTS[:1], **asked: Any) -> Any:
        choices = server.complete(prompts, TOKENS, logprobs=1, **asked)["choices"]
        return choices[0] if len(prompts) == 1 else choices

    answer = complete(vllm_xargs={"sere": "exact"})
    fast, exact = (complete(PROMPTS, vllm_xargs={"sere": tier}) for tier in ("fast", "exact"))
    for malformed in ({"sere": "fastest"}, {"sere": 3}, {"sere": ["exact"]}):
        with pytest.raises(urllib.error.HTTPError) as refusal:
            complete(vllm_xargs=malformed)
        assert refusal.value.code == 400
        assert 'expected \\"exact\\", \\"fast\\"' in refusal.value.read().decode()
    assert complete(vllm_xargs={"sere": "S=4"}) == answer
    alone = without_plugin[1][0][0]
    tokenizer = load_tokenizer(OPTIONS["model"])
    assert answer["text"] == tokenizer.decode(alone, skip_special_tokens=True)
    assert [one["logprobs"] for one in fast] != [one["logprobs"] for one in exact]


# --- what cannot work is refused at start-up, with the reason ------------------------------------


def configure(options: dict[str, Any] | None = None, **sere: Any) -> Any:
    """What `LLM(...)` and `vllm serve` do first, before anything is loaded."""
    from vllm.engine.arg_utils import EngineArgs

    register()
    given = {**OPTIONS, **(options or {})}
    return EngineArgs(**given, additional_config={"sere": sere}).create_engine_config()


@pytest.mark.parametrize(
    ("additional", "named"),
    [
        ({"sear": {"S": 1}}, "'sear'"),
        ({"table": "t", "S": 1}, "'table'"),
        ({"other_plugin": 1, "serenity": 2}, None),
        ({}, None),
    ],
    ids=str,
)
def test_settings_that_nobody_would_read_are_noticed(
    additional: dict[str, Any], named: str | None
) -> None:
    from vllm.engine.arg_utils import EngineArgs

    register()
    vllm_plugin._say_misspelt.cache_clear()
    with heard() as messages:
        EngineArgs(**OPTIONS, additional_config=additional).create_engine_config()
    said = [message for message in messages if "NOTHING IS RE-ROUTED" in message]
    assert len(said) == (named is not None)
    assert named is None or named in said[0]


@pytest.mark.parametrize(
    ("additional", "reason"),
    [
        ({"sere": None}, '"sere": null asks for nothing: write {"sere": {}}'),
        ({"Sere": {}}, "nobody reads 'Sere': all settings go behind one key"),
        ({"sere_table": "t"}, "nobody reads 'sere_table'"),
        ({"sere": {"S": 1}, "sere-S": 1}, "nobody reads 'sere-S'"),
    ],
    ids=str,
)
def test_settings_that_can_only_be_ours_and_would_do_nothing_are_refused(
    additional: dict[str, Any], reason: str
) -> None:
    from vllm.engine.arg_utils import EngineArgs

    register()
    with pytest.raises(ServingError) as error:
        EngineArgs(**OPTIONS, additional_config=additional).create_engine_config()
    assert reason in str(error.value)


@contextmanager
def heard() -> Iterator[list[str]]:
    """What our logger says; by a filter, as vLLM drops handlers when its first engine starts."""
    logger, messages = logging.getLogger("vllm.sere"), list[str]()

    def hear(record: logging.LogRecord) -> bool:
        messages.append(record.getMessage())
        return True

    logger.addFilter(hear)
    try:
        yield messages
    finally:
        logger.removeFilter(hear)


@pytest.mark.parametrize(
    ("sere", "reason"),
    [
        ({"S": 5}, "S=5 exceeds the 4 experts per token"),
        ({"S": 0}, "S=0: expected a whole number >= 1"),
        ({"rho": "high"}, "rho='high': expected a number"),
        ({"roh": 0.3}, "unknown key 'roh'; did you mean 'rho'"),
        ({"table": "nowhere.safetensors"}, "nowhere.safetensors: no such table"),
        ({"layers": {"9": {"S": 1}}}, r"layers \[9\] of the policy are not among"),
        ({"batches": {"2": {"layers": {"9": {"S": 1}}}}}, r"layers \[9\] of the policy are not"),
        ({"fingerprint": "none"}, 'expected "weights", "router" or "shape"'),
        ({"merge": "yes"}, "merge='yes': expected true or false"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_settings_are_refused_before_loading(
    sere: dict[str, Any], reason: str, table_path: Path
) -> None:
    with pytest.raises(ServingError, match=reason) as refusal:
        configure(**{"table": str(table_path), **sere})
    assert "validation error" not in str(refusal.value)  # pydantic's words around ours
    configure(table=str(table_path))


@pytest.mark.modes
def test_a_server_that_is_refused_ends_with_the_reason(tmp_path: Path) -> None:
    """Not with a traceback through vLLM."""
    asked = json.dumps({"sere": {"table": "nowhere.table"}})
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--additional-config"]
    flags = ["--model", str(demo_model.PATH), "--dtype", "float32", "--enforce-eager"]
    ended = subprocess.run(
        [*command, asked, *flags],
        env=environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 1
    said = "sere: error: nowhere.table: no such table; run `sere calibrate MODEL -o sere.table`"
    assert ended.stderr.splitlines()[-2].startswith(said)
    assert "Traceback" not in ended.stderr


def test_merge_is_what_every_row_has_and_one_version_still_takes_the_word(table_path: Path) -> None:
    """As a setting and as a remote call; what once refused it does so no more."""
    with heard() as messages:
        configure(table=str(table_path), merge=False)
        assert messages == []
        configure({"enforce_eager": False}, table=str(table_path), merge=True)
        sere_merge(None, True)
    assert len(messages) >= 2
    assert all("merge does nothing any more" in message for message in messages)


def test_batch_invariance_is_kept_by_whoever_does_not_look_at_others(
    table_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default, and by what each request may ask for."""
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    table = str(table_path)
    with pytest.raises(ServingError, match=r'promises .* "default": "fast" makes them'):
        configure(table=table)
    with pytest.raises(ServingError, match="it has no pool: start with"):
        configure(table=table, S=1, default="independent")
    config = configure(table=table, S=0, pool=0.5, default="independent")
    for asked in (None, "exact", "independent"):
        check_request(config, asked)
    for asked in ("fast", "S=2"):
        with pytest.raises(PolicyError, match=f'promises .*, "{asked}" depends on it: ask for'):
            check_request(config, asked)
    with pytest.raises(PolicyError, match=r'"independent" is not to be had here: .* no pool'):
        check_request(configure(table=table, S=1, default="exact"), "independent")


def test_broken_tables_are_refused_before_loading(table_path: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(table_path.read_bytes()[:-1000])
    with pytest.raises(Exception, match="truncated or foreign"):
        configure(table=str(broken))
    table = Table.load(table_path)
    replace(table, fingerprint=replace(table.fingerprint, router_hash="0" * 64)).save(broken)
    with pytest.raises(Exception, match=r"belongs to another model(.|\n)*router weights"):
        configure(table=str(broken))
    configure(table=str(broken), fingerprint="shape")


def test_without_a_named_table_the_one_beside_the_model_is_taken(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="put it beside the model"):
        configure()
    model = tmp_path / "model"
    shutil.copytree(OPTIONS["model"], model, ignore=shutil.ignore_patterns("__pycache__", "*.py"))
    calibrate(str(model), model / FILE_NAME, data=_text_file(tmp_path), samples=8, progress=False)
    generate = ["generate", PROMPTS, 3]
    stats = run_engine([generate, ["rpc", "sere_stats"]], sere={}, options={"model": str(model)})[1]
    assert stats[0]["0"]["steps"] == 2


def _text_file(folder: Path) -> Path:
    path = folder / "text.txt"
    path.write_text("\n\n".join(e.prompt + e.answer for e in examples(8, seed=1)))
    return path


def test_an_unsupported_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(symbols, "version", lambda name: "0.8.4")
    assert "vLLM 0.8.4 is not supported: install 'vllm>=0.32,<0.34'" in str(symbols.obstacle())
    assert symbols.obstacle(any_version=True) is None


def test_an_untested_version_is_tried_if_the_user_says_so(
    table_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(symbols, "version", lambda name: "0.99.0")
    with pytest.raises(ServingError, match=r"0\.99\.0 is not supported"):
        configure(table=str(table_path))
    configure(table=str(table_path), any_version=True)


@pytest.mark.parametrize(
    ("part", "options", "reason"),
    [
        ("parallel_config", {"enable_dbo": True}, "dual-batch overlap"),
        ("parallel_config", {"ubatch_size": 2}, "dual-batch overlap"),
        ("parallel_config", {"prefill_context_parallel_size": 2}, "prefill context parallel"),
        (
            "parallel_config",
            {"enable_expert_parallel": True, "tensor_parallel_size": 2, "data_parallel_size": 2},
            "sequence-parallel MoE",
        ),
        ("cache_config", {"kv_sharing_fast_prefill": True}, "kv-sharing-fast-prefill"),
    ],
    ids=str,
)
def test_modes_whose_rows_are_unknown_are_refused(
    part: str, options: dict[str, Any], reason: str, table_path: Path
) -> None:
    """The CPU platform switches some of them off by itself, hence the second look."""
    config = configure(table=str(table_path))
    check_config(config)
    for name, value in options.items():
        setattr(getattr(config, part), name, value)
    with pytest.raises(ServingError, match=reason):
        check_config(config)


def test_a_missing_symbol_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(contract.NEEDS[REROUTING].called, "MoERunner", ("layer_id", "gone"))
    assert "MoERunner.gone" in str(symbols.obstacle())


def test_a_symbol_that_one_feature_needs_stops_that_feature_only(
    monkeypatch: pytest.MonkeyPatch, table_path: Path
) -> None:
    monkeypatch.setitem(contract.NEEDS["shadow"].called, "RoutedExperts", ("gone",))
    assert symbols.obstacle() is None
    config = configure(table=str(table_path))
    check_config(config)
    config.additional_config["sere"]["shadow"] = {"every": 9}
    with pytest.raises(
        ServingError, match=r"cannot run the shadow check here.*RoutedExperts\.gone"
    ):
        check_config(config)


def test_a_worker_that_does_not_say_when_it_sleeps_stops_engines_that_are_to_sleep() -> None:
    class Worker:
        load_model = compile_or_warm_up_model = None

    def config(*, sleeps: bool) -> Any:
        return SimpleNamespace(model_config=SimpleNamespace(enable_sleep_mode=sleeps))

    install_in_worker(Worker, config(sleeps=False))
    with pytest.raises(ServingError, match="Worker has no sleep and wake_up"):
        install_in_worker(Worker, config(sleeps=True))


def test_another_rerouting_plugin_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    rival = FunctionType((lambda: None).__code__, {"__name__": "lynx.plugin"})
    monkeypatch.setattr(
        symbols.module_of("create_fused_moe_router"), "create_fused_moe_router", rival
    )
    assert "lynx.plugin has replaced vLLM's router factory" in str(symbols.obstacle())


def test_tables_load_while_another_device_is_the_default(table_path: Path) -> None:
    """vLLM builds models with the accelerator as default device; the table is read on the host."""
    with torch.device("meta"):
        plan = Table.load(table_path).plan(0, Policy(S=1))
    assert plan.neighbours.device == plan.settings.device == torch.device("cpu")
    assert int(plan.settings[0]) == 1


def test_registering_twice_wraps_once() -> None:
    register()
    config = symbols.symbol("VllmConfig")
    once = config.__post_init__
    register()
    assert config.__post_init__ is once


def test_a_dense_model_is_refused(table_path: Path, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(OPTIONS["model"]) / name, tmp_path)
    with pytest.raises(EngineFailure, match=r"belongs to another model(.|\n)*LlamaForCausalLM"):
        run_engine([], sere={"table": str(table_path)}, options={"model": str(tmp_path)})


def test_plugins_without_ours_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    with pytest.raises(RuntimeError, match="does not name 'sere'"):
        check_plugin_allowed()
    monkeypatch.setenv("VLLM_PLUGINS", "other,sere")
    check_plugin_allowed()


def test_an_engine_of_ours_is_quiet_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    prepare()
    assert os.environ["VLLM_LOGGING_LEVEL"] == "DEBUG"
    monkeypatch.delenv("VLLM_LOGGING_LEVEL")
    prepare()
    assert os.environ["VLLM_LOGGING_LEVEL"] == "ERROR"


class _Worker:
    """Just enough of a worker for the self check."""

    def __init__(self, runners: list[Any], session: Any) -> None:
        context = {str(i): runner for i, runner in enumerate(runners)}
        compilation = SimpleNamespace(static_forward_context=context, _sere_session=session)
        self.vllm_config = SimpleNamespace(
            compilation_config=compilation,
            parallel_config=SimpleNamespace(pipeline_parallel_size=1),
        )
        self.model_runner = SimpleNamespace(_dummy_run=lambda rows: None)


def _runner(**attributes: Any) -> Any:
    class Runner(symbols.symbol("MoERunner")):  # type: ignore[misc]
        is_monolithic = attributes.pop("is_monolithic", False)
        do_naive_dispatch_combine = attributes.pop("naive", False)

        def __init__(self) -> None:
            self.__dict__.update(layer_name="model.layers.0.mlp.experts", **attributes)

    return Runner()


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [
        ({}, "not bound to model.layers.0"),
        ({"sere": SimpleNamespace(called=True), "is_monolithic": True}, "--moe-backend triton"),
        ({"sere": SimpleNamespace(called=True), "naive": True}, "gathers all data-parallel ranks"),
        ({"sere": SimpleNamespace(called=False, stand_ins=None)}, "never called in model.layers.0"),
    ],
)
def test_the_self_check_refuses_what_is_silently_inert(
    attributes: dict[str, Any], reason: str
) -> None:
    session = SimpleNamespace(check_bound=lambda config: None)
    with pytest.raises(ServingError, match=reason):
        self_check(_Worker([_runner(**attributes)], session))
    self_check(_Worker([_runner(sere=SimpleNamespace(called=True, stand_ins=None))], session))


def test_a_worker_without_the_plugin_is_noticed(
    table_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a host where sere is not installed does: its workers lack our methods. The reason is
    left for the first process, which would end with vLLM's."""
    monkeypatch.setenv("SERE_REFUSAL_FILE", str(tmp_path / "word"))
    monkeypatch.setattr("multiprocessing.parent_process", object)

    class Executor(symbols.symbol("Executor")):  # type: ignore[misc]
        def __init__(self, sere: dict[str, Any] | None, broken: bool) -> None:
            self.vllm_config = SimpleNamespace(
                additional_config={} if sere is None else {"sere": sere},
                compilation_config=SimpleNamespace(),
                model_config=SimpleNamespace(
                    model=str(table_path.parent), revision=None, hf_config=None
                ),
            )
            self.broken = broken

        def collective_rpc(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:
            if self.broken and method.startswith("sere"):
                raise AttributeError(f"'Worker' object has no attribute {method!r}")
            return [described] if method.startswith("sere") else []

        _init_executor = check_health = None

    asked = {"table": str(table_path)}
    described = {"table": "t", "policy": "S=1", "inert": None, "rows": "decode", "layers": [0]}
    described |= {"kernels": ["K"], "stock_kernels": [], "operator": "numba"}
    described |= {"by_rows": [], "nobodys": False, "too_little": None}
    install()
    with pytest.raises(ServingError, match=r"not loaded in every worker(.|\n)*sere_description"):
        Executor(asked, broken=True).compile_or_warm_up_model()
    assert "not loaded in every worker" in (tmp_path / "word").read_text()
    Executor(asked, broken=False).compile_or_warm_up_model()
    Executor(None, broken=True).compile_or_warm_up_model()


def test_a_worker_that_has_not_checked_itself_is_noticed() -> None:
    """Nothing of its start-up passed through us: its class does not call vLLM's own."""
    session = SimpleNamespace(checked=False, asleep=False, layers={0: None})
    for call in (sere_layers, sere_description):  # the latter is what start-up asks
        with pytest.raises(ServingError, match="_Worker has not checked itself"):
            call(_Worker([], session))
    session.checked = True
    assert sere_layers(_Worker([], session)) == [0]


def test_a_pipeline_stage_may_have_no_moe_layer(table_path: Path) -> None:
    layers = Table.load(table_path).layers

    def config(start: int, end: int) -> Any:
        return SimpleNamespace(
            parallel_config=SimpleNamespace(pipeline_parallel_size=2),
            model_config=SimpleNamespace(
                get_layers_start_end_indices=lambda parallel: (start, end)
            ),
        )

    assert stage_of(config(0, 2), layers) == (0, 1)
    assert stage_of(config(2, 9), layers) == tuple(i for i in layers if i >= 2)
    assert stage_of(config(70, 80), layers) == ()


def test_the_self_check_refuses_a_model_without_moe_layers() -> None:
    with pytest.raises(ServingError, match="found no MoE layer"):
        self_check(_Worker([], None))
