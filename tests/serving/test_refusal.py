"""How a refusal ends a program: with the reason, and with no line that is not the user's."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from sere.serving import refusal
from sere.serving.refusal import ServingError, _hook


def test_a_program_of_ones_own_ends_with_its_own_lines_and_the_reason(
    capsys: pytest.CaptureFixture[str],
) -> None:
    inside: dict[str, Any] = {"ServingError": ServingError}
    source = "def start(): raise ServingError('no such table')"
    exec(compile(source, "/site-packages/vllm/entrypoints/llm.py", "exec"), inside)
    with pytest.raises(ServingError) as refused:
        inside["start"]()
    _hook(refused.type, refused.value, refused.tb)
    said = capsys.readouterr().err
    assert said.splitlines()[-1] == "sere: error: no such table"
    assert 'inside["start"]()' in said and "llm.py" not in said


def _core() -> None:
    def warm_up() -> None:
        raise ServingError("its text is too short")

    os.close(2)  # what this process prints itself
    refusal.leaving_word(warm_up)()


@pytest.mark.parametrize(
    ("engines", "end"),
    [
        (["refused"], "sere: error: its text is too short"),
        (["failed"], "RuntimeError: See root cause above."),
        (["refused", "failed"], "RuntimeError: See root cause above."),
    ],
    ids=str,
)
def test_what_a_process_of_an_engine_refuses_is_the_last_line_of_the_first(
    engines: list[str],
    end: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And no failure of vLLM's own is taken for it, nor what an engine before has said."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    monkeypatch.setenv("SERE_REFUSAL_FILE", "")
    refusal._place.cache_clear()
    inside: dict[str, Any] = {}
    source = "def wait(): raise RuntimeError('See root cause above.')"
    exec(compile(source, "/site-packages/vllm/v1/engine/utils.py", "exec"), inside)
    for engine in engines:
        refusal.expect_word()
        if engine == "refused":
            core = multiprocessing.get_context("fork").Process(target=_core)
            core.start()
            core.join()
            assert core.exitcode == 1
        with pytest.raises(RuntimeError) as failed:
            inside["wait"]()
    sys.excepthook(failed.type, failed.value, failed.tb)
    assert capsys.readouterr().err.splitlines()[-1] == end
    refusal._place().unlink(missing_ok=True)
    refusal._place.cache_clear()
