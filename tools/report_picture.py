"""Renew docs/report.png: what `sere report` makes of the committed results and a run of every verb.

    .venv/bin/python tools/report_picture.py [--results FOLDER]

Figures of the page side by side, as a browser draws them, the last rows in the dark. Takes ten
minutes: the bundled model is calibrated, timed, put under load, tuned and evaluated. FOLDER: keep
these results there, or take them from there if it exists.
"""

from __future__ import annotations

import argparse
import io
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from sere.page.render import write  # noqa: E402
from tools.browser import browser  # noqa: E402

WIDTH, GAP, SCALE = 1000, 12, 1.4  # of the whole picture; CSS pixels, and pixels to one of them
COLOURS = 256  # of the PNG's palette: a third of the bytes
# A row: figures by their titles and, where a page has several alike, by their file.
ROWS: Sequence[tuple[str, Sequence[tuple[str, str]]]] = (
    ("light", [("Speed-up and time per token against batch size", "bench_cpu_qwen3.json")]),
    ("light", [("Latency and throughput by rate of requests", "load.json")]),
    (
        "light",
        [
            ("Loss against active experts, of all that the tuner tried", "tuning.json"),
            ("Accuracy by kind of task", "demo.json"),
        ],
    ),
    ("light", [("Pareto front: quality against active experts", "pareto.json")]),
    ("light", [("Pareto front: quality against time per token", "evaluation.json")]),
    (
        "dark",
        [
            ("Similarity of experts, layer by layer", "demo.table"),
            ("Agreement of two tables", "calibration_trust.json"),
        ],
    ),
    ("dark", [("Answers that depend on the batch", "composition.json")]),
)
POLICIES = ['{"S": 2}', '{"S": 1}', '{"S": 1, "tau": 0.05, "min_active": 1}']
PAPER = {"light": "#ffffff", "dark": "#13161a"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", default=ROOT / "docs/report.png", type=Path)
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        results = arguments.results or Path(temporary) / "results"
        if not results.exists():
            measure(results)
        page = Path(temporary) / "report.html"
        write(results, page)
        picture = drawn(page)
    picture.quantize(COLOURS, dither=Image.Dither.NONE).save(arguments.output, optimize=True)
    print(f"{arguments.output}: {arguments.output.stat().st_size / 1e3:.0f} kB")


def measure(results: Path) -> None:
    """The committed results, and one of every verb on the bundled model."""
    shutil.copytree(ROOT / "benchmarks/results", results)

    def sere(*words: str) -> None:
        subprocess.run([sys.executable, "-m", "sere", *words], cwd=results, check=True)

    model = ("demo", "demo.table")
    policies = [word for policy in POLICIES for word in ("--policy", policy)]
    batches = [word for batch in (1, 8, 32) for word in ("--batch", str(batch))]
    rates = [word for rate in (10, 20, 40, "inf") for word in ("--rate", str(rate))]
    lengths = ["--input-len", "64", "--batch", "32"]
    sere("calibrate", "demo", "-o", "demo.table")
    sere("bench", *model, *policies, *batches, "-o", "bench_demo.json")
    sere("bench", *model, *policies, *rates, *lengths, "-o", "load.json")
    # as if experts were large: on the bundled model's nothing pays
    sere("tune", *model, *batches, "--samples", "256", "--expert-mb", "9.4", "-o", "tuning.json")
    sere("evaluate", *model, *policies, *batches[2:], "--samples", "256", "-o", "evaluation.json")


def drawn(page: Path) -> Image.Image:
    """The rows one below the other."""
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser())
        rows = [row(chromium, page, scheme, figures) for scheme, figures in ROWS]
        chromium.close()
    whole = Image.new("RGB", (rows[0].width, sum(one.height for one in rows)), PAPER["light"])
    top = 0
    for one in rows:
        whole.paste(one, (0, top))
        top += one.height
    return whole


def row(
    chromium: Browser, page: Path, scheme: str, figures: Sequence[tuple[str, str]]
) -> Image.Image:
    """Figures side by side, on a page as narrow as makes them fit."""
    width = (WIDTH - GAP) // len(figures) - GAP
    tab = chromium.new_page(
        viewport={"width": width, "height": 1200}, color_scheme=scheme, device_scale_factor=SCALE
    )
    tab.goto(page.as_uri())
    tab.add_style_tag(content="body { padding: 0 !important; }")
    tab.evaluate("dispatchEvent(new Event('resize'))")
    tab.wait_for_function("document.querySelectorAll('.plot .main-svg').length > 0")
    tab.wait_for_timeout(1500)  # plotly.js draws the rest of the figures
    parts = []
    for title, file in figures:
        figure = tab.locator("figure").filter(has_text=title).filter(has_text=file).first
        parts.append(Image.open(io.BytesIO(figure.screenshot())).convert("RGB"))
    tab.close()
    gap = round(GAP * SCALE)
    size = (round(WIDTH * SCALE), max(part.height for part in parts) + gap)
    found = Image.new("RGB", size, PAPER[scheme])
    left = gap
    for part in parts:
        found.paste(part, (left, gap // 2))
        left += part.width + gap
    return found


if __name__ == "__main__":
    main()
