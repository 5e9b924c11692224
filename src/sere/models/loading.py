"""A transformers model from its checkpoint, whole, or refused with the reason.

Quantised experts are calibrated dequantised, which is what an engine computes with up to the
rounding of activations.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sere.checkpoint import quantised
from sere.checkpoint.stored import INDEX, stored_tensors
from sere.files import plainly
from sere.models.fit import DEQUANTISED, check_stored, refuse_unapplied, refuse_unset
from sere.models.fit import LoadError as LoadError
from sere.models.scales import scales_applied

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Models whose parts are models of their own, and the one that decodes text.
_TEXT_PART = {"Qwen3OmniMoeForConditionalGeneration": "Qwen3OmniMoeThinkerForConditionalGeneration"}
_TOKENIZERS = ("tokenizer*", "*.model", "*.tiktoken", "vocab*", "merges*", "tekken*", "*.spm")
# Of the free memory that a model may fill, for its activations need some as well.
_SHARE = 0.8


def load_tokenizer(folder: str) -> PreTrainedTokenizerBase:
    """The model's tokenizer."""
    from transformers import AutoTokenizer

    if not any(path for kind in _TOKENIZERS for path in Path(folder).glob(kind)):
        raise LoadError(f"{folder} has no tokenizer ({', '.join(_TOKENIZERS)}): bring its files")
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # `tokenizers` raises nothing more precise
        what = "tokenizer" if _has_config(folder) else "config.json"
        raise LoadError(f"{folder}: its {what} cannot be loaded: {plainly(error)}") from error


def _has_config(folder: str) -> bool:
    """Whether it is not the configuration that keeps a tokenizer from being loaded."""
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(folder)
    except Exception:
        return False
    return True


def load_model(folder: str, device_map: Any = None) -> PreTrainedModel:
    """A transformers causal model in its checkpoint's dtype.

    device_map: as transformers takes it; by default all GPUs, then the CPU.
    Raises `LoadError` for a checkpoint that leaves weights unset (random experts would be
    calibrated) or is quantised in a way that transformers cannot turn back into experts.
    """
    check_stored(folder)
    if device_map is None and torch.cuda.is_available():
        device_map = "auto"
    try:
        model_class = model_class_of(folder)
        with scales_applied() if quantised.in_pairs(folder) else nullcontext():
            model, info = model_class.from_pretrained(
                folder,
                config=config_of(model_class, folder),
                dtype="auto",
                device_map=device_map,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below, with the reason
                **_dequantised(folder),
            )
    except LoadError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise LoadError(
            f"{folder}: cannot be loaded as a transformers model: {plainly(error)}"
        ) from error
    refuse_unset(folder, {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
    refuse_unapplied(folder, set(info["unexpected_keys"]))
    return model.eval()


def config_of(model_class: Any, folder: str) -> Any:
    """The model's, which says of quantisation and files what engines take for granted."""
    from transformers import AutoConfig

    config = (getattr(model_class, "config_class", None) or AutoConfig).from_pretrained(folder)
    if quantised.in_pairs(folder):
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        config.dtype = config.dtype or torch.bfloat16
    elif not hasattr(config, "quantization_config") and (how := quantised.settings(folder)):
        config.quantization_config = how
    if (Path(folder) / INDEX).is_file():  # transformers prefers a model.safetensors beside it
        config.transformers_weights = INDEX
    return config


def model_class_of(folder: str) -> Any:
    """The class that the checkpoint was saved from, be it of text alone or of images as well."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    for name in config.architectures or []:
        name = _TEXT_PART.get(name, name)
        beside = type(config).__module__.replace("configuration_", "modeling_")
        for module in (transformers, sys.modules.get(beside)):
            if found := getattr(module, name, None):
                return found
    return transformers.AutoModelForCausalLM


def exceeds_memory(folder: str | Path, *, widened: bool = False) -> bool:
    """Whether the model's weights, dequantised, are too large for this machine's free memory.

    widened: in float32.
    """
    import psutil

    tensors = stored_tensors(folder).values()
    stored = sum(
        tensor.size * (2 if widened and tensor.dtype != "F32" else 1) for tensor in tensors
    )
    free = psutil.virtual_memory().available
    for gpu in range(torch.cuda.device_count()):
        free += torch.cuda.mem_get_info(gpu)[0]
    pairs = quantised.in_pairs(folder)  # of 8 bits, and 16 in memory
    needed: float = stored * (2 if pairs else DEQUANTISED.get(quantised.method(folder), 1))
    return bool(needed > _SHARE * free)


def _dequantised(folder: str) -> dict[str, Any]:
    """Arguments of `from_pretrained` that give plain experts."""
    method = quantised.method(folder)
    if method == "fp8":
        from transformers import FineGrainedFP8Config

        return {"quantization_config": FineGrainedFP8Config(dequantize=True)}
    if method == "mxfp4":
        from transformers import Mxfp4Config

        return {"quantization_config": Mxfp4Config(dequantize=True)}
    return {}  # transformers always unpacks experts of compressed-tensors
