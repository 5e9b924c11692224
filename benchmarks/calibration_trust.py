"""How much of a table is the model's, and how much the text's? Measured on the demo model.

    python benchmarks/calibration_trust.py -o benchmarks/results/calibration_trust.json

Tables from the demo's own tasks (two seeds), from code and from prose (the standard library of the
Python that runs this: its sources without docstrings, and its docstrings), and two null models; how
far they agree, by measure. And how stable a table is by the number of texts.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import json
import sysconfig
import tempfile
from pathlib import Path
from statistics import mean

from tqdm import tqdm

from sere.calibration.calibrate import calibrate
from sere.calibration.compare import compare
from sere.results import provenance
from sere.table import Table

METHODS = ("frobenius", "cosine", "directed")
SAMPLES = (25, 100, 400)
_TEXTS, _CHARACTERS = 200, 240


def main() -> None:
    """Calibrate on each, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("-o", "--output", default="calibration_trust.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        code, prose = library_texts(folder)
        agreement = {m: agreements(m, folder, code, prose) for m in tqdm(METHODS, "measures")}
        stable = {m: stabilities(m, folder) for m in tqdm(METHODS, "stability")}
    result = {"provenance": provenance.provenance(), "agreement": agreement, "stability": stable}
    provenance.save_json(arguments.output, result)
    print(as_text(result))


def library_texts(folder: Path) -> tuple[Path, Path]:
    """Two files of texts: code without docstrings, and docstrings."""
    code: list[str] = []
    prose: list[str] = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        tree = ast.parse(path.read_text("utf-8", errors="replace"))
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.body:
                text = ast.get_docstring(node)
                if text and len(text) > _CHARACTERS // 4:
                    prose.append(text[:_CHARACTERS])
                    node.body = node.body[1:] or [ast.Pass()]
            if isinstance(node, ast.FunctionDef):
                code.append(ast.unparse(node)[:_CHARACTERS])
    files = folder / "code.jsonl", folder / "prose.jsonl"
    for file, texts in zip(files, (code, prose), strict=True):
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return files


def agreements(method: str, folder: Path, code: Path, prose: Path) -> dict[str, dict[str, float]]:
    """Of every pair of tables: means over layers."""
    settings = {"samples": _TEXTS, "progress": False}
    out = folder / "table"
    tables: dict[str, Table] = {
        "tasks": calibrate("demo", out, method=method, **settings),
        "tasks, other seed": calibrate("demo", out, method=method, seed=1, **settings),
        "code": calibrate("demo", out, method=method, data=code, **settings),
        "prose": calibrate("demo", out, method=method, data=prose, **settings),
        "weights": calibrate("demo", out, method="weights", progress=False),
        "random": calibrate("demo", out, method="random", progress=False),
    }
    found = {}
    for one, other in itertools.combinations(tables, 2):
        layers = compare(tables[one], tables[other])
        found[f"{one} / {other}"] = {
            "same_replacement": mean(layer.same_choice for layer in layers),
            "rank_correlation": mean(layer.rank_correlation for layer in layers),
        }
    return found


def stabilities(method: str, folder: Path) -> dict[str, dict[str, float]]:
    """By number of texts: what the bootstrap foretells, and what another draw of texts says."""
    found = {}
    for samples in SAMPLES:
        pair = [
            calibrate("demo", folder / "t", method=method, samples=samples, seed=s, progress=False)
            for s in (10, 11)
        ]
        found[str(samples)] = {
            "foretold": mean(layer.stability or 0 for layer in pair[0].layers.values()),
            "seen": mean(layer.same_choice for layer in compare(*pair)),
        }
    return found


def as_text(result: dict[str, dict[str, dict[str, dict[str, float]]]]) -> str:
    """For people."""
    agreement, stable = result["agreement"], result["stability"]
    pairs = [
        [pair, *(f"{agreement[m][pair]['same_replacement']:.0%}" for m in METHODS)]
        for pair in agreement[METHODS[0]]
    ]
    counts = [
        [
            f"{count} texts",
            *("{foretold:.0%} / {seen:.0%}".format(**stable[m][count]) for m in METHODS),
        ]
        for count in map(str, SAMPLES)
    ]
    return (
        provenance.text_table(["same replacements", *METHODS], pairs)
        + "\n\n"
        + provenance.text_table(["stability, foretold / seen", *METHODS], counts)
    )


if __name__ == "__main__":
    main()
