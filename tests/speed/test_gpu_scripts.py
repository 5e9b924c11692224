"""What waits for a GPU: every step is listed, every script starts, and what of them is plain
arithmetic is right."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import gpu
import gpu_calibrate
import gpu_configs
import gpu_mxfp4
import gpu_tokens

ROOT = Path(__file__).parents[2]


def test_every_step_is_listed_and_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(gpu.STEPS)
    assert all(re.match(r"at most [\d.]+ min: ", line) for line in lines)
    page = (ROOT / "docs/benchmarks.md").read_text()
    table = page[page.index("| step | what it decides |") :].split("\n\n")[0]
    rows = re.findall(r"^\| `([\w-]+)(\.\.\.)?`", table, re.M)  # dots: several that begin alike
    told = [
        [s.name for s in gpu.STEPS if s.name == row or (dots and s.name.startswith(row))]
        for row, dots in rows
    ]
    assert [name for names in told for name in names] == [step.name for step in gpu.STEPS]


@pytest.mark.parametrize("step", [s for s in gpu.STEPS if s.script.endswith(".py")], ids=str)
def test_every_script_starts(step: gpu.Step, monkeypatch: pytest.MonkeyPatch) -> None:
    script = __import__(step.script.removesuffix(".py"))
    monkeypatch.setattr(sys, "argv", [step.script, "--help"])
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == 0


def test_four_bits_are_what_the_format_says() -> None:
    """Two values a byte, the lower bits first; a power of two for 32 values."""
    blocks = torch.tensor([[0x21] + [0x00] * 15 + [0xF7] + [0x08] * 15], dtype=torch.uint8)
    values = gpu_mxfp4.plain(blocks, torch.tensor([[127, 129]], dtype=torch.uint8))
    assert values.shape == (1, 64)
    assert values[0, :3].tolist() == [0.5, 1.0, 0.0]
    assert values[0, 32:34].tolist() == [24.0, -24.0]


def test_experts_are_summed_as_they_are_written_down() -> None:
    E, H, N, T = 4, 32, 32, 3
    weights = gpu_mxfp4.drawn(E, H, N, "cpu")
    x, ids = torch.randn(T, H), torch.tensor([[0, 1], [2, 0], [3, 1]])
    slots = torch.rand(T, 2)
    found = gpu_mxfp4.expected(x, ids, slots, weights)
    for row in range(T):
        right = torch.zeros(H)
        for expert, weight in zip(ids[row].tolist(), slots[row].tolist(), strict=True):
            up = gpu_mxfp4.plain(weights["up"][expert], weights["up_scale"][expert])
            inner = up @ x[row] + weights["up_bias"][expert]
            gate, linear = inner[::2].clamp(max=7), inner[1::2].clamp(-7, 7)
            inner = gate * torch.sigmoid(1.702 * gate) * (linear + 1)
            down = gpu_mxfp4.plain(weights["down"][expert], weights["down_scale"][expert])
            right += weight * (down @ inner + weights["down_bias"][expert])
        torch.testing.assert_close(found[row], right, rtol=1e-3, atol=1e-3)


def test_batches_are_rerouted_and_name_each_expert_once() -> None:
    before, _, after, _ = gpu_mxfp4.batch(33, "cpu")
    assert torch.equal(before[-1], after[-1]) and not torch.equal(before, after)
    for weights, ids in gpu_configs.slots(8, 1, "cpu"):
        assert weights.shape == ids.shape == (8, gpu_configs.K)
        assert all(len(set(row)) == len(row) for row in ids.tolist())


def test_tokens_are_judged_by_what_a_process_repeats() -> None:
    one = {"first": "a", "again": "a"}
    found = {
        "stock": {"8 stock": one},
        "cuda": {"8 off": one, "8 S=K": {"first": "b", "again": "a"}},
    }
    judged = gpu_tokens.judged(found)
    assert judged["repeats"] == {"stock: 8 stock": True, "cuda: 8 off": True, "cuda: 8 S=K": False}
    assert judged["equals_stock"] == {"cuda: 8 off": True, "cuda: 8 S=K": False}


def test_what_a_calibration_must_compute_is_counted_by_hand() -> None:
    model = gpu_calibrate.built(2, "cpu", tiny=True)
    found = gpu_calibrate.measured(model, samples=8, batch=4)
    E, K, H, intermediate, vocabulary = 8, 2, 64, 32, 512
    attention = H * (4 + 2 + 2) * 16 + 4 * 16 * H + 2 * 16  # and norms of queries and keys
    expert = 3 * H * intermediate
    layer = attention + 2 * H + E * H + (E + K) * expert + 3 * E * E * H
    per_token = 2 * (2 * layer + H + 2 * vocabulary * H)
    assert found["tokens"] == 8 * 128
    assert found["flops"] == pytest.approx(per_token * 8 * 128)
    assert found["seconds"] > 0
    assert gpu_calibrate.fitting(80 * 10**9) == 48 > gpu_calibrate.fitting(40 * 10**9) > 10
