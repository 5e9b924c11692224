"""Tables that no text was needed for: valid, served like others, and really what they claim."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sere.calibration.calibrate import calibrate
from sere.models.loading import load_model
from sere.models.moe import moe_layers
from sere.policy import Policy
from sere.table import Table
from tests.conftest import LAYERS, E, K


def made(model: Path, output: Path, method: str, seed: int = 0) -> Table:
    calibrate(str(model), output, method=method, seed=seed, progress=False)
    return Table.load(output)


def test_weights_are_compared_without_running_the_model(model_dir: Path, tmp_path: Path) -> None:
    table = made(model_dir, tmp_path / "t.safetensors", "weights")
    assert (table.fingerprint.E, table.fingerprint.K, len(table.layers)) == (E, K, LAYERS)
    for layer in moe_layers(load_model(str(model_dir))):
        experts = [
            torch.cat([weight[e].flatten() for weight in layer.experts.parameters()]).double()
            for e in range(E)
        ]
        compare = torch.nn.functional.cosine_similarity
        cosine = [[compare(u, v, 0).item() for v in experts] for u in experts]
        expected = (torch.tensor(cosine) + 1) / 2
        found = table.layers[layer.index]
        torch.testing.assert_close(found.similarity, expected.float(), atol=1e-6, rtol=0)
        assert (found.tokens, found.stability) == (0, None)


def test_random_is_seeded_and_differs_between_layers(model_dir: Path, tmp_path: Path) -> None:
    one, same, other = (made(model_dir, tmp_path / "t", "random", seed) for seed in (0, 0, 1))
    assert torch.equal(one.layers[0].similarity, same.layers[0].similarity)
    assert not torch.equal(one.layers[0].similarity, other.layers[0].similarity)
    assert not torch.equal(one.layers[0].similarity, one.layers[1].similarity)
    assert torch.equal(one.layers[0].similarity, one.layers[0].similarity.T)


@pytest.mark.parametrize("method", ["weights", "random"])
def test_null_models_re_route(model_dir: Path, tmp_path: Path, method: str) -> None:
    table = made(model_dir, tmp_path / "t.safetensors", method)
    assert (table.plan(0, Policy(S=1)).neighbours >= 0).all()
