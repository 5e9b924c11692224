"""Renew docs/report.png: what `sere report` makes of the committed results and the demo's table.

    .venv/bin/python tools/report_picture.py

Light and dark side by side, as a browser shows them.
"""

from __future__ import annotations

import argparse
import io
import shutil
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from sere import demo_model
from sere.calibrate import calibrate
from sere.page.render import write
from tools.browser import browser

ROOT = Path(__file__).resolve().parent.parent
WIDTH, HEIGHT = 1000, 1900
COLOURS = 128  # of the PNG's palette: a quarter of the bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", default=ROOT / "docs/report.png", type=Path)
    output = parser.parse_args().output
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results"
        shutil.copytree(ROOT / "benchmarks/results", results)
        calibrate(demo_model.NAME, results / "demo.safetensors")
        page = Path(folder) / "report.html"
        write(results, page)
        light, dark = (picture(page, scheme) for scheme in ("light", "dark"))
    both = Image.new("RGB", (2 * WIDTH, HEIGHT))
    both.paste(light, (0, 0))
    both.paste(dark, (WIDTH, 0))
    both.quantize(COLOURS, dither=Image.Dither.NONE).save(output, optimize=True)
    print(f"{output}: {output.stat().st_size / 1e3:.0f} kB")


def picture(page: Path, scheme: str) -> Image.Image:
    """The top of the page in light or dark."""
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser())
        tab = chromium.new_page(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme=scheme)
        tab.goto(page.as_uri())
        tab.wait_for_function("document.querySelectorAll('.plot .main-svg').length > 0")
        tab.wait_for_timeout(500)  # plotly.js draws the rest of the figures
        found = Image.open(io.BytesIO(tab.screenshot())).convert("RGB")
        chromium.close()
    return found


if __name__ == "__main__":
    main()
