"""A tiny random model of every architecture in transformers that has routed experts."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.conftest import enlarge_experts

VOCABULARY = 97
ARCHITECTURES = (
    "afmoe", "aria", "axk1", "axk2", "cohere2_moe", "dbrx", "deepseek_ocr2", "deepseek_v2",
    "deepseek_v3", "deepseek_v32", "deepseek_v4", "diffusion_gemma", "dots1", "ernie4_5_moe",
    "ernie4_5_vl_moe", "exaone_moe", "flex_olmo", "gemma4", "glm4_moe", "glm4_moe_lite",
    "glm4v_moe", "glm5_next", "glm_moe_dsa", "gpt_oss", "granitemoe", "granitemoe_swa",
    "granitemoehybrid", "granitemoeshared", "hunyuan_v1_moe", "hy_v3", "hy_v4", "inkling",
    "jamba", "jetmoe", "kimi_linear", "laguna", "lfm2_moe", "llama4", "longcat_flash", "mellum",
    "mimo_v2_flash", "minimax", "minimax_m2", "minimax_m3_vl", "mistral4", "mixtral",
    "nemotron_h", "olmoe", "openai_privacy_filter", "phimoe", "qwen2_moe", "qwen3_5_moe",
    "qwen3_moe", "qwen3_next", "qwen3_omni_moe", "qwen3_vl_moe", "qwen4_exp", "solar_open",
    "step3p7", "switch_transformers", "zaya",
)  # fmt: skip

# What is small in every configuration that has an attribute of the name.
_SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "max_position_embeddings": 128,
    "sliding_window": 16,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 6),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "num_shared_experts"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"), 0),
    "mlp_only_layers": [],
    "decoder_sparse_step": 1,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
_FOUR_LAYERS = {"num_hidden_layers": 4}  # so that there is attention beside linear attention

# What an architecture wants beyond or instead of that.
_OWN: dict[str, dict[str, Any]] = {
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 128,
        "vocab_size": VOCABULARY,
        "attn_config": {"kv_n_heads": 4, "clip_qkv": 8, "rope_theta": 1e4},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 16, "moe_num_experts": 6,
                       "moe_top_k": 2},
    },
    "deepseek_ocr2": {"mlp_layer_types": ["sparse"] * 2},
    "ernie4_5_vl_moe": {"moe_intermediate_size": [16, 16], "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}},
    "gemma4": {"enable_moe_block": True},
    "glm4v_moe": {"head_dim": 16, "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5,
        "mrope_section": [1, 1, 2]}},
    "glm5_next": {"qk_rope_head_dim": 0, "mlp_layer_types": ["sparse"] * 2},
    "granitemoehybrid": {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16},
    "jamba": {**_FOUR_LAYERS, "attn_layer_period": 2, "attn_layer_offset": 1,
              "mamba_d_state": 8, "mamba_dt_rank": 8, "use_mamba_kernels": False},
    "kimi_linear": _FOUR_LAYERS,
    "lfm2_moe": {**_FOUR_LAYERS, "layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"expert_ffn_hidden_size": 16, "ffn_hidden_size": 48, "num_layers": 2,
                      "num_hidden_layers": 4, "zero_expert_num": 2},
    "mimo_v2_flash": {"head_dim": 16, "num_key_value_heads": 2},
    "mistral4": {"rope_parameters": {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "llama_4_scaling_beta": 0.1,
        "original_max_position_embeddings": 32, "partial_rotary_factor": 1.0}},
    "qwen3_5_moe": _FOUR_LAYERS,
    "qwen3_moe": {"num_experts": 16, "num_local_experts": 16},
    "qwen3_next": _FOUR_LAYERS,
    "step3p7": {"mlp_layer_types": ["sparse"] * 2},
    "switch_transformers": {"d_model": 32, "d_kv": 8, "d_ff": 16, "num_heads": 4, "num_layers": 2,
                            "num_decoder_layers": 2, "num_sparse_encoder_layers": 1,
                            "num_sparse_decoder_layers": 1, "decoder_start_token_id": 0},
    # Of six experts, any dozen tokens choose each first, or two tokens the same ones.
    "jetmoe": {"num_local_experts": 16},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip

# Where there is no causal language model of text alone: the model that decodes text.
_CLASSES = {
    "deepseek_ocr2": "DeepseekOcr2TextModel",
    "diffusion_gemma": "DiffusionGemmaEncoderTextModel",
    "ernie4_5_vl_moe": "Ernie4_5_VLMoeTextModel",
    "glm4v_moe": "Glm4vMoeTextModel",
    "glm5_next": "Glm5NextTextModel",
    "inkling": "InklingTextModel",
    "mistral4": "Mistral4ForCausalLM",
    "openai_privacy_filter": "OpenAIPrivacyFilterForTokenClassification",
    "qwen3_omni_moe": "Qwen3OmniMoeThinkerTextModel",
    "qwen3_vl_moe": "Qwen3VLMoeTextModel",
    "step3p7": "Step3p7TextModel",
    "switch_transformers": "SwitchTransformersForConditionalGeneration",
}

# Those of them that do not say what comes next, or need an encoder's input to.
WITHOUT_LOGITS = {*_CLASSES} - {"mistral4"}


def tiny_model(architecture: str, seed: int = 0) -> Any:
    """Random float32 weights, E=6 and K=2 where the architecture permits, ready for inference."""
    model_class, config = _class_and_config(architecture)
    torch.manual_seed(seed)
    model = model_class(config).float().eval()
    _give_values(model)
    enlarge_experts(model)
    return model


def tiny_inputs(architecture: str, rows: int = 3, length: int = 7, seed: int = 0) -> dict[str, Any]:
    """input_ids [rows, length], and what else the architecture cannot do without."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=random)
    if architecture == "switch_transformers":
        return {"input_ids": ids, "decoder_input_ids": ids.flip(1)}
    return {"input_ids": ids}


def _class_and_config(architecture: str) -> tuple[Any, Any]:
    module = import_module(f"transformers.models.{architecture}.modeling_{architecture}")
    text_class = _text_config_class(architecture)
    default = text_class()
    small = {name: value for name, value in _SMALL.items() if _has(default, name)}
    own = _OWN.get(architecture, {})
    config = text_class(**(own if architecture == "dbrx" else small | own))
    if name := _CLASSES.get(architecture):
        return getattr(module, name), config
    return AutoModelForCausalLM._model_mapping[text_class], config


def _text_config_class(architecture: str) -> Any:
    if architecture == "inkling":
        return transformers.models.inkling.configuration_inkling.InklingTextConfig
    return type(CONFIG_MAPPING[architecture]().get_text_config())


def _has(config: Any, name: str) -> bool:
    try:
        return hasattr(config, name)
    except Exception:  # gemma4 raises for what may differ between layers
        return True


def _give_values(model: nn.Module) -> None:
    """What is initialised with zeros or left as it was found would hide mistakes."""
    random = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if (
            not torch.isfinite(parameter).all()
            or not parameter.any()
            or parameter.abs().max() > 1e3
        ):
            parameter.data = 0.02 * torch.randn(parameter.shape, generator=random)
    for name, buffer in model.named_buffers():
        if name.endswith("tid2eid"):  # deepseek_v4: the experts of each token id
            buffer.copy_(torch.rand(len(buffer), 6, generator=random).topk(buffer.shape[1]).indices)
