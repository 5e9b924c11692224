"""Metrics on vLLM's own `/metrics`: of a real server, and of several engines as far as one can
pretend to have them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from sere.demo_model.tasks import examples
from sere.kernels import COUNTERS
from sere.serving import frontend, symbols, telemetry, wiring
from sere.serving.contract import NEEDS
from sere.serving.session import ServingError
from sere.serving.worker import sere_stats, sere_telemetry
from tests.servers import Server

PROMPTS = [e.prompt for e in examples(24, seed=7, split="held_out")]
K, LAYERS = 4, range(4)


def samples(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Prometheus text as {(name, labels): value}."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(text: str, name: str, **labels: Any) -> float:
    """The one sample of that name with at least these labels."""
    wanted = {(key, str(label)) for key, label in labels.items()}
    (found,) = [v for (n, have), v in samples(text).items() if n == name and wanted <= have]
    return found


@pytest.mark.engine
@pytest.mark.modes
def test_the_servers_own_metrics_hold_ours(server: Server) -> None:
    before = server.get("/metrics")
    answer = server.complete(PROMPTS, 12, ignore_eos=True)
    generated = answer["usage"]["completion_tokens"]
    assert generated == 12 * len(PROMPTS)
    asyncio.run(asyncio.sleep(frontend.FRESH_S))
    text = server.get("/metrics")

    def grown(name: str, **labels: Any) -> float:
        return value(text, name, **labels) - value(before, name, **labels)

    assert grown("vllm:generation_tokens_total") == generated
    assert value(text, "sere_up") == 1
    assert value(text, "sere_policy_on", engine=0) == 1
    assert value(text, "sere_fallback", engine=0) == 0
    assert value(text, "sere_experts_per_token") == K
    for layer in LAYERS:
        fast = grown("sere_rows_total", layer=layer, row_class="fast")
        assert fast == generated - len(PROMPTS)
        assert grown("sere_slots_total", layer=layer) == K * fast
        assert 0 < grown("sere_slots_rerouted_total", layer=layer) < K * fast
        assert grown("sere_steps_total", layer=layer) >= 11
        after = grown("sere_active_experts_after_total", layer=layer)
        assert 0 < after < grown("sere_active_experts_before_total", layer=layer)


@pytest.mark.engine
@pytest.mark.modes
def test_a_mild_policy_does_not_fall_back(server: Server) -> None:
    before = server.get("/metrics")  # other tests have switched this server to bold policies
    server.complete(PROMPTS, 12, ignore_eos=True)
    server.complete(PROMPTS, 12, ignore_eos=True)
    asyncio.run(asyncio.sleep(frontend.FRESH_S))
    text = server.get("/metrics")
    assert value(text, "sere_fallback", engine=0) == 0
    for layer in LAYERS:

        def grown(name: str, layer: int = layer) -> float:
            return value(text, name, layer=layer) - value(before, name, layer=layer)

        assert grown("sere_shadow_checks_total") >= 2
        # The latest check may have been of a step in which nothing moved.
        assert grown("sere_shadow_error_sum_total") > 0
        assert grown("sere_surrendered_weight_sum_total") > 0
        assert 0 <= value(text, "sere_shadow_error", layer=layer) < 0.5
        assert 0 <= value(text, "sere_surrendered_weight", layer=layer) < 0.5
        assert grown("sere_shadow_exceeded_total") == 0


@pytest.mark.engine
@pytest.mark.modes
def test_the_format_does_not_depend_on_what_a_scraper_accepts(server: Server) -> None:
    wishes = {"Accept": "application/openmetrics-text", "Accept-Encoding": "gzip"}
    assert value(server.get("/metrics", **wishes), "sere_policy_on") == 1


# --- several engines, and one that does not answer --------------------------------------------


def told(rows: Mapping[int, int], **changes: Any) -> dict[str, Any]:
    """A worker's snapshot: rows_fast by layer."""
    known = {index: {"rows_fast": fast} for index, fast in rows.items()}
    state = {"policy": {"S": 1}, "fallback": None, "inert": None, "switches": 0}
    state |= {"unclassified_steps": 0, "left": (0, 0)}
    return state | {"E": 8, "K": 2, "shadow": {}, "layers": known, **changes}


class Core:
    """Just enough of vLLM's engine-core client."""

    def __init__(self, engines: dict[int, list[dict[str, Any]]]) -> None:
        self.engines = engines
        self.engine_ranks_managed = list(engines)
        self.asked = 0
        self.silent = asyncio.Event()
        self.silent.set()

    async def call_utility_all_async(self, *call: Any) -> list[Any]:
        assert call == ("collective_rpc", "sere_telemetry", None, (), None)
        self.asked += 1
        await self.silent.wait()
        return list(self.engines.values())


def application(core: Core, additional: Any) -> Any:
    """An API server with vLLM's metrics and ours."""
    from fastapi import FastAPI
    from vllm.entrypoints.serve.instrumentator import metrics

    app = FastAPI()
    attach = getattr(metrics.attach_router, "__wrapped__", metrics.attach_router)
    frontend.exporting(attach)(app)
    app.state.vllm_config = SimpleNamespace(additional_config=additional)
    app.state.engine_client = SimpleNamespace(engine_core=core)
    return app


