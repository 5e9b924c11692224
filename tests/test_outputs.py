"""No verb ever costs a user a file: every kind of output path, tried with every verb (issue 21)."""

from __future__ import annotations

import errno
import json
import math
import os
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from sere import files
from sere.cli import main
from sere.files import KINDS, check_writable, locked, replaced, unfinished
from sere.maps import Maps, MapsError
from sere.models import shelf
from sere.results import pictures, provenance
from sere.results.journal import Journal, JournalError
from sere.table import Table, TableError

POLICY = ["--policy", '{"S": 1}']
# What a user types, with TABLE for a table and OUT for the output.
VERBS = {
    "calibrate": ["calibrate", "demo", "-o", "OUT"],
    "evaluate": ["evaluate", "demo", "TABLE", *POLICY, "-o", "OUT"],
    "evaluate --engine": ["evaluate", "demo", "TABLE", "--engine", *POLICY, "-o", "OUT"],
    "evaluate --tasks": ["evaluate", "demo", "TABLE", "--tasks", "t", *POLICY, "-o", "OUT"],
    "tune": ["tune", "demo", "TABLE", "-o", "OUT"],
    "bench": ["bench", "demo", "TABLE", "-o", "OUT"],
    "inspect": ["inspect", "TABLE", "--plot", "OUT"],
    "report": ["report", "FOLDER", "-o", "OUT"],
}
NOTES = b"what I wrote in a month"


def test_a_result_is_json_that_strict_parsers_read(tmp_path: Path) -> None:
    """One batch has no error, and all at once is a rate without bound: neither is in JSON."""
    odd = {"settings": {"rates": [4.0, math.inf]}, "arms": [{"kl": (0.5, math.nan)}]}
    provenance.save_json(tmp_path / "r.json", odd)
    text = (tmp_path / "r.json").read_text()
    found = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert found == {"settings": {"rates": [4.0, None]}, "arms": [{"kl": [0.5, None]}]}
    provenance.check_settings(tmp_path / "r.json", {"rates": [4.0, math.inf]})
    with pytest.raises(FileExistsError, match="differs in rates"):
        provenance.check_settings(tmp_path / "r.json", {"rates": [4.0, 8.0]})


def test_a_result_says_which_gpus_there_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "NVIDIA H100 80GB HBM3, 580.65.06"
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho '{said}'\necho '{said}'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr("torch.version.cuda", "13.0")
    made = provenance.provenance()
    assert (made["gpu"], made["driver"]) == ("2 x NVIDIA H100 80GB HBM3", "580.65.06")
    assert made["cuda"] == "13.0"
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")  # a machine without one
    assert not {"gpu", "driver", "cuda"} & set(provenance.provenance())


@pytest.fixture
def run(table: Table, tmp_path: Path) -> object:
    table.save(tmp_path / "t.table")
    (tmp_path / "results").mkdir()
    (tmp_path / "results/r.json").write_text("{}")

    def call(verb: str, output: Path, *more: str) -> int:
        words = {
            "TABLE": str(tmp_path / "t.table"),
            "OUT": str(output),
            "FOLDER": str(tmp_path / "results"),
        }
        return main([words.get(word, word) for word in VERBS[verb]] + list(more))

    return call


KIND_OF = {"calibrate": "table", "inspect": "picture", "report": "page"}
# Every kind of path, as docs/outputs.md has it: what is there, what becomes of it without --force
# and with it.
OUTCOMES = {
    "nothing": ("written", "written"),
    "a file of sere's of the same kind": ("replaced", "replaced"),
    "a link to one": ("replaced, the link stays", "replaced, the link stays"),
    "any other file": ("refused", "replaced"),
    "a link to any other file": ("refused", "replaced, the link stays"),
    "what the verb reads": ("refused", "refused"),
    "a folder": ("refused", "refused"),
    "a device or a pipe": ("written to, stays one", "written to, stays one"),
}


