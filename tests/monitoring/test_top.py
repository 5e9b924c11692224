"""`sere top`: against a real server, and from written-down metrics."""

from __future__ import annotations

import io
import json
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
    told = capsys.readouterr().out
    assert "since start" in told and "engine 0: S=3" in told
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


def test_an_engine_that_re_routes_nothing_is_marked() -> None:
    enabled = 'sere_enabled{engine="0"} 1\nsere_enabled{engine="1"} 0\n'
    said = shown(metrics(steps=3, fast=30, engines=(0, 1)) + enabled)
    assert "engine 1: stock, NOTHING IS RE-ROUTED" in said
    assert said.count("NOTHING") == 1


def test_figures_of_several_policies_are_said_to_be() -> None:
    """Those since the start, after a switch, are not of the policy above them."""
    text, switches = metrics(steps=30, fast=300), 'sere_policy_switches_total{engine="0"} '
    said = shown(text + switches + "2\n")
    assert "engine 0 was switched 2 times in that time: figures are of all its policies" in said
    earlier = metrics(steps=20, fast=100)
    assert "switched" not in shown(text + switches + "2\n", earlier + switches + "2\n")
    assert "switched once" in shown(text + switches + "2\n", earlier + switches + "1\n")


def test_steps_that_the_policy_leaves_to_stock_are_told() -> None:
    """They are in no average: a server whose steps are mostly of such sizes looked idle."""
    text = metrics(steps=30, fast=300)
    assert "leaves to stock" not in shown(text + 'sere_left_steps_total{engine="0"} 0\n')
    said = shown(text + 'sere_left_steps_total{engine="0"} 1234\n')
    assert "engine 0: 1,234 steps more are of sizes that its policy leaves to stock" in said


def test_what_is_not_measured_says_why() -> None:
    text = metrics(steps=30, fast=300)
    assert "of the shadow check" in shown(text) and "rows exact: prompts'" in shown(text)
    checked = 'sere_shadow_error{engine="0",layer="3"} 0.1\n'
    assert "of the shadow check" not in shown(text + checked)


def test_a_narrow_terminal_shows_every_figure_and_no_bars() -> None:
    text = metrics(steps=30_000, fast=1_234_567)
    console = Console(width=80)
    with console.capture() as captured:
        console.print(top.picture("host:8000", view(Reading(text, 12.0)), wide=False))
    said = captured.get()
    assert "\u2026" not in said and "\u2588" not in said  # nothing is cut
    for name in ("re-routed", "critical", "rows", "fast", "exact", "weight", "moved", "1,234,567"):
        assert name in said


# --- what a server does not tell, restarts, and answers that are none -----------------------------


def test_what_a_server_does_not_tell_is_unknown_and_not_zero() -> None:
    """With --disable-log-stats vLLM counts nothing; an older sere had no rows, say."""
    told = [line for line in metrics(steps=30, fast=300).splitlines() if "vllm" not in line]
    text, earlier = "\n".join(told), "\n".join(told).replace("300", "100")
    assert "tokens/s unknown   requests running unknown" in shown(text + "\n", earlier + "\n")
    seen = view(Reading(text + "\n", 12.0), Reading(earlier + "\n", 10.0))
    assert seen.tokens_per_s is seen.running is None
    few = [line for line in told if "sere_rows" not in line and "slots_total" not in line]
    (layer,) = view(Reading("\n".join(few) + "\n", 12.0)).layers
    assert layer.fast is layer.exact is layer.rerouted is None
    assert layer.active_before == 16


@pytest.mark.parametrize("start", [None, (100, 160)])
def test_a_restart_is_noticed_and_nothing_is_negative(start: tuple[int, int] | None) -> None:
    """By the counters, or, where they have overtaken the old ones, by when the process began."""
    earlier, text = metrics(steps=20, fast=100), metrics(steps=3, fast=30)
    if start is not None:
        text = metrics(steps=40, fast=130)
        earlier += f"process_start_time_seconds {start[0]}\n"
        text += f"process_start_time_seconds {start[1]}\n"
    seen = view(Reading(text, 12.0), Reading(earlier, 10.0))
    (layer,) = seen.layers
    assert seen.restarted
    assert layer.fast == (30 if start is None else 130)
    assert seen.tokens_per_s == 10 * layer.fast / 2
    assert "the server was restarted" in shown(text, earlier)
    assert "the server was restarted" not in shown(text, text)


class Answers:
    """A server that gives one answer after the other, and the last one for ever."""

    def __init__(self, *answers: str | int) -> None:
        left = list(answers)

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                answer = left.pop(0) if len(left) > 1 else left[0]
                body = answer.encode() if isinstance(answer, str) else b""
                if answer == -1:  # less than was announced
                    body, length = b"sere_up 1\n", 1000
                else:
                    length = len(body)
                self.send_response(answer if isinstance(answer, int) and answer > 0 else 200)
                self.send_header("Content-Length", str(length))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> str:
        Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self.url

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def interrupt_after(waits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C, once so many pauses between pictures are over."""
    left = iter(range(waits))

    def wait(seconds: float) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt

    monkeypatch.setattr(top.time, "sleep", wait)


def test_following_goes_on_while_a_server_restarts(monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_after(4, monkeypatch)
    console = Console(width=160, record=True, file=io.StringIO(), force_terminal=True)
    before, after = metrics(steps=20, fast=100), metrics(steps=3, fast=30)
    with Answers(before, 503, -1, after) as url:
        top.follow(url, 2.0, console)  # ends with Ctrl-C, without a word
    said = console.export_text()
    assert "HTTP 503" in said and "figures are old" in said
    assert "IncompleteRead" in said
    assert "the server was restarted" in said


def test_into_a_file_pictures_follow_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_after(1, monkeypatch)
    console = Console(width=120, file=(file := io.StringIO()))
    answers = Answers(metrics(steps=20, fast=100), metrics(steps=30, fast=300))
    with answers as url:
        top.follow(url, 2.0, console)  # ends with Ctrl-C, without a word
    assert file.getvalue().count("sere top") == 2 and "since start" in file.getvalue()


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        ("vllm:num_requests_running 0\n", "/metrics has no metrics of sere: start vLLM with --add"),
        ("sere_up one\n", "/metrics answers metrics that cannot be read"),
        (401, "/metrics answers HTTP 401 (Unauthorized): is that the address"),
        (-1, "/metrics cannot be read (IncompleteRead"),
    ],
)
def test_an_answer_that_holds_no_metrics_is_one_clear_line(
    answer: str | int, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with Answers(answer) as url:
        assert main(["top", f"{url}/v1", "--once"]) == 1
    said = capsys.readouterr().err
    assert complaint in said
    assert said.count("\n") == 1
