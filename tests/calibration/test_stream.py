"""A model read layer by layer gives the very table of a model in memory, also after `kill -9`."""

from __future__ import annotations

import gc
import json
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import sere.models.loading
from sere.calibration.calibrate import calibrate
from sere.calibration.unfinished import Unfinished, UnfinishedError
from sere.models.loading import LoadError
from sere.models.shelf import Shelf
from sere.models.skeleton import load_skeleton
from sere.table import Table
from tests.conftest import LAYERS

BATCHES = 3
SETTINGS: dict[str, Any] = {"samples": 20, "length": 24, "batch": 8, "progress": False}


def run(model: Path, data: Path, output: Path, **settings: Any) -> Table:
    return calibrate(str(model), output, data=data, **{"stream": True, **SETTINGS, **settings})


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "table.safetensors"


def killed(model: Path, data: Path, output: Path, keeps: int) -> None:
    """Calibrate in a process that is killed when layers have given their outputs `keeps` times."""
    script = f"""
import os, signal
from pathlib import Path
from sere.calibration.unfinished import Unfinished
from tests.calibration.test_stream import run
keep, kept = Unfinished.keep, []
def deadly(*arguments):
    kept.append(keep(*arguments))
    if len(kept) == {keeps}:
        os.kill(os.getpid(), signal.SIGKILL)
    return kept[-1]
Unfinished.keep = deadly
run(Path({str(model)!r}), Path({str(data)!r}), Path({str(output)!r}))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[2])
    assert done.returncode == -signal.SIGKILL


@pytest.mark.parametrize("method", ["frobenius", "cka-linear"])
def test_streamed_and_in_memory_give_the_same_bytes(
    model_dir: Path, corpus_file: Path, output: Path, layers_read: list[str], method: str
) -> None:
    run(model_dir, corpus_file, output, method=method)
    streamed = output.read_bytes()
    assert layers_read == [f"model.layers.{i}" for i in range(LAYERS)]  # each weight once
    run(model_dir, corpus_file, output, method=method, stream=False)
    assert output.read_bytes() == streamed
    assert list(output.parent.iterdir()) == [output]


@pytest.mark.parametrize("keeps", [1, BATCHES + 1, 2 * BATCHES])
def test_a_run_that_was_killed_goes_on_where_it_was(
    model_dir: Path, corpus_file: Path, output: Path, layers_read: list[str], keeps: int
) -> None:
    """At the first batch of the first layer, of the second one, and at the very last."""
    killed(model_dir, corpus_file, output, keeps)
    assert not output.exists()
    run(model_dir, corpus_file, output)
    resumed = output.read_bytes()
    finished = (keeps - 1) // BATCHES
    assert layers_read == [f"model.layers.{i}" for i in range(finished, LAYERS)]
    assert list(output.parent.iterdir()) == [output]
    run(model_dir, corpus_file, output, stream=False)
    assert output.read_bytes() == resumed


def test_the_work_of_other_settings_is_not_taken_for_ones_own(
    model_dir: Path, corpus_file: Path, output: Path
) -> None:
    killed(model_dir, corpus_file, output, BATCHES + 1)
    with pytest.raises(UnfinishedError, match=r"unfinished calibration of other settings \(method"):
        run(model_dir, corpus_file, output, method="cosine")
    with pytest.raises(UnfinishedError, match=r"\(until_stable: None there, 0.9 now"):
        run(model_dir, corpus_file, output, until_stable=0.9)
    with pytest.raises(UnfinishedError, match=r"\(text: .*remove the folder"):
        run(model_dir, corpus_file, output, seed=5)
    progress = Path(f"{output}.unfinished") / "progress.json"
    progress.write_text("{")
    with pytest.raises(UnfinishedError, match=r"not an unfinished calibration .*remove the folder"):
        run(model_dir, corpus_file, output)
    shutil.rmtree(progress.parent)
    run(model_dir, corpus_file, output)


@pytest.mark.parametrize("part", ["layers.1.mlp.experts.", "layers.0.self_attn.q_proj", "norm.w"])
def test_missing_weights_are_refused_before_a_layer_is_read(
    model_dir: Path,
    tmp_path: Path,
    corpus_file: Path,
    output: Path,
    layers_read: list[str],
    part: str,
) -> None:
    folder = Path(shutil.copytree(model_dir, tmp_path / "holes"))
    weights = folder / "model.safetensors"
    save_file({n: t for n, t in load_file(weights).items() if part not in n}, weights)
    with pytest.raises(LoadError, match=r"holes: \d+ weights are missing"):
        run(folder, corpus_file, output)
    assert layers_read == []
    assert list(output.parent.iterdir()) == [folder]


def test_one_missing_expert_is_refused(
    model_dir: Path, tmp_path: Path, corpus_file: Path, output: Path
) -> None:
    folder = Path(shutil.copytree(model_dir, tmp_path / "hole"))
    weights = folder / "model.safetensors"
    kept = {n: t for n, t in load_file(weights).items() if "layers.1.mlp.experts.5." not in n}
    save_file(kept, weights)
    with pytest.raises((LoadError, RuntimeError), match=r"experts"):
        run(folder, corpus_file, output)
    assert not output.exists()


def test_only_one_decoder_layer_has_weights_at_a_time(model_dir: Path) -> None:
    skeleton = load_skeleton(str(model_dir))

    def held() -> set[str]:
        return {
            name
            for name, unit in skeleton.units.items()
            if any(p.device.type != "meta" for p in unit.parameters())
        }

    assert held() == set()
    assert skeleton.model.get_input_embeddings().weight.device.type == "cpu"
    for name in skeleton.units:
        with skeleton.filled(name):
            assert held() == {name}
        assert held() == set()


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_stopping_early_gives_the_same_bytes_streamed_and_in_memory(
    model_dir: Path, corpus_file: Path, output: Path, layers_read: list[str], share: float
) -> None:
    """Twenty sequences by one: after eight and sixteen it may stop; each group reads once."""
    settings: dict[str, Any] = {"until_stable": share, "batch": 1, "method": "cosine"}
    streamed = run(model_dir, corpus_file, output, **settings)
    bytes_ = output.read_bytes()
    read = streamed.provenance["sequences"]
    assert read == 8 if share == 0.5 else read > 8
    assert len(layers_read) == -(-read // 8) * LAYERS
    run(model_dir, corpus_file, output, stream=False, **settings)
    assert output.read_bytes() == bytes_
    assert [path.name for path in output.parent.iterdir()] == [output.name]


@pytest.mark.parametrize(("keeps", "groups"), [(8 * LAYERS + 9, 1), (16 * LAYERS, 2)])
def test_reading_until_stable_goes_on_behind_the_last_whole_group(
    model_dir: Path,
    corpus_file: Path,
    output: Path,
    layers_read: list[str],
    monkeypatch: pytest.MonkeyPatch,
    keeps: int,
    groups: int,
) -> None:
    """Killed in the second layer of the second group, and right behind that group."""
    settings: dict[str, Any] = {"until_stable": 1.0, "batch": 1, "method": "cosine"}
    with monkeypatch.context() as dies:
        keep, kept = Shelf.keep, [0]

        def deadly(*arguments: Any) -> Any:
            kept[0] += 1
            if kept[0] > keeps:
                raise SystemExit
            return keep(*arguments)

        dies.setattr(Shelf, "keep", deadly)
        dies.setattr(Shelf, "clear", lambda _: None)  # as after kill -9
        with suppress(SystemExit):
            run(model_dir, corpus_file, output, **settings)
    gc.collect()  # it held its folder
    layers_read.clear()
    resumed = run(model_dir, corpus_file, output, **settings)
    bytes_ = output.read_bytes()
    assert len(layers_read) == (-(-resumed.provenance["sequences"] // 8) - groups) * LAYERS
    assert list(output.parent.iterdir()) == [output]
    run(model_dir, corpus_file, output, stream=False, **settings)
    assert output.read_bytes() == bytes_


def test_a_model_that_exceeds_free_memory_is_streamed(
    model_dir: Path,
    corpus_file: Path,
    output: Path,
    layers_read: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run(model_dir, corpus_file, output, stream=None)
    assert layers_read == []
    monkeypatch.setattr(sere.models.loading, "_SHARE", 1e-12)
    run(model_dir, corpus_file, output, stream=None)
    assert len(layers_read) == LAYERS


def test_hidden_states_lie_on_disk(
    model_dir: Path, corpus_file: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a layer gives out is mapped from a file, so that the system may drop it from memory."""
    maps: list[str] = []
    keep = Unfinished.keep

    def kept(self: Any, batch: int, given: Any) -> Any:
        mapped = keep(self, batch, given)
        assert torch.equal(mapped, given)
        maps.append(Path("/proc/self/maps").read_text())
        return mapped

    monkeypatch.setattr(Unfinished, "keep", kept)
    run(model_dir, corpus_file, output)
    assert len(maps) == LAYERS * BATCHES
    assert all("table.safetensors.unfinished/outputs-" in each for each in maps)


def test_progress_is_json_that_a_person_can_read(
    model_dir: Path, corpus_file: Path, output: Path
) -> None:
    killed(model_dir, corpus_file, output, BATCHES + 1)
    state = json.loads((Path(f"{output}.unfinished") / "progress.json").read_text())
    assert state["finished"] == ["model.layers.0"]
    assert state["settings"]["method"] == "frobenius"
