"""A result's plot: whole or not at all, beside the result, and known again as ours."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from sere.files import check_writable, is_device, replaced


def save(figure: Any, path: str | Path, dpi: int = 110) -> None:
    """A matplotlib figure as PNG."""
    with replaced(path) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi, metadata={"Software": "sere"})


def beside(output: str | Path) -> Path:
    """Where the plot of a result goes; beside a device there is room for none."""
    output = Path(output)
    return Path(os.devnull) if is_device(output) else output.with_suffix(".png")


def check_result(output: str | Path, *inputs: str | Path | None) -> None:
    """Raise `OSError` now if a result or its plot cannot be written later."""
    if beside(output) == Path(output) and Path(output).suffix == ".png":
        raise FileExistsError(f"{output} is where the plot goes: name the result .json")
    check_writable(output, *inputs, kind="result")
    check_writable(beside(output), *inputs, kind="picture")
