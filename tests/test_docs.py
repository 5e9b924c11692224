"""Documentation that is executed does not rot: README's commands, figures, links and maps."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

from sere.cli import parser
from sere.policy import Policy
from sere.serving.settings import Settings
from sere.speed.setup import contender_of
from sere.table import Table
from tests.doc_blocks import blocks, complaints, execute, script
from tools import tables

ROOT = Path(__file__).parent.parent
README_PATH = ROOT / "README.md"
README = README_PATH.read_text()
COMMANDS = "\n".join(block.text for block in blocks(README_PATH) if block.language == "bash")
EXECUTED = ("README.md", "tutorial.md", "benchmarks.md")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_make_targets_exist() -> None:
    rules = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^make (\w+)$", COMMANDS, flags=re.M)
    assert targets == ["demo", "test"]
    for target in targets:
        assert re.search(rf"^{target}:", rules, flags=re.M)


def test_the_server_commands_are_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first needs nothing to be prepared but text; the other a table."""
    lines = [line for line in COMMANDS.splitlines() if "vllm serve" in line]
    alone, prepared = (
        json.loads(words[words.index("--additional-config") + 1])["sere"]
        for words in map(shlex.split, lines)
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / alone["auto"]["data"]).touch()
    assert Settings.parse(alone, model_folder=None, model_default={}).auto is not None
    assert prepared.pop("table").endswith(".safetensors")
    Policy.from_dict(prepared)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_block_runs_or_says_why_not(page: Path) -> None:
    assert complaints(page) == []
    if page.name not in EXECUTED:
        assert not [block for block in blocks(page) if block.runs], "add the page to EXECUTED"


def test_blocks_that_are_neither_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- needs: luck -->\n```bash\nls\n```\n\n```\nx\n```\n\n    ls -l\n\n"
        "<!-- needs: gpu -->\n```bash\nls\n```\n\n```text\nout\n```\n"
    )
    luck, language, indent = complaints(page)
    assert "needs 'luck'" in luck and "name a language" in language and "fence it" in indent


@pytest.mark.modes
def test_the_tutorial_runs_as_written(tmp_path: Path) -> None:
    page = ROOT / "docs/tutorial.md"
    out = execute(script(page, tmp_path), tmp_path)
    assert Table.load(tmp_path / "demo.table").policy is not None
    assert "53390>09335" in out
    assert "</html>" in (tmp_path / "report.html").read_text()
    for block in blocks(page):
        if block.language == "text":  # what it shows is what is printed, up to the figures
            head = re.sub(r"\s+", " ", block.text.splitlines()[0])
            assert head in re.sub(r"\s+", " ", out), head


def test_the_benchmarks_page_runs_as_written() -> None:
    """From the root of the repository, as its commands name files of it."""
    out = execute("\n".join(b.text for b in blocks(ROOT / "docs/benchmarks.md") if b.runs), ROOT)
    assert "operator" in out


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_measured_tables_are_those_of_the_committed_results(page: Path) -> None:
    """`python tools/tables.py` renews them."""
    assert tables.renewed(page.read_text()) == page.read_text()


def test_every_measured_table_is_renewed() -> None:
    """Nobody has to paste: what measures has its region, and a table is in one."""
    regions = [found["key"] for page in PAGES for found in tables.REGION.finditer(page.read_text())]
    assert {key.split()[0] for key in regions} == set(tables.RENDERERS)
    for result in (ROOT / "benchmarks/results").glob("bench_*.json"):
        assert any(result.stem in key.split() for key in regions), result.name
    for page in PAGES:
        rest = tables.REGION.sub("", page.read_text())
        # A line that begins with a comment is HTML to Markdown, all of it.
        assert not re.search(r"^ *<!-- from: [^>]+-->.", page.read_text(), flags=re.M), page.name
        assert "TPOT ms (quartiles)" not in rest and "active experts, layer" not in rest


def test_a_stale_figure_is_renewed_and_an_unknown_one_refused() -> None:
    key = '<!-- from: speedup bench_cpu_qwen3 "S=1 merge" 8 -->'
    found = json.loads((ROOT / "benchmarks/results/bench_cpu_qwen3.json").read_text())
    (arms,) = [each["arms"] for each in found["results"] if each["batch"] == 8]
    (arm,) = [arm for arm in arms if arm["merge"]]
    page = f"It is {key}9.99x<!-- end --> as fast."
    assert tables.renewed(page) == page.replace("9.99", f"{arm['speedup']:.2f}")
    with pytest.raises(ValueError, match="expected one of demo, bench"):
        tables.renewed("<!-- from: guesses demo -->\n<!-- end -->")


def test_benchmark_commands_are_valid() -> None:
    """Those that need a model or a GPU are parsed, not run."""
    page = (ROOT / "docs/benchmarks.md").read_text().replace('"${P[@]}"', "").replace("$B", "")
    lines = [line.strip() for line in page.splitlines() if line.startswith("sere ")]
    assert len(lines) >= 8
    for line in lines:
        given = parser().parse_args(shlex.split(line)[1:])
        for policy in getattr(given, "policies", None) or []:
            contender_of(policy, Path("absent"))


def test_readme_is_short() -> None:
    """What people wrote: measured tables have the length that they have."""
    prose = re.sub(r"^<!-- from: .*?^<!-- end -->$", "", README, flags=re.M | re.S)
    assert len(prose.splitlines()) < 180


def test_every_setting_is_documented() -> None:
    page = (ROOT / "docs/serving.md").read_text()
    for name in [f.name for f in (*fields(Policy), *fields(Settings))]:
        assert name in ("policy", "named") or f"| `{name}` |" in page


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_tests_that_pages_name_exist() -> None:
    tests = [*ROOT.glob("tests/**/*.py")]
    known = {path.stem for path in tests}
    known |= {name for path in tests for name in re.findall(r"def (test_\w+)", path.read_text())}
    for page in PAGES:
        for name in re.findall(r"\btest_\w+", page.read_text()):
            # Or how several begin: test_void_...
            begins = name.endswith("_") and any(one.startswith(name) for one in known)
            assert name in known or begins, f"{page.name}: {name}"


def test_the_map_names_every_module() -> None:
    page = (ROOT / "docs/design.md").read_text()
    for path in (ROOT / "src/sere").rglob("*.py"):
        assert path.name.startswith("__") or re.search(rf"\b{path.stem}\b", page), path
