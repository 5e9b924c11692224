"""Documentation that is executed does not rot: README's commands, figures, links and maps."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from sere.bench_result import table as bench_table
from sere.bench_setup import contender_of
from sere.cli import parser
from sere.demo import as_text
from sere.policy import Policy
from sere.serving.settings import Settings
from tests.engines import environment

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


def test_make_targets_exist() -> None:
    rules = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^make (\w+)$", "\n".join(blocks("bash")), flags=re.M)
    assert targets == ["demo", "test"]
    for target in targets:
        assert re.search(rf"^{target}:", rules, flags=re.M)


def test_the_server_command_is_valid() -> None:
    (command,) = [line for line in "\n".join(blocks("bash")).splitlines() if "vllm serve" in line]
    words = shlex.split(command)
    given = json.loads(words[words.index("--additional-config") + 1])["sere"]
    table = given.pop("table")
    assert table.endswith(".safetensors")
    Policy.from_dict(given)


@pytest.mark.engine
def test_commands_and_code_run_as_written(tmp_path: Path) -> None:
    env = environment(VLLM_ENABLE_V1_MULTIPROCESSING="1")
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    for line in "\n".join(blocks("bash")).splitlines():
        if line.startswith("sere "):
            subprocess.run(shlex.split(line), cwd=tmp_path, env=env, check=True)
    assert (tmp_path / "heatmaps.png").read_bytes().startswith(b"\x89PNG")
    (code,) = blocks("python")
    script = tmp_path / "serve.py"
    script.write_text(code)
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "53390>09335" in done.stdout
    assert "'slots_rerouted'" in done.stdout


def test_figures_are_those_of_the_committed_result() -> None:
    result = json.loads((ROOT / "benchmarks/results/demo.json").read_text())
    assert as_text(result) in README
    made = result["provenance"]
    assert made["date"][:10] in README
    assert made["machine"] in README


def test_the_table_of_policies_is_the_committed_result() -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from pareto import as_text as pareto_table

    arms = json.loads((ROOT / "benchmarks/results/pareto.json").read_text())["arms"]
    page = (ROOT / "docs/policies.md").read_text()
    for batch in ("8", "32"):
        assert "\n".join(line.rstrip() for line in pareto_table(arms, batch).splitlines()) in page


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
    lines = [line.strip() for line in page.splitlines() if line.startswith("    sere ")]
    assert len(lines) >= 8
    for line in lines:
        given = parser().parse_args(shlex.split(line)[1:])
        for policy in getattr(given, "policies", None) or []:
            contender_of(policy, Path("absent"))


def test_the_table_of_company_is_the_committed_result() -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from composition import as_text as company_table

    result = json.loads((ROOT / "benchmarks/results/composition.json").read_text())
    lines = [line.rstrip() for line in company_table(result).splitlines()]
    assert "\n".join(lines) in (ROOT / "docs/policies.md").read_text()


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
