"""What `sere tune` found, as a picture: loss against what is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sere.results import pictures
from sere.tuning.choice import front, read

_MARKS = {
    "o": "expected error",
    "^": "the paper's rule",
    "D": "linear maps, constants",
    "s": "with a pool",
    "*": "chosen, on held-out passages",
}
_FLOOR = 1e-7  # losses of zero, on a logarithmic axis


def plot(result: dict[str, Any], path: Path) -> None:
    """Every point, the front of each batch size, and the choice."""
    from matplotlib.figure import Figure

    name, limit = result["settings"]["budget"].values()
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    used = {"*"}

    def draw(points: list[dict[str, Any]], style: str, **more: Any) -> None:
        places = [(read(p), max(p["loss"], _FLOOR)) for p in points]
        axes.plot(*zip(*places, strict=True), style, **more) if places else None

    for number, (found, held) in enumerate(
        zip(result["by_batch"], result["held_out"], strict=True)
    ):
        colour = f"C{number}"
        draw(front(found), "-", color=colour, label=f"batch {found['batch']}")
        for marker in _MARKS:
            own = [p for p in found["points"] if _mark(p) == marker]
            used |= {marker} if own else set()
            draw(own, marker, color=colour, alpha=0.7)
        if held["chosen"]["policy"]:
            draw([held["chosen"]], "*", color=colour, markersize=15, markeredgecolor="black")
    for style, label in _MARKS.items():
        axes.plot([], [], style, color="grey", label=label) if style in used else None
    axes.axhline(limit, color="black", linestyle=":", label="budget")
    axes.set_yscale("log")
    axes.set_xlabel(f"read per layer and step, in experts (of {result['E']})")
    axes.set_ylabel(name)
    axes.legend()
    axes.grid(alpha=0.3)
    pictures.save(figure, path)


def _mark(point: dict[str, Any]) -> str:
    if point["policy"]["pool"] is not None:
        return "s"
    if point["kind"] in ("error", "paper"):
        return "o" if point["kind"] == "error" else "^"
    return "D"
