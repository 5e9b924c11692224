"""The Grafana dashboard: well-formed, and every metric that it names is exported."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from sere.demo_model.tasks import examples
from tests.servers import Server

DASHBOARD = json.loads((Path(__file__).parents[2] / "dashboards/sere.json").read_text())
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]
EXPRESSIONS = [target["expr"] for panel in PANELS for target in panel["targets"]]
VARIABLES = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}


def metrics_of(expression: str) -> set[str]:
    return set(re.findall(r"\b(?:sere_|vllm:)\w+", expression))


@pytest.mark.engine
@pytest.mark.modes
def test_every_metric_is_exported_by_a_real_server(server: Server) -> None:
    prompts = [e.prompt for e in examples(24, seed=7, split="held_out")]
    for _ in range(2):
        server.complete(prompts, 12, ignore_eos=True)
    families = text_string_to_metric_families(server.get("/metrics"))
    exported = {sample.name for family in families for sample in family.samples}
    for expression in [*EXPRESSIONS, VARIABLES["engine"]["query"]["query"]]:
        assert metrics_of(expression)
        assert metrics_of(expression) <= exported


def test_panels_have_what_grafana_needs() -> None:
    """Read and written by Grafana's own types (grafana-foundation-sdk 10.1), nothing was lost."""
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    for panel in PANELS:
        assert panel["title"] and panel["description"]
        assert panel["type"] in ("timeseries", "stat")
        assert panel["datasource"]["uid"] == "${datasource}"
        references = [target["refId"] for target in panel["targets"]]
        assert len(set(references)) == len(references) > 0
    assert VARIABLES["datasource"]["type"] == "datasource"
    for name in re.findall(r"\$(\w+)", " ".join(EXPRESSIONS)):
        assert name in VARIABLES or name == "__rate_interval"


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in PANELS:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert max(x for x, _ in cells) < 24
        assert not cells & taken
        taken |= cells


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool (apt: prometheus)")
def test_expressions_are_promql(tmp_path: Path) -> None:
    rules = [
        {"record": f"check:{i}", "expr": e.replace("$__rate_interval", "1m")}
        for i, e in enumerate(EXPRESSIONS)
    ]
    path = tmp_path / "rules.yml"  # YAML holds JSON
    path.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    subprocess.run(["promtool", "check", "rules", str(path)], check=True)
