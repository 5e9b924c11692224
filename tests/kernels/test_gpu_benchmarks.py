"""What runs on the next GPU, as far as it runs without one: no GPU minute is to meet a typo."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sere.kernels.cuda_variants import MEASURED, VARIANTS, Variant
from tests.kernels.cuda_on_host import COMPILER

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import bench_reroute
import bench_variants
import gpu
import gpu_configs


@pytest.mark.skipif(not COMPILER, reason="no g++")
def test_the_measuring_of_forms_runs_and_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the host's build in place of the device, with two forms and two layers."""
    fast = Variant(threads=64, in_place=True, fixed=True, short=True, lanes=True)
    monkeypatch.setattr(bench_variants, "VARIANTS", (MEASURED, fast))
    monkeypatch.setattr(bench_reroute, "LAYERS", 4)
    monkeypatch.setattr(bench_variants, "FILE", tmp_path / "choice.json")
    output = tmp_path / "variants.json"
    monkeypatch.setattr(
        sys, "argv", ["", "--device", "host", "--adopt", "-o", str(output), "--replays", "1"]
    )
    assert bench_variants.main() == 0
    found = json.loads(output.read_text())
    assert [(c["T"], len(c["forms"])) for c in found["cases"]] == [(1, 2), (9, 2)]
    assert all({"warm", "cold"} <= set(f["us"]) for c in found["cases"] for f in c["forms"])
    adopted = json.loads((tmp_path / "choice.json").read_text())["gpus"]["host"]
    assert [choice["T"] for choice in adopted["choices"]] == [1, 9]


def test_a_form_that_is_wrong_fails_and_is_not_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def device() -> bench_variants.Device:
        def run(variant: Variant, layer: Any, counters: Any) -> torch.Tensor:
            ids: torch.Tensor = layer.ids
            if variant == MEASURED:
                batch = layer.batch._replace(weights=layer.weights)
                ids = bench_variants.reference.run(batch, layer.plan, counters)
            return ids

        def time(calls: Any, fresh: Any, replays: int) -> float:
            return 1.0

        return bench_variants.Device("host", (9, 0), run, time, "cpu")

    monkeypatch.setattr(bench_variants, "on_host", device)
    monkeypatch.setattr(bench_reroute, "LAYERS", 4)
    monkeypatch.setattr(bench_variants, "FILE", tmp_path / "choice.json")
    output = tmp_path / "variants.json"
    monkeypatch.setattr(sys, "argv", ["", "--device", "host", "--adopt", "-o", str(output)])
    assert bench_variants.main() == 1
    assert not (tmp_path / "choice.json").exists()
    choices = json.loads(output.read_text())["choices"]
    assert choices and all(Variant(**c["variant"]) == MEASURED for c in choices)


class Captured(TorchDispatchMode):
    """Refuses what a graph's capture refuses, by name: on a GPU these copy from the host, or wait
    for the device."""

    REFUSED = ("index_put_", "_local_scalar_dense", "nonzero", "lift_fresh")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func._schema.name.removeprefix("aten::") not in self.REFUSED, f"{func} in a capture"
        return func(*args, **(kwargs or {}))


def test_the_multi_launch_form_can_be_captured() -> None:
    """It once assigned True through an index, which is copied from the host: the bench crashed."""
    layer = bench_reroute.layers(4, 16, 4, "cpu")[0]
    with Captured():
        bench_reroute.multi_launch(layer)
        primary = torch.zeros(16, dtype=torch.bool)
        with pytest.raises(AssertionError, match="in a capture"):
            primary[layer.ids[:, 0].long()] = True


def test_configurations_become_files_that_vllm_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best of each policy; vLLM's own default where nothing is better, and for prompts."""
    from vllm.model_executor.layers.fused_moe import fused_moe

    *_, other = gpu_configs.configurations()
    cases = [f"T={T} S={S}" for T in gpu_configs.SIZES for S in gpu_configs.POLICIES]
    result = {
        "rows": [
            {"config": None, "us": dict.fromkeys(cases, 100.0)},
            {"config": other, "us": {c: 80.0 if c == "T=32 S=1" else 99.5 for c in cases}},
            {"config": other, "failed": "shared memory"},
        ],
        "active": dict.fromkeys(cases, 8.0),
    }
    assert gpu_configs.best(result, 1) == {32: other}
    assert "6.9%" not in gpu_configs.as_text(result) and "of a step" in gpu_configs.as_text(result)
    assert len(list(gpu_configs.write_files(result, tmp_path))) == 3
    read = {}
    for policy in ("stock", "S=1"):
        monkeypatch.setenv("VLLM_TUNED_CONFIG_FOLDER", str(tmp_path / policy))
        fused_moe.get_moe_configs.cache_clear()
        read[policy] = fused_moe.get_moe_configs(gpu_configs.E, gpu_configs.WIDTH, None)
    fused_moe.get_moe_configs.cache_clear()
    assert read["S=1"][32] == other != read["stock"][32]
    default = fused_moe.get_default_config(
        4096, gpu_configs.E, gpu_configs.WIDTH, gpu_configs.HIDDEN, gpu_configs.K, None
    )
    assert read["S=1"][4096] == read["stock"][4096] == default


def test_every_step_of_the_one_command_is_named_and_bounded(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert gpu.main(["--dry-run"]) == 0
    said = capsys.readouterr().out
    assert said.index("gpu_checks.py") < said.index("bench_variants.py")
    assert said.index("gpu_configs.py") < said.index("VLLM_TUNED_CONFIG_FOLDER=gpu/configs/stock")
    assert len(said.splitlines()) == len(gpu.STEPS)
    assert all((gpu.HERE / s.script).exists() for s in gpu.STEPS if s.script.endswith(".py"))
    assert len(VARIANTS) > 10
