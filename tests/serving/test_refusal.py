"""How a refusal ends a program: with the reason, and with no line that is not the user's."""

from __future__ import annotations

from typing import Any

import pytest

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
