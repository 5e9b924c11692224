"""Evaluated and tuned one decoder layer at a time: the figures of a model in memory, to the bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sere.calibration.calibrate import calibrate
from sere.evaluation import layerwise
from sere.evaluation.evaluate import run
from sere.models.shelf import Shelf
from sere.models.skeleton import Skeleton
from sere.step_cost.cost import Cost
from sere.tuning import tune
from tests.conftest import LAYERS

POLICIES = ['{"S": 1, "min_active": 1}', '{"S": 1, "tau": 0.05}', '{"rival": "oea", "k0": 1}']


@pytest.fixture(scope="module")
def bf16(
    model_dir: Path, corpus_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A checkpoint in bf16, which CPUs evaluate in float32, and its table."""
    folder = Path(shutil.copytree(model_dir, tmp_path_factory.mktemp("bf16") / "model"))
    weights = {n: t.bfloat16() for n, t in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    table = folder.parent / "t"
    calibrate(str(folder), table, data=corpus_file, samples=20, length=64, progress=False)
    return folder, table


def evaluated(bf16: tuple[Path, Path], data: Path, output: Path, **more: Any) -> dict[str, Any]:
    model, table = bf16
    settings: dict[str, Any] = {"policies": POLICIES, "batches": [1, 4], "data": str(data)}
    settings |= {"samples": 12, "prompt": 4, "length": 12, **more}
    return run(str(model), str(table), str(output), **settings)


def test_every_figure_is_that_of_a_model_in_memory_and_all_policies_share_a_reading(
    bf16: tuple[Path, Path],
    corpus_file: Path,
    tmp_path: Path,
    layers_read: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    memory = evaluated(bf16, corpus_file, tmp_path / "m.json", stream=False)
    assert layers_read == []
    capsys.readouterr()
    streamed = evaluated(bf16, corpus_file, tmp_path / "s.json", stream=True)
    assert streamed["arms"] == memory["arms"]
    assert streamed["arms"][1]["batches"]["4"]["kl"][0] > 0
    assert len(layers_read) == LAYERS
    said = capsys.readouterr().err
    assert "one layer at a time" in said and "of computing" in said  # before it starts
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".png"}


def test_on_a_small_disk_passes_take_turns(
    bf16: tuple[Path, Path],
    corpus_file: Path,
    tmp_path: Path,
    layers_read: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    memory = evaluated(bf16, corpus_file, tmp_path / "m.json", stream=False)
    monkeypatch.setattr("sere.evaluation.quality._TOGETHER", 4)
    monkeypatch.setattr(layerwise, "room", lambda *_: 1)
    streamed = evaluated(bf16, corpus_file, tmp_path / "s.json", stream=True)
    parts = -(-streamed["passages"] // 4)  # of four passages each
    assert len(layers_read) == parts * LAYERS > LAYERS
    for mine, theirs in zip(streamed["arms"], memory["arms"], strict=True):
        for batch, figures in mine["batches"].items():
            for name in ("kl", "active", "top1", "perplexity"):
                assert figures[name] == pytest.approx(
                    theirs["batches"][batch][name], rel=1e-4, abs=1e-7, nan_ok=True
                )


def test_what_fits_is_kept_together() -> None:
    assert list(layerwise.parted([3, 3, 3, 9, 1], 6)) == [[0, 1], [2], [3], [4]]
    assert list(layerwise.parted([], 6)) == []


def test_tuned_by_layer_is_tuned_as_in_memory_in_one_reading_a_round(
    bf16: tuple[Path, Path], tmp_path: Path, layers_read: list[str]
) -> None:
    """The searches of all batch sizes and rules share their readings."""
    model, table = bf16
    words = "quick brown fox jumps"
    texts = [f"{words[i % 9 :][:5]}{i:02} {words[i % 7 :]}"[: 8 + i % 11] for i in range(40)]
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    def tuned(*, stream: bool) -> dict[str, Any]:
        settings: dict[str, Any] = {"samples": 40, "prompt": 2, "length": 8, "seed": 0}
        settings |= {"cost": Cost(b=1.0, a=0.0), "data": str(data), "stream": stream}
        output = str(tmp_path / f"{stream}.json")
        result = tune.run(
            str(model), str(table), budget="kl=0.005", batches=[2, 3], output=output, **settings
        )
        return {name: result[name] for name in ("policy", "by_batch", "held_out")}

    memory = tuned(stream=False)
    assert layers_read == []
    assert tuned(stream=True) == memory
    assert memory["policy"] is not None
    assert 5 < len(layers_read) / LAYERS < 20  # 13; 29 where each search reads for itself


def test_a_streamed_evaluation_that_fails_leaves_no_hidden_states_behind(
    bf16: tuple[Path, Path], corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled = Skeleton.filled

    def torn(self: Skeleton, unit: str) -> Any:
        if unit.endswith("1"):
            raise OSError("the disk is gone")
        return filled(self, unit)

    monkeypatch.setattr(Skeleton, "filled", torn)
    with pytest.raises(OSError, match="the disk is gone"):
        evaluated(bf16, corpus_file, tmp_path / "e.json", stream=True)
    assert not list(tmp_path.glob(".*"))
    assert torch.is_grad_enabled()


@pytest.fixture(scope="module")
def whole(
    bf16: tuple[Path, Path], corpus_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Any:
    """What is found without an interruption."""
    output = tmp_path_factory.mktemp("whole") / "e.json"
    return evaluated(bf16, corpus_file, output, stream=False)["arms"]


@pytest.fixture
def snapshots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Path]]:
    """What `kill -9` would leave on the disk each time that so many outputs have been kept."""

    def take(work: Path, at: Sequence[int]) -> list[Path]:
        keep, taken = Shelf.keep, []

        def kept(self: Shelf, name: str, output: Any, *more: Any) -> Any:
            found = keep(self, name, output, *more)
            taken.append(None)
            if len(taken) in at:
                shutil.copytree(work, tmp_path / f"killed-{len(taken)}")
            return found

        monkeypatch.setattr(Shelf, "keep", kept)
        return [tmp_path / f"killed-{number}" for number in at]

    return take


def test_an_evaluation_that_was_killed_goes_on_in_the_layer_that_it_was_in(
    bf16: tuple[Path, Path],
    corpus_file: Path,
    tmp_path: Path,
    layers_read: list[str],
    snapshots: Callable[..., list[Path]],
    whole: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In the first layer, between two, and in the last, where some results are written already."""
    passes = 1 + 2 * (1 + len(POLICIES))  # stock, and at two batch sizes all arms
    at = [3, 1 + passes, 1 + LAYERS * passes - 2]
    (work := tmp_path / "work").mkdir()
    left = snapshots(work, at)
    evaluated(bf16, corpus_file, work / "e.json", stream=True)
    assert [path.name for path in work.iterdir() if "unfinished" in path.name] == []
    for folder, finished in zip(left, (0, 1, LAYERS - 1), strict=True):
        layers_read.clear()
        capsys.readouterr()
        assert evaluated(bf16, corpus_file, folder / "e.json", stream=True)["arms"] == whole
        assert len(layers_read) == LAYERS - finished
        assert f"goes on behind layer {finished}\n" in capsys.readouterr().err
        assert {path.name for path in folder.iterdir()} == {"e.json", "e.png"}


@pytest.mark.parametrize("fault", ["a flipped bit", "of other versions", "Ctrl-C"])
def test_what_is_left_of_a_killed_evaluation_is_not_trusted_blindly(
    bf16: tuple[Path, Path],
    corpus_file: Path,
    tmp_path: Path,
    layers_read: list[str],
    monkeypatch: pytest.MonkeyPatch,
    whole: Any,
    capsys: pytest.CaptureFixture[str],
    fault: str,
) -> None:
    """A damaged pass begins anew, what other work left is dropped, a stranger's file stays."""
    keep, kept = Shelf.keep, []

    def interrupted(self: Shelf, name: str, output: Any, *more: Any) -> Any:
        kept.append(name)
        if len(kept) == 13:  # inputs, 9 passes in the first layer, 3 in the second
            raise KeyboardInterrupt
        return keep(self, name, output, *more)

    monkeypatch.setattr(Shelf, "keep", interrupted)
    output, states = tmp_path / "e.json", tmp_path / "e.json.unfinished.layers"
    with pytest.raises(KeyboardInterrupt):
        evaluated(bf16, corpus_file, output, stream=True)
    (stranger := states / "notes.txt").write_text("mine")
    if fault == "a flipped bit":
        data = bytearray((path := min(states.glob("*.pt"))).read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif fault == "of other versions":
        monkeypatch.setattr(layerwise, "versions", lambda: {"torch": "9"})
    layers_read.clear()
    capsys.readouterr()
    assert evaluated(bf16, corpus_file, output, stream=True)["arms"] == whole
    said = {
        "a flipped bit": "goes on behind layer 0; 1 passes, whose files are damaged, begin anew\n",
        "of other versions": "are of other work, or damaged: they are dropped, and the reading beg",
        "Ctrl-C": "an interrupted reading goes on behind layer 1\n",
    }
    assert said[fault] in capsys.readouterr().err
    assert len(layers_read) == (LAYERS - 1 if fault == "Ctrl-C" else LAYERS)
    assert list(states.iterdir()) == [stranger]
