"""A Qwen3-MoE checkpoint of random weights with the demo model's tokenizer, for measurements."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from sere import demo_model


def write_random_model(
    folder: str | Path,
    *,
    layers: int,
    E: int,
    K: int,
    H: int,
    moe_intermediate: int,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write it; attention has H / 64 heads of 64. No two experts are similar."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = Path(folder)
    config = AutoConfig.from_pretrained(demo_model.PATH)
    config.update(
        {
            "num_hidden_layers": layers,
            "num_experts": E,
            "num_experts_per_tok": K,
            "hidden_size": H,
            "moe_intermediate_size": moe_intermediate,
            "num_attention_heads": H // 64,
            "num_key_value_heads": H // 64,
            "head_dim": 64,
            "layer_types": None,
        }
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (source := Path(demo_model.PATH) / name).exists():
            shutil.copy(source, folder)
    return folder
