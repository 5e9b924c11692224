"""Documentation that is executed does not rot: README's commands, figures, links and maps."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from textwrap import indent
from typing import Any

import pytest

from sere.bench_result import table as bench_table
from sere.bench_setup import contender_of
from sere.cli import parser
from sere.demo import as_text
from sere.harness import as_text as tasks_table
from sere.policy import Policy
from sere.serving.settings import Settings
from sere.table import Table
from sere.tune import as_text as tuning_table
from tests.doc_blocks import blocks, complaints, script
from tests.engines import environment

ROOT = Path(__file__).parent.parent
README_PATH = ROOT / "README.md"
README = README_PATH.read_text()
COMMANDS = "\n".join(block.text for block in blocks(README_PATH) if block.language == "bash")
EXECUTED = ("README.md", "tutorial.md")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_make_targets_exist() -> None:
    rules = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^make (\w+)$", COMMANDS, flags=re.M)
    assert targets == ["demo", "test"]
    for target in targets:
        assert re.search(rf"^{target}:", rules, flags=re.M)


def test_the_server_command_is_valid() -> None:
    (command,) = [line for line in COMMANDS.splitlines() if "vllm serve" in line]
    words = shlex.split(command)
    given = json.loads(words[words.index("--additional-config") + 1])["sere"]
    table = given.pop("table")
    assert table.endswith(".safetensors")
    Policy.from_dict(given)


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


@pytest.mark.engine
def test_readme_runs_as_written(tmp_path: Path) -> None:
    """Its commands, then its script with what other pages add to it."""
    (code,) = [block for block in blocks(README_PATH) if block.language == "python"]
    more = [
        block.text
        for page in PAGES
        for block in blocks(page)
        if block.marker == "continues: README.md"
    ]
    assert len(more) == 1
    (tmp_path / "serve.py").write_text(code.text + indent("\n".join(more), " " * 4))
    own = [b.text for b in blocks(README_PATH) if b.language == "bash" and b.runs]
    lines = [line for line in "".join(own).splitlines() if not line.startswith("make ")]
    out = execute("\n".join(["set -e", *lines, "python serve.py"]), tmp_path)
    assert (tmp_path / "heatmaps.png").read_bytes().startswith(b"\x89PNG")
    assert "53390>09335" in out
    assert "'slots_rerouted'" in out


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


def execute(commands: str, folder: Path) -> str:
    """Output of a bash script; what it leaves running ends with it."""
    env = environment(VLLM_ENABLE_V1_MULTIPROCESSING="1", PORT=str(free_port()))
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    log = folder / "log.txt"
    with log.open("w") as output:
        running = subprocess.Popen(
            ["bash", "-c", commands],
            cwd=folder,
            env=env,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = running.wait(timeout=600)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(running.pid, signal.SIGKILL)
    assert status == 0, log.read_text()[-4000:]
    return log.read_text()


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def test_figures_are_those_of_the_committed_result() -> None:
    result = json.loads((ROOT / "benchmarks/results/demo.json").read_text())
    assert as_text(result) in README
    made = result["provenance"]
    assert made["date"][:10] in README
    assert made["machine"] in README


def test_the_tables_of_policies_are_the_committed_results() -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from composition import as_text as company_table
    from pareto import as_text as pareto_table
    from tuned import as_text as tuned_table

    def result(name: str) -> Any:
        return json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())

    page = (ROOT / "docs/policies.md").read_text()
    tables = [pareto_table(result("pareto")["arms"], batch) for batch in ("8", "32")]
    tables += [company_table(result("composition")), tuned_table(result("tuned"))]
    tables += [tuning_table(result("tuned")["tuning"]), tasks_table(result("lm_eval"))]
    for table in tables:
        assert "\n".join(line.rstrip() for line in table.splitlines()) in page


@pytest.mark.parametrize("result", sorted((ROOT / "benchmarks/results").glob("bench_cpu*.json")))
def test_benchmark_tables_are_those_of_the_committed_results(result: Path) -> None:
    page = (ROOT / "docs/benchmarks.md").read_text()
    found = json.loads(result.read_text())
    assert bench_table(found["results"]) in page
    assert found["provenance"]["machine"] in page
    assert f"{found['layers']} of {found['of_layers']} layers" in page
    assert result.name in page


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
    assert len(README.splitlines()) < 160


def test_every_setting_is_documented() -> None:
    page = (ROOT / "docs/serving.md").read_text()
    for name in [f.name for f in (*fields(Policy), *fields(Settings))]:
        assert name == "policy" or f"| `{name}` |" in page


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_the_map_names_every_module() -> None:
    page = (ROOT / "docs/design.md").read_text()
    for path in (ROOT / "src/sere").glob("*.py"):
        assert path.name.startswith("__") or path.name in page, path.name
