"""A slice of benchmarks/fuzz.py, what it once found, and the figures that the docs show."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sere.policy import Policy, PolicyError
from sere.serving.settings import Settings
from sere.serving.shadow import ShadowSettings
from sere.table import Table, TableError, carried
from tests.test_table import parts, rewrite

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import fuzz  # noqa: E402

HUGE = 10**400


@pytest.mark.parametrize("name", fuzz.WEIGHTS)
def test_whatever_is_wrong_is_refused_with_a_clean_error(name: str, tmp_path: Path) -> None:
    """Raises what is no clean error, with the smallest input."""
    tally = fuzz.fuzzed(*fuzz.targets(tmp_path)[name], 250)
    assert tally.refused.total() > 100


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        (["fingerprint", "K"], "2", "K is '2' in its metadata"),
        (["fingerprint", "K"], 99, "K=99 exceeds E=8"),
        (["fingerprint", "E"], 0, "E is 0"),
        (["fingerprint", "layers"], [-1, 1], "index is -1"),
        (["fingerprint", "architecture"], None, "architecture=None"),
        (["fingerprint", "router_hash"], 5, "router_hash=5"),
        (["method"], [], r"method=\[\]"),
        (["provenance"], "none", "provenance='none'"),
        (["tokens", "1"], -5, "tokens of layer 1 is -5"),
        (["stability"], {"1": "high"}, "stability of layer 1 is 'high'"),
    ],
)
def test_metadata_of_the_wrong_kind_is_named(
    tmp_path: Path, table: Table, path: list[str], value: Any, complaint: str
) -> None:
    """These were accepted, to fail later and elsewhere."""
    file = tmp_path / "t.safetensors"
    table.save(file)
    tensors, document = parts(file)
    place = document
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    rewrite(file, tensors, document)
    with pytest.raises(TableError, match=rf"t\.safetensors: .*{complaint}"):
        Table.load(file)


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5000, "[]", '{"format": {}}', "{}"])
def test_metadata_that_is_no_document(tmp_path: Path, text: str) -> None:
    file = tmp_path / "t.safetensors"
    save_file({"x": torch.zeros(1)}, file, metadata={"sere": text})
    with pytest.raises(TableError, match=r"t\.safetensors: "):
        Table.load(file)
    assert carried(file) is None  # the engine then says what `Table.load` says


def test_tensors_of_another_kind(tmp_path: Path, table: Table) -> None:
    file = tmp_path / "t.safetensors"
    table.save(file)
    tensors, document = parts(file)
    tensors["layers.1.gram"] = tensors["layers.1.gram"].to(torch.float8_e4m3fn)
    rewrite(file, tensors, document)
    with pytest.raises(
        TableError, match=r"layer 1: gram is torch\.float8_e4m3fn, expected float32"
    ):
        Table.load(file)


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5000])
def test_json_that_python_does_not_read(text: str) -> None:
    with pytest.raises(PolicyError, match="not JSON") as refusal:
        Policy.from_json(text)
    assert len(str(refusal.value)) < 1000


def test_numbers_that_no_float_or_index_holds(tmp_path: Path) -> None:
    similar = {"rho_quantile": 0.0, "fill": "error"}
    for settings in (
        similar,
        {"rho": HUGE},
        {"layers": {"9" * 5000: {}}},
        {"batches": {"9" * 5000: None}},
    ):
        with pytest.raises(PolicyError):
            Policy.from_dict(settings)
    with pytest.raises(PolicyError, match="bound="):
        ShadowSettings.parse({"bound": HUGE})


@pytest.mark.parametrize(
    ("given", "default", "complaint"),
    [
        ({}, [1], "in config.json: expected settings"),
        ({"table": 3}, {}, "table=3: expected the path"),
        ({"table": "x" * 5000}, {}, "no such table"),
    ],
)
def test_an_engines_settings_of_the_wrong_kind(given: Any, default: Any, complaint: str) -> None:
    with pytest.raises((PolicyError, TableError), match=complaint):
        Settings.parse(given, model_folder=None, model_default=default)


def test_the_figures_in_the_docs_are_the_committed_ones() -> None:
    page = (ROOT / "docs/serving.md").read_text()
    result = json.loads((ROOT / "benchmarks/results/fuzz.json").read_text())
    assert result["inputs"] >= 100_000
    assert fuzz.as_text(result) in page
