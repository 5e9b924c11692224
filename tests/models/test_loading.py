"""Quantised checkpoints are calibrated as what they stand for, or refused; never at random."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sere.calibration.calibrate import calibrate
from sere.models.loading import LoadError, load_model, load_tokenizer
from sere.models.moe import moe_layers
from sere.table import Table
from tests.conftest import enlarge_experts, save_tokenizer

Tensors = dict[str, Tensor]
Quantise = Callable[[Path, Path], Path]
MODELOPT = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}
BLOCK = 16
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def rewritten(
    model: Path, folder: Path, settings: dict[str, Any], quantise: Callable[[str, Tensor], Tensors]
) -> Path:
    """A copy of a checkpoint whose experts are stored as `quantise` says."""
    shutil.copytree(model, folder)
    tensors: Tensors = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        inside = ".experts." in name and "bias" not in name
        tensors |= quantise(name, weight) if inside else {name: weight.bfloat16()}
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config |= {"quantization_config": settings, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def fp8(model: Path, folder: Path) -> Path:
    def quantise(name: str, weight: Tensor) -> Tensors:
        blocks = weight.unfold(0, BLOCK, BLOCK).unfold(1, BLOCK, BLOCK)
        scale = blocks.abs().amax((2, 3)) / 448
        spread = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
        return {name: (weight / spread).to(torch.float8_e4m3fn), f"{name}_scale_inv": scale}

    settings = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "fmt": "e4m3"}
    return rewritten(model, folder, settings, quantise)


def compressed(
    form: str, bits: int, kind: str, strategy: str, *, symmetric: bool = True
) -> dict[str, Any]:
    """compressed-tensors' settings of the weights of all experts."""
    weights = {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": symmetric}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": ["re:.*self_attn.*", "re:.*gate$", "lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }


def packed(bits: int) -> Quantise:
    """Of int4 or int8, several in an int32."""

    def made(model: Path, folder: Path) -> Path:
        from compressed_tensors.compressors.pack_quantized import pack_to_int32

        most = 2 ** (bits - 1)

        def quantise(name: str, weight: Tensor) -> Tensors:
            scale = weight.abs().amax(1, keepdim=True) / (most - 1)
            codes = (weight / scale).round().clamp(-most, most - 1).to(torch.int8)
            stem = name.removesuffix("weight")
            return {
                f"{stem}weight_packed": pack_to_int32(codes, bits),
                f"{stem}weight_scale": scale.bfloat16(),
                f"{stem}weight_shape": torch.tensor(weight.shape),
            }

        settings = compressed("pack-quantized", bits, "int", "channel")
        return rewritten(model, folder, settings, quantise)

    return made


def int8(parts: int, *, zero_points: bool = False) -> Quantise:
    """As llm-compressor saves W8A8 and W8A16: a number a byte, a scale for each part of a row."""

    def quantise(name: str, weight: Tensor) -> Tensors:
        rows = weight.unflatten(1, (parts, -1))
        low, high = rows.amin(2), rows.amax(2)
        zero = -128 - (low / (high - low) * 255).round() if zero_points else torch.zeros_like(low)
        scale = (high - low) / 255 if zero_points else rows.abs().amax(2) / 127
        codes = (rows / scale[..., None] + zero[..., None]).round().clamp(-128, 127)
        found = {name: codes.flatten(1).to(torch.int8), f"{name}_scale": scale.bfloat16()}
        return found | ({f"{name}_zero_point": zero.to(torch.int8)} if zero_points else {})

    strategy = "channel" if parts == 1 else "group"
    settings = compressed("int-quantized", 8, "int", strategy, symmetric=not zero_points)
    return lambda model, folder: rewritten(model, folder, settings, quantise)


def float8(settings: dict[str, Any], *, by_row: bool = False, beside: bool = False) -> Quantise:
    """As ModelOpt saves FP8, one scale a matrix, and as llm-compressor does, one a row.

    beside: said in ModelOpt's own file and not in config.json.
    """

    def quantise(name: str, weight: Tensor) -> Tensors:
        scale = (weight.abs().amax(1, keepdim=True) if by_row else weight.abs().max()) / 448
        codes = (weight / scale).to(torch.float8_e4m3fn)
        more = {} if by_row else {f"{name.removesuffix('weight')}input_scale": torch.tensor(0.5)}
        return {name: codes, f"{name}_scale": scale, **more}

    def made(model: Path, folder: Path) -> Path:
        rewritten(model, folder, settings, quantise)
        if beside:
            path = folder / "config.json"
            config = json.loads(path.read_text())
            own = config.pop("quantization_config")
            path.write_text(json.dumps(config))
            (folder / "hf_quant_config.json").write_text(json.dumps(own))
        return folder

    return made


def mxfp4(model: Path, folder: Path) -> Path:
    def quantise(name: str, weight: Tensor) -> Tensors:
        blocks = weight.mT.unflatten(-1, (-1, 32))  # [E, out, in / 32, 32]
        exponent = (blocks.abs().amax(-1).clamp(min=1e-30) / 6).log2().ceil()
        scaled = blocks / exponent.exp2()[..., None]
        codes = (scaled.abs()[..., None] - E2M1).abs().argmin(-1) + 8 * (scaled < 0)
        pairs = codes.unflatten(-1, (16, 2)).to(torch.uint8)
        return {
            f"{name}_blocks": pairs[..., 0] | pairs[..., 1] << 4,
            f"{name}_scales": (exponent + 127).to(torch.uint8),
        }

    settings = {"quant_method": "mxfp4", "modules_to_not_convert": []}
    return rewritten(model, folder, settings, quantise)


@pytest.fixture(scope="module")
def gpt_oss_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import GptOssConfig, GptOssForCausalLM

    folder = tmp_path_factory.mktemp("gpt_oss")
    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=98,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=6,
        num_experts_per_tok=2,
        pad_token_id=1,
        eos_token_id=0,
        rope_scaling=None,
    )
    model = GptOssForCausalLM(config).float()
    enlarge_experts(model)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


FORMATS: dict[str, tuple[Quantise, float]] = {
    "fp8": (fp8, 0.05),
    "mxfp4": (mxfp4, 0.3),
    "int4": (packed(4), 0.25),
    "int8 packed": (packed(8), 0.02),
    "int8 a row": (int8(1), 0.02),
    "int8 a group": (int8(2), 0.02),
    "int8 with zero points": (int8(1, zero_points=True), 0.02),
    "float8 a row": (
        float8(compressed("float-quantized", 8, "float", "channel"), by_row=True),
        0.05,
    ),
    "modelopt": (float8({"quant_method": "modelopt", **MODELOPT}), 0.05),
    "modelopt beside": (
        float8({"producer": {"name": "modelopt"}, "quantization": MODELOPT}, beside=True),
        0.05,
    ),
}


@pytest.fixture(params=FORMATS)
def quantised(
    request: pytest.FixtureRequest, model_dir: Path, gpt_oss_dir: Path, tmp_path: Path
) -> tuple[Path, Path, float]:
    """The original checkpoint, the quantised one, and how far their weights may be apart."""
    quantise, tolerance = FORMATS[request.param]
    original = gpt_oss_dir if request.param == "mxfp4" else model_dir
    return original, quantise(original, tmp_path / request.param), tolerance


def expert_weights(model: nn.Module) -> list[Tensor]:
    return [w.float() for layer in moe_layers(model) for w in layer.experts.parameters()]


def test_experts_are_what_the_quantised_weights_stand_for(
    quantised: tuple[Path, Path, float],
) -> None:
    original, folder, tolerance = quantised
    pairs = zip(
        expert_weights(load_model(str(original))),
        expert_weights(load_model(str(folder))),
        strict=True,
    )
    for true, found in pairs:
        assert found.shape == true.shape
        assert (found - true).norm() <= tolerance * true.norm()


def test_streamed_and_in_memory_agree_to_the_bit(
    quantised: tuple[Path, Path, float], corpus_file: Path, tmp_path: Path
) -> None:
    original, folder, _ = quantised
    settings: dict[str, Any] = {"data": corpus_file, "samples": 20, "length": 24, "batch": 8}
    tables, bytes_ = [], []
    for stream in (False, True):
        output = tmp_path / "table"
        calibrate(str(folder), output, stream=stream, progress=False, **settings)
        tables.append(Table.load(output))
        bytes_.append(output.read_bytes())
    assert bytes_[0] == bytes_[1]
    true = calibrate(str(original), tmp_path / "true", progress=False, **settings)
    for index, layer in true.layers.items():
        found = tables[0].layers[index]
        assert (found.similarity - layer.similarity).abs().max() < 0.2


def test_a_table_of_the_original_fits_the_quantised_checkpoint(
    model_dir: Path, corpus_file: Path, tmp_path: Path
) -> None:
    """Its experts are stored otherwise; the router, kept as it was, tells that it is the model."""
    from sere.checkpoint import weight_hashes

    tensors = {n: t.bfloat16() for n, t in load_file(model_dir / "model.safetensors").items()}
    original = Path(shutil.copytree(model_dir, tmp_path / "bf16"))
    save_file(tensors, original / "model.safetensors")
    folder = fp8(original, tmp_path / "fp8")
    routers, experts = zip(*(weight_hashes(f, (0, 1), 8) for f in (original, folder)), strict=True)
    assert routers[0] == routers[1] is not None
    assert experts[0] is not None and experts[1] is None


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "modelopt"])
def test_formats_that_would_leave_experts_random_are_refused(
    model_dir: Path, tmp_path: Path, method: str
) -> None:
    folder = Path(shutil.copytree(model_dir, tmp_path / "quantised"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(LoadError, match=f"{method} experts cannot .*supported: fp8.*original"):
        load_model(str(folder))


def test_a_folder_without_a_tokenizer_is_told_from_a_text_without_tokens(tmp_path: Path) -> None:
    """transformers makes an empty one."""
    with pytest.raises(LoadError, match="has no tokenizer"):
        load_tokenizer(str(tmp_path))


def test_a_wrong_configuration_is_not_blamed_on_the_tokenizer(
    model_dir: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(model_dir, tmp_path / "typed"))
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": "2"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(LoadError, match=r"its config\.json cannot be loaded"):
        load_tokenizer(str(folder))
