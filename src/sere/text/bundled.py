"""Text for those who give none of their own: 400 passages of this project's documentation and
sources, English prose and Python. Whoever serves something else has other experts at work."""

from __future__ import annotations

from pathlib import Path

BUNDLED = Path(__file__).with_name("bundled.jsonl")
