"""vLLM's CUDA builds, imported on a machine without a GPU: does the plug-in harm them, does it fit?

    python tools/cuda_import.py [VERSION ...] -o benchmarks/results/cuda_import.json

Each version goes into an environment of its own, `.venv-cuda-VERSION` (10 GB on disk), with the
torch that it asks for and Python 3.12 or 3.11. A stand-in for `libcuda.so.1`, whose functions all
fail as without a device, is all that its compiled parts lack. There: every compiled part is
loaded, `register()` and a config that asks for sere are watched, the contract is looked up in
what is imported, and the tests run that need no engine.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from sere.results import provenance

ROOT = Path(__file__).resolve().parent.parent
VERSIONS = ("0.32.0", "0.33.0")
PYTHONS = ("3.12", "3.11")
# The resolver's own choice is an old cuda-python, whose files overwrite those of cuda-bindings.
PACKAGES = ("cuda-python>=13", "pytest>=8", "pytest-timeout", "pytest-xdist>=3.5", "hypothesis>=6")
TESTS = ("serving/test_installed.py", "serving/test_contract.py", "serving/test_rows.py")
TESTS += ("serving/test_expert_kernels.py", "test_policy.py", "test_table.py")
NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE

LOOK = """
import json, sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from tests.serving.cuda_platform import take_for_cuda
import torch, triton, vllm.config
take_for_cuda()
parts, root = {}, Path(vllm.config.__file__).parent.parent
for file in sorted(root.rglob("*.so")):
    name = ".".join(file.relative_to(root.parent).parts).split(".abi3")[0].split(".cpython")[0]
    try:
        import_module(name)
        parts[name] = "loads"
    except Exception as error:
        parts[name] = f"{type(error).__name__}: {error}"
from sere.serving.contract import NEEDS
from sere.serving.symbols import missing_symbols
print("LOOKED " + json.dumps({
    "python": sys.version.split()[0],
    "versions": {name: version(name) for name in ("vllm", "torch", "triton", "transformers")},
    "compiled parts": parts,
    "missing": {feature: missing_symbols(feature) for feature in NEEDS},
}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("versions", nargs="*", default=VERSIONS, metavar="VERSION")
    parser.add_argument("-o", "--output", default="cuda_import.json")
    arguments = parser.parse_args()
    for tool in ("gcc", "nm", "readelf"):
        if shutil.which(tool) is None:
            sys.exit(f"{tool} is not there: the stand-in for libcuda.so.1 cannot be made")
    found = {version: looked_at(version) for version in arguments.versions or VERSIONS}
    provenance.save_json(arguments.output, {"provenance": provenance.provenance(), "builds": found})
    for version, build in found.items():
        lacking = {k: v for k, v in build["missing"].items() if v}
        print(f"vLLM {version}: missing {lacking or 'nothing'}; tests: {build['tests']['summary']}")
    if any(build["tests"]["failed"] for build in found.values()):
        sys.exit(1)


def looked_at(version: str) -> dict[str, Any]:
    """What came of one version."""
    python = environment(version)
    env = {
        **os.environ,
        "LD_LIBRARY_PATH": str(stand_in(python)),
        "CUDA_VISIBLE_DEVICES": "",  # else vLLM switches Triton off, as no driver is active
        "VLLM_PLUGINS": "sere",
        "PYTHONPATH": str(ROOT),
    }
    say(f"vLLM {version}: importing it")
    looked = answer("LOOKED ", python, "-c", LOOK, env=env)
    script = ("-m", "tests.serving.installed_script", "cuda")
    looked["installed"] = answer("INSTALLED ", python, *script, env=env)
    say(f"vLLM {version}: tests")
    return {**looked, "tests": tested(python, env)}


def environment(version: str) -> Path:
    """The environment's Python; made if it is not there whole."""
    folder = ROOT / f".venv-cuda-{version}"
    python, made = folder / "bin" / "python", folder / ".made"
    if made.exists() and made.read_text() == wanted(version):
        return python
    say(f"vLLM {version}, its CUDA build, into {folder.name} (10 GB)")
    uv = (sys.executable, "-m", "uv")
    subprocess.run((*uv, "venv", "-q", "--clear", "--python", interpreter(), folder), check=True)
    pip = (*uv, "pip", "install", "-q", "--system-certs", "--python", python)
    subprocess.run((*pip, f"vllm=={version}", *PACKAGES), check=True)
    subprocess.run((*pip, "--no-deps", "-e", ROOT), check=True)
    made.write_text(wanted(version))
    return python


def wanted(version: str) -> str:
    return " ".join((version, *PACKAGES))


def interpreter() -> str:
    """A Python that vLLM's CUDA wheels are tested with: the first of `PYTHONS` that runs."""
    names = [f"python{version}" for version in PYTHONS]
    homes = sorted(Path.home().glob(".pyenv/versions/*/bin"), reverse=True)
    for name in names:
        for path in (shutil.which(name), *(str(home / name) for home in homes)):
            if path and subprocess.run((path, "-c", ""), capture_output=True).returncode == 0:
                return path
    sys.exit(f"none of {', '.join(names)} is there")


def stand_in(python: Path) -> Path:
    """A folder with a `libcuda.so.1` that has every function which torch and vLLM link to."""
    folder = python.parent.parent / "libcuda"
    folder.mkdir(exist_ok=True)
    (site,) = python.parent.parent.glob("lib/python*/site-packages")
    names = set[str]()
    for part in (*site.glob("vllm/**/*.so*"), *site.glob("torch/lib/*.so*")):
        if re.search(r"NEEDED.*libcuda\.so", output("readelf", "-d", part)):
            names |= set(
                re.findall(r" U (cu[A-Z]\w*)", output("nm", "-D", "--undefined-only", part))
            )
    source = folder / "libcuda.c"
    source.write_text("".join(f"int {n}(void) {{ return {NO_DEVICE}; }}\n" for n in sorted(names)))
    library = folder / "libcuda.so.1"
    link = ("gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", library, source)
    subprocess.run(link, check=True)
    return folder


def output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout


def answer(mark: str, python: Path, *arguments: str, env: dict[str, str]) -> dict[str, Any]:
    """The JSON behind a mark in what a fresh process prints."""
    done = subprocess.run((python, *arguments), env=env, cwd=ROOT, capture_output=True, text=True)
    for line in done.stdout.splitlines():
        if line.startswith(mark):
            found: dict[str, Any] = json.loads(line.removeprefix(mark))
            return found
    sys.exit(f"no answer from {arguments[:2]}:\n{done.stderr[-4000:]}")


def tested(python: Path, env: dict[str, str]) -> dict[str, Any]:
    """How many tests passed, and the names of those that did not."""
    files = [f"tests/{name}" for name in TESTS if (ROOT / "tests" / name).exists()]
    options = ("-q", "-rfEs", "--durations=0", "-p", "no:cacheprovider")
    platform = ("-p", "tests.serving.cuda_platform", "-k", "not own")
    command = (python, "-m", "pytest", *options, *platform, *files)
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    if done.returncode not in (0, 1) or not lines:
        sys.exit(f"the tests did not run:\n{done.stdout[-3000:]}{done.stderr[-1000:]}")
    return {
        "files": files,
        "summary": re.sub(r" in [\d.]+s.*", "", lines[-1].strip("= ")),
        "failed": [line.split(" - ")[0] for line in lines if line.startswith(("FAILED", "ERROR"))],
        "skipped": [line for line in lines if line.startswith("SKIPPED")],
    }


def say(what: str) -> None:
    print(f"cuda-import: {what} ...", flush=True)


if __name__ == "__main__":
    main()
