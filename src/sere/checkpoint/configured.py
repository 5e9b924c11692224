"""What a model's config.json says of its experts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

NUMBERS_OF_EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k")


def configured(folder: str | Path) -> tuple[int | None, int | None]:
    """(E, K) as the model's config.json has them, None where it has no such number."""
    try:
        config = json.loads((Path(folder) / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None, None
    parts = [config, *(config[key] for key in ("text_config", "llm_config") if key in config)]

    def found(names: Sequence[str]) -> int | None:
        values = [part[name] for part in parts for name in names if name in part]
        return next((value for value in values if isinstance(value, int)), None)

    return found(NUMBERS_OF_EXPERTS), found(EXPERTS_PER_TOKEN)
