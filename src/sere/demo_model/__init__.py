"""The bundled demo model, a small, trained Qwen3-MoE (its card is README.md here), and its tasks.

For the command line and every room that takes "demo" for a model's name; imports nothing of ours.
"""

from __future__ import annotations

from pathlib import Path

PATH = Path(__file__).parent
NAME = "demo"


def resolve(model: str) -> str:
    """The folder of the bundled model for "demo"; any other name unchanged."""
    return str(PATH) if model == NAME else model
