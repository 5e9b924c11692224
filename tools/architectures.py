"""Run the matrix of architectures and write docs/architectures.md from what came out.

python tools/architectures.py
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from datetime import date
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import transformers  # noqa: E402

from sere.models.moe import UNSUPPORTED, moe_layers  # noqa: E402
from tests.tiny_models import ARCHITECTURES, tiny_model  # noqa: E402

# Test in tests/models/test_architectures.py: the column it fills.
COLUMNS = {
    "test_experts_are_asked_one_by_one": "outputs",
    "test_watching_and_identity_change_no_bit_and_hooks_restore": "no bit changes",
    "test_re_routing_mixes_the_experts_it_says": "re-routing",
    "test_streamed_in_memory_and_resumed_are_equal_to_the_bit": "streamed, resumed",
}

BY_HAND = "\n## What vLLM serves beyond these\n"  # and what follows it in the page

HEAD = """\
# Architectures

Every directory of transformers {version} with routed experts, {day}. Made by
`python tools/architectures.py` from the tests that it ran on a tiny random model of each (E=6, K=2
where the architecture permits, float32, CPU); `make matrix` runs the same tests.

* **outputs**: every expert asked for alone equals its maths written out from the weights, to 1e-6.
* **no bit changes**: logits are equal to the bit while watched, under identity re-routing, and
  after the hooks are gone; every layer was called exactly once.
* **re-routing**: a batch whose slots all fall on one expert gives the mixture computed by hand.
* **streamed, resumed**: calibration layer by layer from the checkpoint's files, and again after a
  stop in the second layer, equals calibration in memory to the bit.

| architecture | experts | how | {columns} |
|---|---|---|{rules}|
"""

TAIL = """
Not supported:

{refused}
* `vitpose_backbone`: its experts are chosen by the data set, there is no router.

Of models that also see or hear, the part that decodes text was built. With one expert a token
(llama4, switch_transformers, zaya as released) the rule can move nothing: S=1 is K. Experts for
images (`vision_moe` of ernie4_5_vl_moe) never see text and are left out; of qwen3_omni_moe the
thinker is calibrated. An encoder-decoder model reads the text on both sides, and its decoder layers
are numbered after the encoder's. Many routers return slots in no order: "top S" is by the weight
that is applied, also where the router's choice followed another score (phimoe, gemma4).
"""


def main() -> int:
    """Run, write, and fail if anything failed."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        tests = ["tests/models/test_architectures.py", "-m", "matrix or not matrix"]
        command = [sys.executable, "-m", "pytest", "-q", *tests, f"--junitxml={report}"]
        status = subprocess.run(command, cwd=ROOT).returncode
        passed = outcomes(report)
    rows = [row(architecture, passed[architecture]) for architecture in ARCHITECTURES]
    head = HEAD.format(
        version=transformers.__version__,
        day=date.today().isoformat(),
        columns=" | ".join(COLUMNS.values()),
        rules="---|" * (len(COLUMNS) - 1) + "---",
    )
    refused = "\n".join(f"* `{name}`: {reason}." for name, reason in UNSUPPORTED.items())
    text = (
        head
        + "\n".join(rows)
        + "\n"
        + TAIL.format(refused=refused, version=transformers.__version__)
    )
    path = ROOT / "docs" / "architectures.md"
    _, mark, by_hand = path.read_text("utf-8").partition("\n## ")  # what follows the table
    path.write_text(text + mark + by_hand, "utf-8")
    return status


def outcomes(report: Path) -> dict[str, dict[str, bool]]:
    """Architecture -> column -> passed."""
    found: dict[str, dict[str, bool]] = defaultdict(dict)
    for case in ElementTree.parse(report).iter("testcase"):
        match = re.fullmatch(r"(\w+)\[([\w-]+)\]", case.attrib["name"])
        if match and match[1] in COLUMNS:
            found[match[2]][COLUMNS[match[1]]] = not len(case)
    return found


def row(architecture: str, passed: dict[str, bool]) -> str:
    """One line of the table."""
    layers = moe_layers(tiny_model(architecture))
    adapter = type(layers[0].adapter).__name__
    how = "the common call" if adapter == "Mixture" else f"adapter `{adapter}`"
    experts = type(layers[0].experts).__name__
    marks = ["yes" if passed.get(column) else "**no**" for column in COLUMNS.values()]
    cells = [architecture, f"`{experts}`", how, *marks]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    raise SystemExit(main())
