"""Which commit of sere runs: of the checkout, or what an installed package was built from.

Needs nothing of sere: `tools/build_commit.py` runs it while a package is built.
"""

from __future__ import annotations

import json
import subprocess
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path


def commit() -> str | None:
    """12 digits, with "-dirty" behind them if files differed; None where nobody can tell."""
    built = Path(__file__).with_name("COMMIT")
    if built.exists():
        return built.read_text().strip()
    return of_checkout(Path(__file__)) or _of_url()


def of_checkout(file: Path) -> str | None:
    """What git says where it tracks this file: environments lie in other projects' folders, too."""
    if not _git(file, "ls-files", file.name):
        return None
    return _git(file, "describe", "--always", "--dirty", "--abbrev=12")


def _git(file: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *words], cwd=file.parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip() or None


def _of_url() -> str | None:
    """What pip wrote down when it was told to install from a repository."""
    try:
        written = distribution("sere").read_text("direct_url.json")
    except PackageNotFoundError:
        return None
    found = json.loads(written or "{}").get("vcs_info", {}).get("commit_id")
    return found[:12] if found else None
