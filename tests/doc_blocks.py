"""The fenced blocks of a page: what runs, what is marked with the reason why it does not."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from textwrap import dedent

from sere.serving.server import free_port
from tests.engines import environment

PROGRAMS = Path(sys.executable).parent

# Stated in a comment on the line before a block: <!-- needs: gpu, download -->. Another,
# <!-- from: ... -->, says that tools/tables.py writes it.
NEEDS = {"gpu", "download", "minutes"}
# Output, or a drawing: nothing to run.
PLAIN = {"text"}
RUN = {"bash", "python"}
_FENCE = re.compile(
    r"^(?:<!-- (?P<marker>[^>]+) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.S | re.M
)


@dataclass(frozen=True)
class Block:
    """marker: words of the comment before it, e.g. "needs: gpu"; "" where there is none."""

    page: str
    language: str
    marker: str
    text: str

    @property
    def runs(self) -> bool:
        return self.language in RUN and not self.marker


def blocks(path: Path) -> list[Block]:
    return [
        Block(path.name, found["language"], found["marker"] or "", dedent(found["text"]))
        for found in _FENCE.finditer(path.read_text())
    ]


def complaints(path: Path) -> list[str]:
    """What keeps a page's code from being either run, or marked, or plain output."""
    found = []
    for block in blocks(path):
        kind, _, reasons = block.marker.partition(": ")
        first = f"{block.page}: ```{block.language} {block.text.splitlines()[0][:50]!r}"
        if block.language not in RUN | PLAIN:
            found.append(f"{first}: name a language of {sorted(RUN | PLAIN)}")
        if block.marker and kind not in ("needs", "continues", "from"):
            found.append(f"{first}: unknown marker {block.marker!r}")
        if kind == "needs" and not set(reasons.split(", ")) <= NEEDS:
            found.append(f"{first}: needs {reasons!r}: expected some of {sorted(NEEDS)}")
    rest = _FENCE.sub("", path.read_text())
    if "```" in rest:
        found.append(f"{path.name}: a fence that is not closed, or indented")
    for line in re.findall(r"\n\n( {4,}\S.*)", rest):
        found.append(f"{path.name}: {line.strip()[:50]!r} is code by its indent: fence it")
    return found


def script(path: Path, folder: Path) -> str:
    """All blocks of a page that run, in order, as one bash script; Python goes into files."""
    parts = ["set -euo pipefail"]
    for number, block in enumerate(block for block in blocks(path) if block.runs):
        if block.language == "python":
            (folder / f"block{number}.py").write_text(block.text)
            parts.append(f"python block{number}.py")
        else:
            parts.append(block.text)
    return "\n".join(parts)


def execute(commands: str, folder: Path, programs: Path = PROGRAMS, **more: str) -> str:
    """Output of a bash script that finds its programs in a folder; what it leaves running ends with
    it."""
    env = environment(PORT=str(free_port()), **more)
    del env["VLLM_ENABLE_V1_MULTIPROCESSING"]  # which nobody sets who reads the page
    env["PATH"] = f"{programs}:{env['PATH']}"
    with TemporaryFile("w+") as output:
        running = subprocess.Popen(
            ["bash", "-c", commands],
            cwd=folder,
            env=env,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = running.wait(timeout=600)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(running.pid, signal.SIGKILL)
        output.seek(0)
        printed = output.read()
    assert status == 0, printed[-4000:]
    return printed