def scrape(core: Core, additional: Any = None, *, times: int = 1) -> str:
    """What `/metrics` answers the last of several scrapes."""
    from httpx import ASGITransport, AsyncClient

    async def ask() -> str:
        app = application(core, {"sere": {}} if additional is None else additional)
        async with AsyncClient(transport=ASGITransport(app), base_url="http://test") as client:
            for _ in range(times):
                response = await client.get("/metrics")
                assert response.status_code == 200
            return response.text

    return asyncio.run(ask())


def test_engines_are_told_apart_and_ranks_counted_once() -> None:
    """Two engines; tensor-parallel ranks agree, pipeline stages have layers of their own."""
    core = Core({0: [told({0: 5}), told({0: 5}), told({1: 7})], 3: [told({0: 1}, policy=None)]})
    text = scrape(core)
    assert value(text, "sere_rows_total", engine=0, layer=0, row_class="fast") == 5
    assert value(text, "sere_rows_total", engine=0, layer=1, row_class="fast") == 7
    assert value(text, "sere_slots_total", engine=3, layer=0) == 2
    assert value(text, "sere_policy_on", engine=0) == 1
    assert value(text, "sere_policy_on", engine=3) == 0


def test_a_counter_that_is_new_is_exported_under_its_own_name() -> None:
    core = Core({0: [told({0: 5}, layers={0: {"rows_fast": 5, "wishes": 3}})]})
    assert value(scrape(core), "sere_wishes_total", layer=0) == 3


def test_a_server_without_sere_asks_nobody() -> None:
    core = Core({0: []})
    assert "sere_" not in scrape(core, {})
    assert core.asked == 0


def test_several_api_servers_export_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM then reads its own metrics from files, and not from the process that answers."""
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    assert value(scrape(Core({0: [told({0: 5})]})), "sere_policy_on") == 1


def test_a_flood_of_scrapes_does_not_reach_the_engine() -> None:
    core = Core({0: [told({0: 5})]})
    scrape(core, times=20)
    assert core.asked == 1


def test_an_engine_that_does_not_answer_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frontend, "PATIENCE_S", 0.01)
    monkeypatch.setattr(frontend, "FRESH_S", 0.0)

    async def texts() -> list[str]:
        core = Core({0: [told({0: 5})]})
        source = frontend.Source(SimpleNamespace(engine_core=core))
        answers = [await source.text()]
        core.silent.clear()
        answers += [await source.text(), await source.text()]
        assert core.asked == 2  # the last two wait for one answer
        core.silent.set()
        return [text.decode() for text in (*answers, await source.text())]

    fresh, *old, again = asyncio.run(texts())
    for text in old:
        assert value(text, "sere_up") == 0
        assert value(text, "sere_rows_total", row_class="fast") == 5
    assert value(fresh, "sere_up") == value(again, "sere_up") == 1


def test_an_engine_that_fails_is_logged_and_old_figures_given(
    caplog: pytest.LogCaptureFixture,
) -> None:
    core = Core({0: []})
    core.engine_ranks_managed = [0, 1]  # answers of one only
    assert value(scrape(core), "sere_up") == 0
    assert "no fresh metrics" in caplog.text


def test_without_the_call_that_asks_all_engines_there_are_no_metrics(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Said once, at start; re-routing goes on."""
    monkeypatch.setitem(NEEDS["metrics"].called, "AsyncMPClient", ("gone",))
    attach = symbols.symbol("attach_router")
    wiring._export_metrics.__wrapped__()
    assert symbols.symbol("attach_router") is attach
    assert "no metrics on /metrics" in caplog.text and "AsyncMPClient.gone" in caplog.text


# --- sleep mode: buffers are unmapped, reading them would crash the worker ----------------------


def test_a_sleeping_worker_repeats_what_it_told_last() -> None:
    class Live:
        figures = tuple(range(len(COUNTERS)))
        left = (0, 0)

        @property
        def counters(self) -> torch.Tensor:
            assert not session.asleep, "the device would fault"
            return torch.tensor([self.figures])

        def place(self, index: int) -> int:
            return 0

    session: Any = SimpleNamespace(
        asleep=False,
        last_told=None,
        policy=None,
        inert=None,
        switches=0,
        fallback=None,
        shadow=None,
        traffic=None,
        layers={5: None},
        live=Live(),
        rows=SimpleNamespace(incidents=SimpleNamespace(steps=0)),
        table=SimpleNamespace(fingerprint=SimpleNamespace(E=8, K=2)),
    )
    config = SimpleNamespace(compilation_config=SimpleNamespace(_sere_session=session))
    worker = SimpleNamespace(vllm_config=config)
    calls: list[Any] = []
    telemetry.falling_asleep(lambda worker, level: calls.append(level))(worker, 2)
    told = sere_telemetry(worker)
    assert told["layers"][5] == dict(zip(COUNTERS, Live.figures, strict=True))
    with pytest.raises(ServingError, match="the engine sleeps"):
        sere_stats(worker)

    wake = telemetry.waking_up(lambda worker, tags: calls.append(tags))
    wake(worker, ["kv_cache"])
    assert sere_telemetry(worker) is told
    wake(worker)
    assert sere_telemetry(worker) is not told
    assert calls == [2, ["kv_cache"], None]
