"""`sere top`: against a real server, and from written-down metrics."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest
from rich.console import Console

from sere.cli import main
from sere.demo_model.tasks import examples
from sere.monitoring import top
from sere.monitoring.scrape import Reading, read, view
from tests.servers import Server

PROMPTS = [e.prompt for e in examples(24, seed=7, split="held_out")]


def shown(text: str, earlier: str | None = None) -> str:
    """What the terminal shows of a reading, or of two that are two seconds apart."""
    before = None if earlier is None else Reading(earlier, 10.0)
    console = Console(width=120)
    with console.capture() as captured:
        console.print(top.picture("host:8000", view(Reading(text, 12.0), before)))
    return captured.get()


def metrics(
    *, steps: int, fast: int, engines: tuple[int, ...] = (0,), reason: str = "", up: int = 1
) -> str:
    """As a server with one layer writes them; everything follows from its steps and fast rows."""
    lines = [f"sere_up {up}", f'vllm:generation_tokens_total{{engine="0"}} {10 * fast}']
    for engine in engines:
        where = f'engine="{engine}",layer="3"'
        lines += [
            f'sere_policy_info{{engine="{engine}",policy="stock",reason="{reason}"}} 1',
            f"sere_steps_total{{{where}}} {steps}",
            f"sere_active_experts_before_total{{{where}}} {16 * steps}",
            f"sere_active_experts_after_total{{{where}}} {8 * steps}",
            f"sere_slots_total{{{where}}} {4 * fast}",
            f"sere_slots_rerouted_total{{{where}}} {1 * fast}",
            f"sere_slots_critical_total{{{where}}} {2 * fast}",
            f'sere_rows_total{{{where},row_class="fast"}} {fast}',
            f'sere_rows_total{{{where},row_class="exact"}} 7',
        ]
    return "\n".join(lines) + "\n"


@pytest.mark.engine
@pytest.mark.modes
def test_a_real_server_is_shown(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.complete(PROMPTS, 12, ignore_eos=True)
    assert main(["top", server.url, "--json"]) == 0
    seen = json.loads(capsys.readouterr().out)
    assert [layer["layer"] for layer in seen["layers"]] == [0, 1, 2, 3]
    for layer in seen["layers"]:
        assert 0 < layer["active_after"] < layer["active_before"] <= 32
        assert 0 < layer["rerouted"] < 1
        assert layer["fast"] >= 11 * len(PROMPTS)
        assert 0 <= layer["surrendered"] < 0.5
        assert 0 <= layer["error"] < 0.5
    assert json.loads(seen["policies"]["0"])["S"] == 3

    assert main(["top", server.url.removeprefix("http://"), "--once"]) == 0
    assert "since start" in capsys.readouterr().out
    before = read(server.url)
    server.complete(PROMPTS, 12, ignore_eos=True)
    now = read(server.url)
    assert view(now, before).tokens_per_s == pytest.approx(12 * len(PROMPTS) / (now.at - before.at))


def test_figures_are_of_the_time_between_two_readings() -> None:
    text, earlier = metrics(steps=30, fast=300), metrics(steps=20, fast=100)
    assert "1,000 tokens/s" in shown(text, earlier)  # 2000 tokens in 2 s
    assert "tokens/s" not in shown(text)
    (layer,) = view(Reading(text, 12.0), Reading(earlier, 10.0)).layers
    assert (layer.active_before, layer.active_after) == (16, 8)
    assert (layer.rerouted, layer.critical) == (0.25, 0.5)
    assert (layer.fast, layer.exact) == (200, 0)
    assert layer.error is None


def test_a_reset_in_between_does_not_count_backwards() -> None:
    (layer,) = view(
        Reading(metrics(steps=3, fast=30), 12.0), Reading(metrics(steps=20, fast=100), 10.0)
    ).layers
    assert layer.fast == 30
    assert layer.active_before == 16


def test_idle_layers_have_no_figures() -> None:
    text = metrics(steps=0, fast=0)
    (layer,) = view(Reading(text, 12.0)).layers
    assert layer.rerouted is layer.active_before is None
    assert "-" in shown(text)


def test_engines_states_and_fallbacks_are_shown() -> None:
    one = shown(metrics(steps=3, fast=30))
    assert "16.0 ->    8.0" in one
    assert one.count("\u2588") == one.count("\u2591") == top._BAR  # half, in two rows
    assert "0/3" not in one and "the engine does not answer" not in one
    two = shown(metrics(steps=3, fast=30, engines=(0, 1), reason="layer 3 differed", up=0))
    assert "0/3" in two and "1/3" in two
    assert "engine 1 FELL BACK TO STOCK ROUTING: layer 3 differed" in two
    assert "the engine does not answer" in two


def test_a_narrow_terminal_shows_every_figure_and_no_bars() -> None:
    text = metrics(steps=30_000, fast=1_234_567)
    console = Console(width=80)
    with console.capture() as captured:
        console.print(top.picture("host:8000", view(Reading(text, 12.0)), wide=False))
    said = captured.get()
    assert "\u2026" not in said and "\u2588" not in said  # nothing is cut
    for name in ("re-routed", "critical", "rows fast", "exact", "weight moved", "1,234,567"):
        assert name in said


@pytest.fixture
def without_sere() -> Iterator[str]:
    """A server whose /metrics hold nothing of ours."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"vllm:num_requests_running 0\n")

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def test_a_server_without_sere_is_one_clear_line(
    without_sere: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["top", without_sere, "--once"]) == 1
    complaint = capsys.readouterr().err
    assert complaint.count("\n") == 1
    assert "/metrics has no metrics of sere: start vLLM with --additional-config" in complaint
