"""Draw docs/top.svg and docs/dashboard.png from a real server under load.

`sere top` is drawn by the library that draws it in the terminal. The dashboard's queries are
answered by a real Prometheus (`apt install prometheus`) that scrapes the server; the panels are
then drawn with matplotlib at the places that the dashboard gives them: a rendering, not Grafana.

    .venv/bin/python benchmarks/telemetry_pictures.py      # about three minutes
"""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from rich.console import Console  # noqa: E402

from sere.calibration.calibrate import calibrate  # noqa: E402
from sere.demo_model.tasks import examples  # noqa: E402
from sere.files import replaced  # noqa: E402
from sere.monitoring import top  # noqa: E402
from sere.monitoring.scrape import read, view  # noqa: E402
from tests.servers import Server, openai_server  # noqa: E402

PHASE_S = 25
POLICIES = [{"S": 2}, None, {"S": 1, "rho": 0.5}, {"S": 1}]  # the last one is too greedy
PROMETHEUS = "127.0.0.1:9191"
WINDOW = "10s"
COLOURS = {"green": "#73bf69", "red": "#f2495c", "blue": "#5794f2"}


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        calibrate("demo", folder / "table.safetensors", samples=64, progress=False)
        sere = {"table": str(folder / "table.safetensors"), "S": 2}
        sere["shadow"] = {"every": 10, "bound": 0.5}
        with (
            openai_server(sere, VLLM_SERVER_DEV_MODE="1") as server,
            prometheus(folder, server),
            load(server),
        ):
            begun = time.time()
            for policy in POLICIES:
                _post(server, "/collective_rpc", {"method": "sere_policy", "args": [policy]})
                time.sleep(PHASE_S / 2)
                before = read(server.url)
                time.sleep(PHASE_S / 2)
                if policy == POLICIES[2]:
                    draw_top(view(read(server.url), before))
            draw_dashboard(begun, time.time())


@contextmanager
def load(server: Server) -> Iterator[None]:
    """Batches of greedy requests, one after the other."""
    prompts = [e.prompt for e in examples(512, seed=7, split="held_out")]
    stop = threading.Event()

    def ask() -> None:
        turn = 0
        while not stop.is_set():
            batch = [prompts[(turn * 24 + i) % len(prompts)] for i in range(24)]
            server.complete(batch, 60, ignore_eos=True)
            turn += 1

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@contextmanager
def prometheus(folder: Path, server: Server) -> Iterator[None]:
    """A Prometheus that scrapes the server every second."""
    program = shutil.which("prometheus")
    if program is None:
        raise SystemExit("no prometheus here: apt install prometheus")
    target = server.url.removeprefix("http://")
    scrape = {"job_name": "vllm", "static_configs": [{"targets": [target]}]}
    config = folder / "prometheus.yml"  # YAML holds JSON
    config.write_text(json.dumps({"global": {"scrape_interval": "1s"}, "scrape_configs": [scrape]}))
    command = [program, f"--config.file={config}", f"--web.listen-address={PROMETHEUS}"]
    command += [f"--storage.tsdb.path={folder / 'tsdb'}", "--log.level=error"]
    with subprocess.Popen(command) as process:
        try:
            yield
        finally:
            process.terminate()


def _post(server: Server, path: str, body: Any) -> None:
    request = urllib.request.Request(
        server.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    urllib.request.urlopen(request, timeout=60).close()


def draw_top(seen: Any) -> None:
    console = Console(record=True, width=112, force_terminal=True, file=io.StringIO())
    console.print(top.picture("localhost:8000", seen))
    with replaced(ROOT / "docs/top.svg") as path:
        path.write_text(console.export_svg(title="sere top localhost:8000"))


def series(expression: str, begun: float, ended: float) -> list[tuple[dict[str, str], Any]]:
    """(labels, [(seconds, value)]) of a panel's query, as Grafana would send it."""
    query = expression.replace("$__rate_interval", WINDOW).replace("$engine", ".*")
    arguments = {"query": query, "start": begun, "end": ended, "step": 1}
    url = f"http://{PROMETHEUS}/api/v1/query_range?{urllib.parse.urlencode(arguments)}"
    with urllib.request.urlopen(url, timeout=60) as response:
        found = json.load(response)["data"]["result"]
    return [(r["metric"], [(t - begun, float(v)) for t, v in r["values"]]) for r in found]


def draw_dashboard(begun: float, ended: float) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    document = json.loads((ROOT / "dashboards/sere.json").read_text())
    rows = max(p["gridPos"]["y"] + p["gridPos"]["h"] for p in document["panels"])
    plt.rcParams.update({"font.size": 8, "text.color": "#d8d9da", "axes.labelcolor": "#d8d9da"})
    plt.rcParams.update({"xtick.color": "#9fa7b3", "ytick.color": "#9fa7b3"})
    figure = plt.figure(figsize=(14, rows * 0.4), facecolor="#111217")
    for panel in document["panels"]:
        where = panel["gridPos"]
        left, bottom = where["x"] / 24, 1 - (where["y"] + where["h"]) / rows
        margins = (0.026, 0.034) if panel["type"] == "timeseries" else (0.004, 0.008)
        axes = figure.add_axes(
            (
                left + margins[0],
                bottom + margins[1],
                where["w"] / 24 - margins[0] - 0.008,
                where["h"] / rows - margins[1] - 0.026,
            ),
            facecolor="#181b1f",
        )
        axes.set_title(panel["title"], fontsize=8.5, loc="left", color="#d8d9da", pad=3)
        (_draw_lines if panel["type"] == "timeseries" else _draw_stat)(axes, panel, begun, ended)
    with replaced(ROOT / "docs/dashboard.png") as path:
        figure.savefig(path, dpi=90, format="png", facecolor=figure.get_facecolor())


def _draw_lines(axes: Any, panel: Any, begun: float, ended: float) -> None:
    factor = 100 if panel["fieldConfig"]["defaults"]["unit"] == "percentunit" else 1
    for target in panel["targets"]:
        for labels, points in series(target["expr"], begun, ended):
            legend = target["legendFormat"]
            for key, value in labels.items():
                legend = legend.replace("{{" + key + "}}", value)
            axes.plot([t for t, _ in points], [v * factor for _, v in points], label=legend, lw=1.1)
    axes.set_ylim(bottom=0)
    axes.set_xlim(0, ended - begun)
    axes.grid(color="#2c3235", lw=0.5)
    if factor == 100:
        axes.yaxis.set_major_formatter("{x:g} %")
    axes.legend(loc="upper left", ncols=4, fontsize=7, frameon=False, labelcolor="#d8d9da")


def _draw_stat(axes: Any, panel: Any, begun: float, ended: float) -> None:
    defaults = panel["fieldConfig"]["defaults"]
    ((_, points),) = series(panel["targets"][0]["expr"], begun, ended)
    value = points[-1][1]
    text = f"{value:.1%}" if defaults["unit"] == "percentunit" else f"{value:,.0f}"
    for mapping in defaults.get("mappings", []):
        text = mapping["options"].get(f"{value:g}", {"text": text})["text"]
    for step in defaults.get("thresholds", {"steps": [{"value": None, "color": "green"}]})["steps"]:
        if step["value"] is None or value >= step["value"]:
            axes.set_facecolor(COLOURS[step["color"]])
    axes.set_xticks([])
    axes.set_yticks([])
    axes.text(0.5, 0.5, text, ha="center", va="center", fontsize=15, transform=axes.transAxes)


if __name__ == "__main__":
    main()