def prepared(what: str, verb: str, folder: Path) -> Path:
    """A path of that kind to be an output of the verb."""
    suffix = {"calibrate": ".table", "inspect": ".png", "report": ".html"}.get(verb, ".json")
    path, beside = folder / f"out{suffix}", folder / f"elsewhere{suffix}"
    target = beside if "link" in what else path
    if "of sere's" in what or what == "a link to one":
        write_ours(KIND_OF.get(verb, "result"), target)
    elif "any other" in what:
        target.write_bytes(NOTES)
    if "link" in what:
        path.symlink_to(beside)
    if what == "a folder":
        path.mkdir()
    if what == "a device or a pipe":
        return Path("/dev/null")
    if what == "what the verb reads":
        read = {"calibrate": "data.jsonl", "report": "results/r.json"}
        return folder / read.get(verb, "t.table")
    return path


def write_ours(kind: str, path: Path) -> None:
    """The least that is known for ours."""
    from matplotlib.figure import Figure
    from safetensors.torch import save_file

    if kind == "table":
        save_file({"x": torch.zeros(1)}, path, metadata={"sere": "{}"})
    elif kind == "picture":
        pictures.save(Figure(), path)
    elif kind == "page":
        path.write_text("<html><head><title>sere report: x</title>")
    else:
        provenance.save_json(path, {"provenance": provenance.provenance()})


