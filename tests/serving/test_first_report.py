"""What an engine that calibrated itself says of its policy: told to people, kept, and left out
where it would be false. That its figures are right is tested with engines (test_self_calibration).
"""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sere.serving import first_report, trial
from sere.serving.auto import Auto
from sere.serving.first_report import as_text, tell
from sere.serving.own_maps import Own
from sere.serving.table_cache import file_of
from sere.table import Table

WORKER = {
    "policy": "S=2 tau=0.02",
    "inert": None,
    "rows": "decode",
    "kernels": ["Triton"],
    "operator": "triton",
    "device": "a card",
}
KL = [0.01, 0.03, 0.02, 0.02, 0.01, 0.03, 0.02, 0.02]
QUALITY = {"kl": KL, "loss": KL, "stock_loss": [2.0] * 8, "vocabulary": 32000}


class Executor:
    """Workers that have tried what they are asked to, twice as fast or slow as stock."""

    def __init__(self, ms: float = 5.0, **own: Any) -> None:
        auto = Auto.parse({"cache": False, **own})
        self.asked: list[int] = []
        self.ms = ms
        self.settings = SimpleNamespace(auto=auto)
        self.vllm_config = SimpleNamespace(
            parallel_config=SimpleNamespace(enable_expert_parallel=False),
            model_config=SimpleNamespace(enforce_eager=True),
            compilation_config=SimpleNamespace(cudagraph_mode="NONE"),
            scheduler_config=SimpleNamespace(max_num_seqs=40),
        )

    def collective_rpc(self, call: str, args: tuple[Any, ...]) -> list[Any]:
        if call == "sere_room_to_try":
            return [1000, 33]
        (texts,) = args
        self.asked.append(len(texts))
        found = {"requests": len(texts), "before": 50.0, "after": 20.0, "same": 0.97}
        times = {"stock_ms": [10.0, 11.0, 12.0, 13.0], "ms": [self.ms] * 4}
        return [{**found, **times, **QUALITY}, None]


@pytest.fixture
def own(table_path: Path, tmp_path: Path) -> Own:
    table = Table.load(table_path)
    return Own(file_of(table), table, path=tmp_path / "model-key.table")


@pytest.fixture(autouse=True)
def without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_report, "settings_of", lambda config: config.settings)
    monkeypatch.setattr(first_report, "vllm_version", lambda: "0.32.0")
    monkeypatch.setattr(first_report, "obstacle_to_reading", lambda config: None)
    monkeypatch.setattr(first_report, "longest", lambda config: 4096)
    monkeypatch.setattr(
        first_report, "symbol", lambda name: lambda config: lambda text, **_: {"input_ids": [*text]}
    )


def said(executor: Executor, own: Own | None, caplog: Any, **worker: Any) -> list[Any]:
    executor.vllm_config.settings = executor.settings
    caplog.clear()
    with caplog.at_level(logging.INFO, "vllm.sere"):
        tell(executor, own, [{**WORKER, **worker}])
    return [record for record in caplog.records if record.name == "vllm.sere"]


def test_sizes_that_fit_are_tried_and_shown(own: Own, caplog: Any) -> None:
    executor = Executor()
    *_, last = said(executor, own, caplog)
    assert executor.asked == [8, 32]  # 33 is what the cache of one rank has room for
    lines = last.getMessage().splitlines()
    assert (
        "the bundled text, which is not yours" in lines[0]
        and "none of them calibrated on" in lines[0]
    )
    row = (
        "8  50.0 -> 20.0  11.50 -> 5.00  2.30x (2.00-2.60)  0.0200 ±0.0027  +0.0200 ±0.0027  97.0%"
    )
    assert lines[2].split() == row.split()
    assert len({len(line) for line in lines[1:4]}) == 1  # columns


def test_it_is_said_again_and_not_measured_again(own: Own, caplog: Any) -> None:
    said(Executor(), own, caplog)
    assert own.path is not None
    path = own.path.with_suffix(".report.json")
    report = json.loads(path.read_text())
    assert [size["requests"] for size in report["sizes"]] == [8, 32]
    again = Executor()
    *_, last = said(again, own, caplog)
    assert not again.asked and f"Measured at an earlier start: {path}" in last.getMessage()
    for changed in (
        {"policy": "S=1"},
        {"kernels": ["Marlin"]},
        {"device": "another card"},
    ):
        said(anew := Executor(), own, caplog, **changed)
        assert anew.asked, changed
    other = replace(own, data=own.data + b" ")
    assert (
        first_report._facts(again.vllm_config, again.settings.auto, other, [WORKER])
        != (report["of"])
    )


