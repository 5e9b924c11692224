"""What a user installs: a wheel built from the sdist, in an environment that lacks the checkout."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
from importlib.metadata import PathDistribution
from pathlib import Path
from textwrap import indent

import pytest
import tomllib

import sere
from sere.results.commit import of_checkout
from sere.table import Table
from tests.doc_blocks import blocks, execute

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DATA = ("py.typed", "kernels/reroute.cu", "demo_model/model.safetensors", "demo_model/config.json")
DATA += ("demo_model/tokenizer.json", "page/page.html", "page/page.css", "page/page.js")


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the unpacked sdist, so that nothing which only the checkout has can get in."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", folder)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    source = folder / archive.name.removesuffix(".tar.gz")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=source)
    shutil.rmtree(source)
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with sere alone: its bin folder."""
    folder = tmp_path_factory.mktemp("fresh")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", wheel)
    return folder / "bin"


def site_packages(installed: Path) -> Path:
    (found,) = (installed.parent / "lib").glob("python*/site-packages")
    return found


def test_help_and_version_need_no_other_package(installed: Path, tmp_path: Path) -> None:
    assert run(installed / "sere", "--version", cwd=tmp_path) == f"sere {sere.__version__}\n"
    assert "calibrate" in run(installed / "sere", "--help", cwd=tmp_path)
    assert run(installed / "python", "-m", "sere", "--version", cwd=tmp_path)


def test_everything_that_is_no_module_came_along(installed: Path) -> None:
    package = site_packages(installed) / "sere"
    for name in DATA:
        assert (package / name).read_bytes() == (ROOT / "src/sere" / name).read_bytes(), name
    modules = {path.relative_to(package) for path in package.rglob("*.py")}
    assert modules == {
        path.relative_to(ROOT / "src/sere") for path in (ROOT / "src/sere").rglob("*.py")
    }


def test_an_installed_package_knows_its_commit(installed: Path, tmp_path: Path) -> None:
    """Of the checkout that it was built in, and not of the folder in which it is installed."""
    asked = "from sere.results.commit import commit; print(commit())"
    said = run(installed / "python", "-I", "-c", asked, cwd=tmp_path).strip()
    assert said == run("git", "describe", "--always", "--dirty", "--abbrev=12").strip()
    run("git", "init", "-q", tmp_path)
    author = ["-c", "user.name=a", "-c", "user.email=b"]
    run("git", *author, "commit", "-q", "--allow-empty", "-m", "of somebody else", cwd=tmp_path)
    assert of_checkout(tmp_path / "commit.py") is None
    assert of_checkout(ROOT / "src/sere/results/commit.py") == said


def test_metadata_says_what_pyproject_says(installed: Path) -> None:
    (info,) = site_packages(installed).glob("sere-*.dist-info")
    distribution = PathDistribution(info)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    metadata = distribution.metadata
    assert metadata["License-Expression"] == "Apache-2.0"
    assert (info / "licenses" / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    assert set(metadata.get_all("Provides-Extra") or []) == set(project["optional-dependencies"])
    assert metadata.get_all("Classifier") == project["classifiers"]
    points = {(point.group, point.name, point.value) for point in distribution.entry_points}
    assert points == {
        ("console_scripts", "sere", "sere.cli:main"),
        ("vllm.general_plugins", "sere", "sere.serving.vllm_plugin:register"),
    }
    assert f"## {distribution.version}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.fixture(scope="module")
def beside_vllm(installed: Path) -> Path:
    """With this environment's other packages, vLLM among them, and none of this checkout's files
    on the path."""
    others = Path(sysconfig.get_path("purelib"))
    (site_packages(installed) / "others.pth").write_text(f"{others}\n")
    return installed


def test_the_installed_package_works_beside_its_dependencies(
    beside_vllm: Path, table: Table, tmp_path: Path
) -> None:
    installed = beside_vllm
    table.save(tmp_path / "sere.table")
    found = json.loads(run(installed / "sere", "inspect", "sere.table", "--json", cwd=tmp_path))
    assert [layer["index"] for layer in found["layers"]] == list(table.layers)
    (tmp_path / "results").mkdir()
    shutil.copy(ROOT / "benchmarks/results/demo.json", tmp_path / "results")
    run(installed / "sere", "report", "results", "-o", "page.html", cwd=tmp_path)
    assert "</html>" in (tmp_path / "page.html").read_text()


@pytest.mark.engine
def test_the_readmes_lines_run_where_the_wheel_is_installed(
    beside_vllm: Path, tmp_path: Path
) -> None:
    """A stranger's first lines: README's commands, then its script with what other pages add."""
    (code,) = [block for block in blocks(README) if block.language == "python"]
    pages = [README, *sorted((ROOT / "docs").glob("*.md"))]
    more = [b.text for page in pages for b in blocks(page) if b.marker == "continues: README.md"]
    assert len(more) == 1
    (tmp_path / "serve.py").write_text(code.text + indent("\n".join(more), " " * 4))
    own = [b.text for b in blocks(README) if b.language == "bash" and b.runs]
    lines = [line for line in "".join(own).splitlines() if not line.startswith("make ")]
    where = "python -c 'import sere.table; print(sere.table.__file__)'"
    commands = "\n".join(["set -e", where, *lines, "python serve.py"])
    out = execute(commands, tmp_path, beside_vllm, PYTHONPATH="")
    assert out.startswith(str(site_packages(beside_vllm) / "sere"))
    assert (tmp_path / "heatmaps.png").read_bytes().startswith(b"\x89PNG")
    assert "53390>09335" in out
    assert "'slots_rerouted'" in out


@pytest.mark.parametrize("command", ["ruff check", "ruff format --check", "mypy"])
def test_the_code_is_clean(command: str) -> None:
    name, *rest = command.split()
    run(Path(sys.executable).parent / name, *rest)
