"""A checkpoint that is not whole is refused in one sentence, before text is read; what lies beside
it does not count."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from sere.calibration.calibrate import calibrate
from sere.checkpoint import CheckpointError, expert_layers, weight_hashes
from sere.checkpoint.stored import INDEX, stored_tensors
from sere.cli import main
from sere.models.loading import load_model
from tests.conftest import LAYERS, E

SHARDS = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]


@pytest.fixture
def whole(model_dir: Path, tmp_path: Path) -> Path:
    """A copy in one file."""
    return Path(shutil.copytree(model_dir, tmp_path / "whole"))


@pytest.fixture
def sharded(model_dir: Path, tmp_path: Path) -> Path:
    """A copy in two shards with an index."""
    folder = Path(shutil.copytree(model_dir, tmp_path / "sharded"))
    tensors = sorted(load_file(folder / "model.safetensors").items())
    (folder / "model.safetensors").unlink()
    places = {}
    for i, name in enumerate(SHARDS):
        own = dict(tensors[i::2])
        save_file(own, folder / name, metadata={"format": "pt"})
        places |= dict.fromkeys(own, name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def hashes(folder: Path) -> tuple[str | None, str | None]:
    return weight_hashes(folder, range(LAYERS), E)


def rewritten(folder: Path, name: str, other: str) -> None:
    """Another model's weights, all of them negated, as a file of the folder."""
    tensors = {n: -t for n, t in load_file(folder / name).items()}
    save_file(tensors, folder / other, metadata={"format": "pt"})


STRANGERS = [
    "consolidated.safetensors",
    "adapter_model.safetensors",
    "model-00002-of-00003.safetensors",
    "model.safetensors",
    "original.safetensors",
]


@pytest.mark.parametrize("name", STRANGERS)
def test_a_file_that_the_index_does_not_name_does_not_count(sharded: Path, name: str) -> None:
    before = hashes(sharded)
    model = load_model(str(sharded)).state_dict()
    assert None not in before
    rewritten(sharded, SHARDS[1], name)
    assert hashes(sharded) == before
    assert expert_layers(sharded) == tuple(range(LAYERS))
    after = load_model(str(sharded)).state_dict()  # what is calibrated is what was hashed
    assert all(model[key].equal(after[key]) for key in model)


@pytest.mark.parametrize("name", STRANGERS[:3])
def test_nor_beside_a_single_file(whole: Path, name: str) -> None:
    before = hashes(whole)
    rewritten(whole, "model.safetensors", name)
    assert hashes(whole) == before


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def cut_in_its_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def pointer(path: Path) -> None:
    path.write_text(
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 4999802720\n"
    )


def zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def page(path: Path) -> None:
    path.write_text("<!DOCTYPE html><html><body>Access denied</body></html>" * 20)


def under_way(path: Path) -> None:
    path.with_name(path.name + ".aria2").touch()


def gone(path: Path) -> None:
    path.unlink()


def dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to("../blobs/abc")


FAULTS: dict[Callable[[Path], None], str] = {
    cut: r"has [\d,]+ bytes where its header promises [\d,]+.*did not finish; download it again",
    cut_in_its_header: r"\(100 bytes\) is cut off within its header.*download it again",
    emptied: r"is empty: the download did not finish",
    pointer: r"is a Git LFS pointer, not the file itself: run `git lfs pull`",
    zeros: r"cut off within its header, or no safetensors",
    page: r"no safetensors file",
    under_way: r"its download is not finished \(\S+\.aria2 is still there\)",
    gone: r"1 of (the 2 files that its index names|its 2 shards) (are|is) not there .*run it again",
    dangling: r"not there|cannot be read",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("index", [True, False])
def test_a_file_that_is_not_whole_is_refused_before_text_is_read(
    sharded: Path, tmp_path: Path, fault: Callable[[Path], None], index: bool
) -> None:
    if not index:
        (sharded / INDEX).unlink()
    fault(sharded / SHARDS[1])
    unread = tmp_path / "not-there.jsonl"
    with pytest.raises(CheckpointError, match=FAULTS[fault]):
        calibrate(str(sharded), tmp_path / "table", data=unread, progress=False)
    with pytest.raises(CheckpointError, match=FAULTS[fault]):
        hashes(sharded)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "not JSON .it is empty"),
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ('{"metadata": {}}', "no weight_map"),
        ('{"weight_map": {"a": 1}}', "no weight_map"),
        ('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}', "says that a is in .*not"),
        ("version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    ],
)
def test_an_index_that_is_none_is_refused(sharded: Path, text: str, why: str) -> None:
    (sharded / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=why):
        stored_tensors(sharded)


def test_a_user_sees_one_line(
    sharded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pointer(sharded / SHARDS[0])
    assert main(["calibrate", str(sharded), "--data", "none", "-o", str(tmp_path / "t")]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "git lfs pull" in said


def test_metadata_may_be_null(whole: Path) -> None:
    before, path = hashes(whole), whole / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length]) | {"__metadata__": None}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    assert hashes(whole) == before
    assert load_model(str(whole)).num_parameters() > 0


@pytest.mark.parametrize("text", ["", "[]", "{", "version https://git-lfs.github.com/spec/v1\n"])
def test_a_config_that_is_none_is_refused(whole: Path, tmp_path: Path, text: str) -> None:
    (whole / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        calibrate(str(whole), tmp_path / "table", data=tmp_path / "none.txt", progress=False)


@pytest.mark.parametrize("text", ["", "{", "version https://git-lfs.github.com/spec/v1\n"])
def test_a_tokenizer_that_is_none_is_refused(
    whole: Path, tmp_path: Path, corpus_file: Path, text: str
) -> None:
    (whole / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match="its tokenizer cannot be loaded"):
        calibrate(str(whole), tmp_path / "table", data=corpus_file, progress=False)
