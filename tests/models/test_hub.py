"""A model is found, or what is wrong with its name is said within seconds."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sere import demo_model
from sere.models.hub import located
from sere.models.loading import LoadError


def test_folders_and_the_bundled_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    assert located(str(tmp_path)) == str(tmp_path)
    assert located("demo") == str(demo_model.PATH)


@pytest.mark.parametrize("path", ["./no", "/no/such", "a/b/c", "~/models/x", "../x", "with space"])
def test_a_wrong_path_is_called_a_path(path: str) -> None:
    with pytest.raises(LoadError, match=r"no such folder$"):
        located(path)


def test_a_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(LoadError, match="is a file: name the folder"):
        located(str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "the hub is out of reach .*HF_HUB_OFFLINE=1"),
        ({"HF_HUB_OFFLINE": "1"}, "not downloaded before; HF_HUB_OFFLINE is set"),
    ],
    ids=["unreachable", "offline"],
)
def test_a_hub_that_is_not_there_is_given_up(
    environment: dict[str, str], said: str, tmp_path: Path
) -> None:
    """In a process of its own, as the hub's client reads its settings when it is imported."""
    script = "from sere.models.hub import located; located('nobody/nothing')"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "HF_HOME": str(tmp_path), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert re.search(f"LoadError: nobody/nothing: no such folder, and {said}", done.stderr)
