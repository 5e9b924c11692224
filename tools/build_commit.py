"""Build hook: an installed package knows of which commit it is (see `sere.results.commit`)."""

from __future__ import annotations

import runpy
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FILE = "sere/results/COMMIT"


class CommitHook(BuildHookInterface):  # type: ignore[type-arg]
    """Adds that file to sdist and wheel; a wheel from an sdist has the sdist's."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable" or (Path(self.root) / "src" / FILE).exists():
            return
        source = Path(self.root) / "src/sere/results/commit.py"
        commit = runpy.run_path(str(source))["of_checkout"](source)
        if commit is None:
            return
        with tempfile.NamedTemporaryFile("w", suffix="-COMMIT", delete=False) as file:
            file.write(commit + "\n")
        inside = FILE if self.target_name == "wheel" else f"src/{FILE}"
        build_data["force_include"][file.name] = inside
