"""A user's file is replaced whole or not at all."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from sere.files import check_writable, replaced


@pytest.mark.parametrize("failure", [OSError(28, "No space left"), KeyboardInterrupt()])
def test_a_failure_keeps_the_old_bytes_and_leaves_nothing(
    tmp_path: Path, failure: BaseException
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(type(failure)), replaced(path) as temporary:
        temporary.write_bytes(b"half of the n")
        raise failure
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_the_old_file_is_whole_until_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with replaced(path) as temporary:
        temporary.write_bytes(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_the_file_gets_ordinary_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    with replaced(tmp_path / "file"):
        pass
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "file")]
    assert modes[0] == modes[1]


def test_an_output_that_cannot_be_written_is_refused_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FileNotFoundError, match="absent does not exist: create it"):
        check_writable(tmp_path / "absent" / "file")
    with pytest.raises(IsADirectoryError, match="name a file inside"):
        check_writable(tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(PermissionError, match="not writable"):
        check_writable(tmp_path / "file")


def test_a_result_may_not_replace_what_it_is_made_from(tmp_path: Path) -> None:
    table = tmp_path / "table"
    table.write_bytes(b"much work")
    (tmp_path / "link").symlink_to(table)
    for output in (table, tmp_path / "." / "table", tmp_path / "link"):
        with pytest.raises(FileExistsError, match="what the result is made from"):
            check_writable(output, None, tmp_path / "absent", table)
    check_writable(tmp_path / "other", table, None)
    check_writable(table)
