"""Published models as shapes: what `sere bench` can serve with random weights, without a download.

A shape is a model's configuration. Cut to fewer layers, its vocabulary shrinks in proportion, so
that a layer's share of a decode step stays what it is in the whole model (an output matrix of
150,000 words would outweigh two layers), and layers without routed experts are left out.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sere import demo_model
from sere.checkpoint import Fingerprint
from sere.maps import LayerMaps, beside, identity_of
from sere.maps import save as save_maps
from sere.table import LayerStatistics, Table

# Where configurations keep the number of experts of a layer.
_E = ("num_experts", "n_routed_experts", "num_local_experts")
_VOCABULARY_STEP = 64


class ShapeError(ValueError):
    """A shape that nobody knows, or cannot be cut as asked for."""


@dataclass(frozen=True)
class Shape:
    """A model's configuration.

    layers: decoder layers, of how many in the published model.
    parameters: billions, as published for the whole model.
    """

    name: str
    config: dict[str, Any]
    parameters: float
    of_layers: int

    @property
    def layers(self) -> int:
        return int(self.config["num_hidden_layers"])

    @property
    def vocabulary(self) -> int:
        return int(self.config["vocab_size"])

    def cut(self, layers: int | None) -> Shape:
        """The first `layers` layers with experts; None is the whole model."""
        if layers is None or layers == self.of_layers:
            return self
        if not 1 <= layers <= self.of_layers:
            raise ShapeError(f"{self.name} has {self.of_layers} layers: cannot cut it to {layers}")
        words = self.vocabulary * layers // self.of_layers // _VOCABULARY_STEP * _VOCABULARY_STEP
        config = {**self.config, "num_hidden_layers": layers, "vocab_size": words}
        if "first_k_dense_replace" in config:
            config["first_k_dense_replace"] = 0
        return Shape(self.name, config, self.parameters, self.of_layers)

    def write(self, folder: str | Path) -> None:
        """A model's folder without weights: config.json, and the demo model's tokenizer."""
        folder = Path(folder)
        (folder / "config.json").write_text(json.dumps(self.config, indent=1))
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(demo_model.PATH / name, folder)

    def table(self, seed: int) -> Table:
        """Random experts' statistics: it moves as many slots as a real table, to no purpose."""
        first = int(self.config.get("first_k_dense_replace", 0))
        E = next(int(self.config[key]) for key in _E if key in self.config)
        layers = tuple(range(first, self.layers))
        K, architecture = int(self.config["num_experts_per_tok"]), self.config["architectures"][0]
        statistics = {index: LayerStatistics.imagined(E, seed + index) for index in layers}
        known = {"seed": seed, "tokens": 0, "text": "none: random"}
        return Table(Fingerprint(architecture, E, K, layers), statistics, "random", known)

    def save_table(self, path: Path, seed: int, rank: int | None) -> None:
        """`table` in a file; and beside it random linear maps, unless `rank` is None: they take as
        long as fitted ones."""
        table = self.table(seed)
        if rank is not None:
            E, H = table.fingerprint.E, int(self.config["hidden_size"])
            made = {index: LayerMaps.imagined(E, H, rank, seed + index) for index in table.layers}
            save_maps(beside(path), made)
            known = {"rank": rank, "identity": identity_of(made)}
            table = replace(table, provenance={**table.provenance, "maps": known})
        table.save(path)


def shape_named(name: str) -> Shape | None:
    """The built-in shape of that name, in any case; None if it is not one."""
    return SHAPES.get(name.lower())


def _qwen3(layers: int, **sizes: int) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_hidden_layers": layers,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rope_theta": 1e6,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        **sizes,
    }


def _qwen2() -> dict[str, Any]:
    return {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "num_hidden_layers": 24,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "vocab_size": 151936,
        "max_position_embeddings": 8192,
        "rope_theta": 1e6,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    }


def _deepseek(version: int, layers: int, **sizes: Any) -> dict[str, Any]:
    return {
        "architectures": [f"DeepseekV{version}ForCausalLM"],
        "model_type": f"deepseek_v{version}",
        "num_hidden_layers": layers,
        "moe_layer_freq": 1,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "max_position_embeddings": 4096,
        "rope_theta": 1e4,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        **sizes,
    }


def _gpt_oss() -> dict[str, Any]:
    return {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "num_hidden_layers": 36,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "attention_bias": True,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "vocab_size": 201088,
        "max_position_embeddings": 4096,
        "rope_theta": 150000,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }


def _shapes() -> list[tuple[str, float, dict[str, Any]]]:
    """Name, billions of parameters as published, configuration."""
    small = {"hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768}
    large = {"hidden_size": 4096, "intermediate_size": 12288, "moe_intermediate_size": 1536}
    lite = {
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "first_k_dense_replace": 1,
        "q_lora_rank": None,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "vocab_size": 102400,
    }
    v3 = {
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 3,
        "q_lora_rank": 1536,
        "n_group": 8,
        "topk_group": 4,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "vocab_size": 129280,
    }
    return [
        ("qwen1.5-moe-a2.7b", 14.3, _qwen2()),
        ("deepseek-v2-lite", 15.7, _deepseek(2, 27, **lite)),
        ("qwen3-30b-a3b", 30.5, _qwen3(48, num_attention_heads=32, **small)),
        ("gpt-oss-120b", 116.8, _gpt_oss()),
        ("qwen3-235b-a22b", 235.1, _qwen3(94, num_attention_heads=64, **large)),
        ("deepseek-v3", 671.0, _deepseek(3, 61, **v3)),
    ]


SHAPES = {
    name: Shape(name, config, parameters, config["num_hidden_layers"])
    for name, parameters, config in _shapes()
}
