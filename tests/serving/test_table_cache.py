"""Tables that engines made for themselves: found again by the same model only, written whole, and
by one of several engines that start at once. No engine runs here."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sere.checkpoint import Fingerprint
from sere.kernels import reroute
from sere.maps import LayerMaps, beside, identity_of, save
from sere.policy import Policy, PolicyError
from sere.serving import table_cache
from sere.serving.no_table import NoTable
from sere.serving.own_maps import Own
from sere.serving.table_cache import CacheTrouble, Entry, cache_folder, file_of, table_in
from sere.table import Table


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SERE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def silent(waited: float) -> None:
    pass


@pytest.fixture
def entry(table: Table) -> Entry:
    return Entry.of("/models/mine", table.fingerprint, {"dtype": "bfloat16"})


def test_the_folder_is_the_users_choice_or_the_platforms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("SERE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg/sere"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache/sere"
    for named in ("~/tables", "tables"):  # whatever folder a process is in later
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("SERE_CACHE", named)
        assert cache_folder() == tmp_path / "tables"


def test_a_user_without_a_home_is_told_to_name_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """As containers have them: vLLM goes on without a cache."""
    for name in ("SERE_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 5)
    with pytest.raises(CacheTrouble, match=r"home directory.*Name a folder by SERE_CACHE"):
        cache_folder()


def test_a_kept_table_is_found_with_its_very_bytes(entry: Entry, table: Table) -> None:
    assert entry.read() is None
    data = file_of(table)
    with entry.held(0, silent):
        entry.write(data)
    assert (kept := entry.read()) and kept[0] == data
    assert table_in(data).fingerprint == table.fingerprint
    names = {path.suffix for path in entry.path.parent.iterdir()}
    assert names == {".table", ".lock"}  # nothing half-written


def test_engines_share_a_table_only_if_all_is_equal(entry: Entry, table: Table) -> None:
    one = {"dtype": "bfloat16", "quantisation": {"bits": 4}, "stored": "a"}
    places = {
        Entry.of("/models/mine", table.fingerprint, facts).path
        for facts in (one, {**one, "stored": "b"}, {**one, "dtype": "float16"}, {**one, "text": 1})
    }
    assert len(places) == 4
    same = Entry.of("/elsewhere/mine", table.fingerprint, dict(reversed(one.items())))
    assert same.path in places
    other_K = Fingerprint(**{**vars(table.fingerprint), "K": 3})
    assert Entry.of("/models/mine", other_K, one).path not in places
    entry.path.parent.mkdir()
    entry.write(file_of(table))
    assert entry.others() == []
    changed = Entry.of("/models/mine", other_K, one)
    assert changed.others() == [entry.path]  # so that a changed checkpoint can be told
    other_text = Entry.of("/models/mine", table.fingerprint, {**one, "text": 1})
    assert other_text.others() == []  # the checkpoint is the same
    longer = Entry.of("/models/mine-instruct", table.fingerprint, one)
    longer.write(file_of(table))
    assert changed.others() == [entry.path]  # the other's name only begins alike


@pytest.mark.parametrize("fault", ["cut off", "another model's", "no table"])
def test_a_broken_table_is_told_and_not_used(
    entry: Entry, make_table: Callable[..., Table], fault: str
) -> None:
    entry.path.parent.mkdir()
    data = file_of(make_table(router_hash="c" * 64) if fault == "another model's" else make_table())
    entry.path.write_bytes({"cut off": data[:-100], "no table": b"what"}.get(fault, data))
    with pytest.raises(CacheTrouble, match="the table in the cache cannot be used"):
        entry.read()


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("gone", "its file of linear maps, is gone"),
        ("cut off", "not a complete file of maps"),
        ("another calibration's", "belongs to another calibration"),
    ],
)
def test_a_table_whose_maps_are_of_no_use_is_not_used(
    make_table: Callable[..., Table], fault: str, told: str
) -> None:
    own, other = ({i: LayerMaps.imagined(4, 8, 2, seed=s + i) for i in range(3)} for s in (0, 9))
    about = {"maps": {"rank": 2, "identity": identity_of(own)}}
    table = replace(make_table(), provenance=about)
    entry = Entry.of("/models/mine", table.fingerprint, {"maps": 2})
    entry.write(data := file_of(table), own)
    assert (kept := entry.read()) and kept[0] == data
    assert [index for index, _ in Own.found(*kept, Path()).layers()] == [0, 1, 2]
    maps = beside(entry.path)
    if fault == "gone":
        maps.unlink()
    elif fault == "cut off":
        maps.write_bytes(maps.read_bytes()[:-100])
    else:
        save(maps, {i: replace(layer, constant=layer.constant + 1) for i, layer in other.items()})
    with pytest.raises(CacheTrouble, match=f"the table in the cache cannot be used: .*{told}"):
        entry.read()


def test_a_folder_that_cannot_be_written_is_told(entry: Entry, tmp_path: Path) -> None:
    entry.path.parent.write_text("a file where the folder would be")  # root may write anywhere
    with pytest.raises(CacheTrouble, match="cannot be made"), entry.held(0, silent):
        pass
    with pytest.raises(CacheTrouble, match="cannot be kept"):
        entry.write(b"")


def test_a_full_disk_is_told_and_leaves_nothing(
    entry: Entry, table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    data = file_of(table)
    monkeypatch.setattr(Path, "write_bytes", full)
    with entry.held(0, silent), pytest.raises(CacheTrouble, match=r"cannot be kept.*No space left"):
        entry.write(data)
    assert [path.suffix for path in entry.path.parent.iterdir()] == [".lock"]


HOLDER = """
import sys, time
from sere.checkpoint import Fingerprint
from sere.kernels import reroute
from sere.policy import Policy, PolicyError
from sere.serving.table_cache import Entry
fingerprint = Fingerprint(**eval(sys.argv[1]))
with Entry.of("/models/mine", fingerprint, {"dtype": "bfloat16"}).held(0, print):
    print("held", flush=True)
    time.sleep(600)
"""


def test_another_engine_is_waited_for_as_long_as_was_stated_and_no_longer_than_it_lives(
    entry: Entry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table_cache, "_LOOK", 0.01)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, repr(vars(entry.fingerprint))],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout and holder.stdout.readline() == "held\n"
        told: list[float] = []
        with (
            pytest.raises(CacheTrouble, match="still at work on this table"),
            entry.held(0.1, told.append),
        ):
            pass
        assert len(told) == 1  # at once, and then every few seconds
        killer = threading.Timer(0.2, holder.kill)
        killer.start()
        began = time.monotonic()
        with entry.held(60, silent):  # the lock dies with who held it, by SIGKILL too
            assert time.monotonic() - began < 30
    finally:
        holder.kill()
        holder.wait()


def test_without_a_table_a_plan_moves_nothing_wherever_a_model_is_built() -> None:
    none = NoTable(Fingerprint("Qwen3MoeForCausalLM", 8, 2, (0, 1)))
    with torch.device("meta"):  # as `sere doctor` builds it; a worker's default is the accelerator
        plan = none.plan(0, Policy(S=1)).to("cpu")
    ids, weights = torch.tensor([[0, 1], [2, 3]]), torch.ones(2, 2)
    assert torch.equal(reroute(ids, weights, plan, None)[0], ids)
    with pytest.raises(PolicyError, match="there is no table yet"):
        none.check_policy(Policy(S=1))