@pytest.mark.parametrize("torn", ["", "{", "[]", "null", '{"of": 1}'])
def test_a_torn_report_is_made_anew(torn: str, own: Own, caplog: Any) -> None:
    assert own.path is not None
    own.path.with_suffix(".report.json").write_text(torn)
    said(executor := Executor(), own, caplog)
    assert executor.asked
    json.loads(own.path.with_suffix(".report.json").read_text())["sizes"]


def test_a_warning_stands_below_the_figures_that_it_is_about(own: Own, caplog: Any) -> None:
    own = replace(own, path=None)
    *_, report, last = said(Executor(ms=20.0), own, caplog)
    assert "beside stock routing" in report.getMessage()
    assert last.levelno == logging.WARNING and "SLOWER HERE, 0.57x at best" in last.getMessage()
    assert all(record.levelno < logging.WARNING for record in said(Executor(), own, caplog)[1:])


def test_nothing_is_said_of_what_was_not_asked_for_or_re_routes_nothing(
    own: Own, caplog: Any
) -> None:
    assert not said(Executor(report=False), own, caplog)
    assert not said(Executor(), None, caplog)
    assert not said(Executor(), own, caplog, inert="S=8 is stock")


def test_what_cannot_be_tried_is_said_and_ends_no_start(
    own: Own, caplog: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (text := tmp_path / "text.jsonl").write_text(json.dumps({"text": "few words"}) + "\n")
    (record,) = said(Executor(data=str(text)), own, caplog)
    assert "no report on speed and quality: two texts of 49 tokens" in record.getMessage()

    def failing(call: str, args: tuple[Any, ...]) -> list[Any]:
        raise RuntimeError("CUDA out of memory")

    (executor := Executor()).collective_rpc = failing  # type: ignore[method-assign]
    *_, last = said(executor, own, caplog)
    assert "no report" in last.getMessage() and "out of memory" in last.getMessage()
    monkeypatch.setattr(first_report, "obstacle_to_reading", lambda config: "it drafts")
    (record,) = said(Executor(), own, caplog)
    assert "no report on speed and quality: it drafts" in record.getMessage()


def test_a_report_that_cannot_be_kept_is_said_all_the_same(own: Own, caplog: Any) -> None:
    gone = replace(own, path=Path("/nowhere/model-key.table"))
    records = said(Executor(), gone, caplog)
    assert any("the report is not kept" in record.getMessage() for record in records)
    assert "beside stock routing" in records[-1].getMessage()


def test_what_takes_long_is_left_out_and_told(
    own: Own, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(first_report, "_PATIENCE", 0)
    moments = iter([0.0, 0.0, 1.0, 1.0, 1.0])
    monkeypatch.setattr(first_report.time, "monotonic", lambda: next(moments))
    monkeypatch.setattr(first_report, "_PATIENCE", 0.5)
    executor = Executor()
    tried = first_report._made(
        SimpleNamespace(vllm_config=executor.vllm_config, collective_rpc=executor.collective_rpc),
        executor.settings.auto,
        own,
        "S=2",
    )
    assert executor.asked == [8]
    assert "not tried, as it takes long: 32 requests" in as_text(tried)


def test_what_both_routings_say_is_compared_text_by_text() -> None:
    """Rows of a step may stand in another order; what stock never says adds nothing."""
    torch.manual_seed(0)
    texts = [[i + place for place in range(trial.LENGTH)] for i in range(3)]
    session = SimpleNamespace(rows=SimpleNamespace(buffer=torch.zeros(1)))
    own = object.__new__(trial._Trial)
    own._session, own._texts = session, texts  # type: ignore[assignment]
    stock, new = torch.randn(3, 60), torch.randn(3, 60)
    stock[:, 59] = new[:, 59] = -torch.inf
    order = [2, 0, 1]
    found = list(own._compared(([0, 1, 2], stock), (order, new[order]), 17))
    for text, kl, lost, of_stock, same in found:
        p, q = (
            torch.distributions.Categorical(logits=stock[text, :59]),
            (torch.distributions.Categorical(logits=new[text, :59])),
        )
        assert kl == pytest.approx(torch.distributions.kl_divergence(p, q).item(), rel=1e-5)
        said = torch.tensor(texts[text][17])
        assert lost == pytest.approx((p.log_prob(said) - q.log_prob(said)).item(), rel=1e-4)
        assert of_stock == pytest.approx(-p.log_prob(said).item(), rel=1e-5)
        assert same == bool(p.logits.argmax() == q.logits.argmax())
    assert [text for text, *_ in found] == [0, 1, 2]


def test_a_rank_that_sees_no_logits_takes_its_turns_all_the_same() -> None:
    """The others would wait for it."""
    own = object.__new__(trial._Trial)
    own._logits, own._order, own.failed = None, [0], None
    own._keep(made := [])
    assert not made and own.failed is not None and "logits are not seen" in own.failed