@pytest.mark.parametrize("forced", [False, True], ids=["", "--force"])
@pytest.mark.parametrize("what", OUTCOMES)
@pytest.mark.parametrize("verb", VERBS)
def test_every_kind_of_path_with_every_verb(
    verb: str, what: str, forced: bool, run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether it is refused, before the work begins; what then is written: the tests below."""
    (tmp_path / "data.jsonl").write_text("{}")
    path = prepared(what, verb, tmp_path)
    before = path.read_bytes() if path.is_file() else b""
    more = ["--data", str(tmp_path / "data.jsonl")] if verb == "calibrate" else []
    with stopped_before_the_work():
        status = run(verb, path, *more, *(["--force"] if forced else []))
    said = capsys.readouterr().err
    refused = any(
        reason in said
        for reason in ("is there, and no", "is what the result is made", "is a folder: name a file")
    )
    assert status == 1 and refused == (OUTCOMES[what][forced] == "refused"), said
    if refused:
        assert path.is_dir() or path.read_bytes() == before


@contextmanager
def stopped_before_the_work() -> Iterator[None]:
    """A path that is accepted is as far as this goes."""

    def stop(*_: object, **__: object) -> None:
        raise ValueError("accepted")

    with pytest.MonkeyPatch.context() as patch:
        for place in (
            "sere.calibration.calibrate.texts_of",
            "sere.table.Table.load",
            "sere.page.render.read",
            "sere.speed.bench.subject",
        ):
            patch.setattr(place, stop)
        yield


def test_the_docs_have_the_table_of_it() -> None:
    page = (Path(__file__).parent.parent / "docs/outputs.md").read_text()
    rows = [f"| {what} | {plain} | {forced} |" for what, (plain, forced) in OUTCOMES.items()]
    assert "\n".join(rows) in page
    for verb in VERBS:
        assert f"`{verb}`" in page


@pytest.mark.parametrize("verb", VERBS)
def test_a_file_that_is_none_of_ours_is_kept(
    verb: str, run: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (tmp_path / "notes.json", tmp_path / "link"):
        (tmp_path / "notes.json").write_bytes(NOTES)
        if path.name == "link":
            path.symlink_to(tmp_path / "notes.json")
        assert run(verb, path) == 1  # type: ignore[operator]
        assert "add --force to replace it" in capsys.readouterr().err
        assert (tmp_path / "notes.json").read_bytes() == NOTES
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("verb", [v for v in VERBS if v not in ("calibrate", "report")])
def test_what_is_read_is_never_written_whatever_is_forced(
    verb: str, run: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (tmp_path / "t.table").read_bytes()
    assert run(verb, tmp_path / "t.table", "--force") == 1  # type: ignore[operator]
    assert "is what the result is made from" in capsys.readouterr().err
    assert (tmp_path / "t.table").read_bytes() == before


def test_the_text_of_a_calibration_is_never_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(NOTES)
    assert main(["calibrate", "demo", "--data", str(text), "-o", str(text), "--force"]) == 1
    assert "is what the result is made from" in capsys.readouterr().err
    assert text.read_bytes() == NOTES


@pytest.mark.parametrize("verb", VERBS)
def test_a_folder_is_no_output(
    verb: str, run: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(verb, tmp_path) == 1  # type: ignore[operator]
    assert "name a file inside it" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["evaluate", "tune", "bench"])
def test_the_picture_beside_a_result_is_an_output_too(
    verb: str, run: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "new.png").write_bytes(NOTES)
    assert run(verb, tmp_path / "new.json") == 1  # type: ignore[operator]
    assert "new.png is there, and no picture of sere's" in capsys.readouterr().err
    assert run(verb, tmp_path / "only.png") == 1  # type: ignore[operator]
    assert "name the result .json" in capsys.readouterr().err


def test_demo_keeps_what_is_in_its_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "demo.json").write_bytes(NOTES)
    assert main(["demo", "-o", str(tmp_path)]) == 1
    assert "demo.json is there" in capsys.readouterr().err
    assert (tmp_path / "demo.json").read_bytes() == NOTES


def test_ours_are_known_by_what_is_in_them(table: Table, tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    table.save(tmp_path / "table")
    provenance.save_json(tmp_path / "result", {"provenance": provenance.provenance()})
    pictures.save(Figure(), tmp_path / "picture")
    (tmp_path / "page").write_text("<html><head><title>sere report: x</title>")
    Figure().savefig(tmp_path / "result.png")
    strangers = {"text": NOTES, "empty": b"", "json": b'{"a": 1}', "deep": b"[" * 10**5}
    for name, content in strangers.items():
        (tmp_path / name).write_bytes(content)
    for kind, ours in KINDS.items():
        for path in tmp_path.iterdir():
            assert ours(path) == (path.name == kind), (kind, path.name)
    (tmp_path / "result.json").write_bytes((tmp_path / "result").read_bytes())
    assert KINDS["picture"](tmp_path / "result.png")  # as sere 0.1 wrote them


def test_force_replaces_a_file_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "notes").write_bytes(NOTES)
    (tmp_path / "link").symlink_to(tmp_path / "notes")
    token = files.FORCE.set(True)
    try:
        check_writable(tmp_path / "link", kind="result")
        provenance.save_json(tmp_path / "link", {"provenance": {}})
    finally:
        files.FORCE.reset(token)
    assert (tmp_path / "link").is_symlink()
    assert json.loads((tmp_path / "notes").read_text()) == {"provenance": {}}


def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
    reader.start()
    provenance.save_json(pipe, {"provenance": 1})
    reader.join(10)
    assert json.loads(got[0]) == {"provenance": 1}
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_device_is_named_and_stays_a_device(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["calibrate", "demo", "--method", "random", "-o", "/dev/full", "--force"]
    assert main(argv) == 1
    assert "/dev/full cannot be written: No space left" in capsys.readouterr().err
    assert stat.S_ISCHR(Path("/dev/full").stat().st_mode)
    assert not Path("/dev/full.unfinished").exists()
    assert pictures.beside("/dev/full") == Path("/dev/null")
    assert unfinished("/dev/full").parent != Path("/dev")


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    complaint = r"out cannot be written: No space left .*choose another"
    with pytest.raises(OSError, match=complaint), replaced(tmp_path / "out"):
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def _locked_away(path: Path) -> None:
    """As whoever may not read it: root may."""
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def _full(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        file.write(b"x")


# kind: (the place, what is done there, what is said)
FAULTS: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "missing": ("absent", Path.read_bytes, "absent: No such file or directory; check its name"),
    "folder": (".", Path.read_bytes, ": Is a directory; name a file inside it"),
    "permission": ("sealed", _locked_away, "sealed: Permission denied; change its permissions"),
    "full disk": ("/dev/full", _full, "No space left on device"),
    "our own": ("x", lambda path: check_writable(path / "y"), "create it or choose another"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_what_the_system_refuses_is_said_in_words(
    kind: str,
    tmp_path: Path,
    table: Table,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    place, do, said = FAULTS[kind]
    monkeypatch.setattr("sere.verbs.inspect", lambda **_: do(tmp_path / place))
    assert main(["inspect", "table"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("sere: error: ") and error.count("\n") == 1
    assert said in error and "Errno" not in error


def test_a_file_that_may_not_be_read_is_not_called_missing_or_torn(
    tmp_path: Path, table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    table.save(tmp_path / "t")
    monkeypatch.setattr(Path, "open", lambda path, *_: _locked_away(path))
    with pytest.raises(TableError, match="t: Permission denied; change its permissions"):
        Table.load(tmp_path / "t")
    with pytest.raises(MapsError, match="t: Permission denied"):
        Maps.open(tmp_path / "t")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_libraries_that_write_tell_of_a_full_disk(table: Table, tmp_path: Path) -> None:
    """torch gave a line of its own source, safetensors Rust's words."""
    with pytest.raises(OSError) as torchs:
        shelf.save(torch.zeros(9999), Path("/dev/full"))
    assert files.plainly(torchs.value).startswith("/dev/full: No space left on device; make room")
    inner = SafetensorError("while serializing: No space left on device (os error 28)")
    found = files.unwritten(tmp_path / "t", inner)
    assert files.plainly(found).startswith(f"{tmp_path / 't'}: No space left on device; make room")


def test_work_goes_on_where_its_journal_finds_no_room(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    journal = Journal(tmp_path / "j", {})

    class Full:
        def write(self, _: bytes) -> None:
            raise OSError(28, "No space left on device")

        def close(self) -> None: ...

    journal._file = Full()  # type: ignore[assignment]
    with journal:
        journal.add("a", 1)
        journal.add("b", 2)
        assert (journal.get("a"), journal.get("b")) == (1, 2)
    assert capsys.readouterr().err.count("this run cannot be resumed") == 1


def test_one_run_at_a_time(tmp_path: Path, table: Table) -> None:
    """Two runs on one output, and two that would store a policy in one table."""
    output = tmp_path / "out.json"
    with Journal(unfinished(output), {}):
        with pytest.raises(OSError, match="another run is at work on it"):
            Journal(unfinished(output), {})
        with pytest.raises(OSError, match="another run is at work on it"):
            check_writable(output, kind="result")
    check_writable(output)
    table.save(tmp_path / "t")
    another = pytest.raises(OSError, match="another run is at work")
    with locked(tmp_path / "t"), another, locked(tmp_path / "t"):
        pass


@pytest.mark.parametrize("content", [NOTES, b"{torn", b"\xff\xfe\n", b"[1]\n", b'{"a": 1}\n3\n'])
def test_a_foreign_journal_is_refused_and_kept(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "j").write_bytes(content)
    with pytest.raises(JournalError, match="no unfinished work of sere's"):
        Journal(tmp_path / "j", {"a": 1})
    assert (tmp_path / "j").read_bytes() == content


def test_a_foreign_folder_is_no_unfinished_calibration(tmp_path: Path) -> None:
    from sere.calibration.unfinished import Unfinished, UnfinishedError

    (tmp_path / "t.unfinished").mkdir()
    (tmp_path / "t.unfinished" / "thesis.tex").write_bytes(NOTES)
    with pytest.raises(UnfinishedError, match=r"no unfinished calibration .*thesis\.tex"):
        Unfinished(tmp_path / "t.unfinished", {})
    one = Unfinished(tmp_path / "u", {})
    with pytest.raises(OSError, match="another run is at work on it"):
        Unfinished(tmp_path / "u", {})
    one.remove()
    assert not (tmp_path / "u").exists()
