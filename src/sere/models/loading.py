"""A transformers model from its checkpoint, whole, or refused with the reason.

Quantised experts are calibrated dequantised, which is what an engine computes with up to the
rounding of activations.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# How much larger a checkpoint is once its weights are bf16. Others are refused.
_DEQUANTISED = {"fp8": 2, "mxfp4": 4, "compressed-tensors": 4}
# Models whose parts are models of their own, and the one that decodes text.
_TEXT_PART = {"Qwen3OmniMoeForConditionalGeneration": "Qwen3OmniMoeThinkerForConditionalGeneration"}
# Of the free memory that a model may fill, for its activations need some as well.
_SHARE = 0.8


class LoadError(ValueError):
    """A checkpoint that cannot be calibrated, and why."""


def load_tokenizer(folder: str) -> PreTrainedTokenizerBase:
    """The model's tokenizer."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, RuntimeError) as error:
        raise LoadError(f"{folder}: its tokenizer cannot be loaded: {error}") from error


def load_model(folder: str, device_map: Any = None) -> PreTrainedModel:
    """A transformers causal model in its checkpoint's dtype.

    device_map: as transformers takes it; by default all GPUs, then the CPU.
    Raises `LoadError` for a checkpoint that leaves weights unset (random experts would be
    calibrated) or is quantised in a way that transformers cannot turn back into experts.
    """
    if device_map is None and torch.cuda.is_available():
        device_map = "auto"
    try:
        model, info = _model_class(folder).from_pretrained(
            folder,
            dtype="auto",
            device_map=device_map,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, with the reason
            **_dequantised(folder),
        )
    except LoadError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise LoadError(f"{folder}: cannot be loaded as a transformers model: {error}") from error
    refuse_unset(folder, {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
    return model.eval()


def _model_class(folder: str) -> Any:
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


def refuse_unset(folder: str, unset: set[str]) -> None:
    """Raise `LoadError` if the checkpoint left these weights unset."""
    if unset:
        raise LoadError(
            f"{folder}: {len(unset)} weights are missing from the checkpoint or of another shape "
            f"({', '.join(sorted(unset)[:3])} ...) and would be random; calibrate the original, "
            "unquantised checkpoint"
        )


def exceeds_memory(folder: str | Path) -> bool:
    """Whether the model's weights, dequantised, are too large for this machine's free memory."""
    import psutil

    stored = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
    free = psutil.virtual_memory().available
    for gpu in range(torch.cuda.device_count()):
        free += torch.cuda.mem_get_info(gpu)[0]
    needed: float = stored * _DEQUANTISED.get(_quantisation(folder), 1)
    return bool(needed > _SHARE * free)


def _dequantised(folder: str) -> dict[str, Any]:
    """Arguments of `from_pretrained` that give plain experts."""
    method = _quantisation(folder)
    if method and method not in _DEQUANTISED:
        raise LoadError(
            f"{folder}: {method} experts cannot be turned back into weights by transformers "
            f"(supported: {', '.join(_DEQUANTISED)}). Calibrate the original, unquantised "
            "checkpoint: its table serves the quantised one as well"
        )
    if method == "fp8":
        from transformers import FineGrainedFP8Config

        return {"quantization_config": FineGrainedFP8Config(dequantize=True)}
    if method == "mxfp4":
        from transformers import Mxfp4Config

        return {"quantization_config": Mxfp4Config(dequantize=True)}
    return {}  # transformers always unpacks experts of compressed-tensors


def _quantisation(folder: str | Path) -> str:
    """The checkpoint's quantisation method, "" if it has none (or is not here to be asked)."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        return ""
    try:
        config = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise LoadError(f"{path}: not JSON ({error})") from error
    settings = config.get("quantization_config") or config.get("compression_config") or {}
    return str(settings.get("quant_method", ""))
