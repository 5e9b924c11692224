"""`sere tune` with pools and linear maps: what is tried, what is chosen and why, what resumes."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sere.calibration.calibrate import calibrate
from sere.evaluation.quality import Judge
from sere.maps import beside
from sere.models.adapters import Changed
from sere.policy import BATCH_KEYS, Policy
from sere.results.journal import Journal, JournalError
from sere.serving.settings import Settings
from sere.step_cost.cost import Cost
from sere.table import Table
from sere.tuning.budget import Budget
from sere.tuning.kinds import ERROR, first_choices, kinds_of, pools_of
from sere.tuning.search import Point, Tuner
from sere.tuning.tune import run
from sere.tuning.why import why
from tests.conftest import HIDDEN, LAYERS, E

READING = Cost(b=1.0, a=0.0)
RANK, WIDTH = 2, 16  # of an expert's inner layer


@pytest.fixture(scope="module")
def tune(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The tiny model, with a table that has maps and one that is the same without."""
    folder = tmp_path_factory.mktemp("tune")
    words = "quick brown fox jumps"
    texts = [f"{words[i % 9 :][:5]}{i:02} {words[i % 7 :]}"[: 8 + i % 11] for i in range(56)]
    data = folder / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    calibrate(
        *(str(model_dir), folder / "mapped"),
        data=data,
        samples=56,
        length=64,
        maps=RANK,
        progress=False,
    )
    (folder / "bare").write_bytes((folder / "mapped").read_bytes())

    def tuned(budget: str, table: str = "bare", **more: Any) -> dict[str, Any]:
        options = {"data": str(data), "samples": 56, "prompt": 2, "length": 10, "per_layer": False}
        settings = {"batches": [1, 8], "output": str(folder / "o.json"), "cost": READING, **options}
        (folder / "o.json").unlink(missing_ok=True)
        return run(str(model_dir), str(folder / table), budget=budget, **{**settings, **more})

    tuned.folder = folder  # type: ignore[attr-defined]
    return tuned


def served(path: Path) -> Policy:
    """What an engine would follow, which has checked it."""
    settings = Settings.parse({"table": str(path)}, model_folder=None, model_default={})
    table = Table.load(path)
    table.check_policy(settings.policy)
    for bucket in (0, *settings.policy.batches):
        if own := settings.policy.for_bucket(bucket):
            for index in table.layers:
                table.plan(index, own)
    return settings.policy


def test_a_pool_is_chosen_where_first_choices_name_more_than_it_holds(
    tune: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a random model whatever stands in is as bad: what reads least wins a loose budget."""
    result = tune("kl=9")
    _, found = result["by_batch"]
    chosen = Policy.from_dict(result["policy"])
    here = chosen.at(8)
    assert here and here.pool == 0.375 and here.S == 0 and chosen.pool is None
    held, own = result["held_out"][1], found["error"]
    (alone,) = [p for p in found["points"] if p["policy"] == Policy(S=1).to_dict()]
    assert Policy.from_dict(own["policy"]) == here and own["read"] == own["active"]
    assert own["read"] < alone["active"] and alone["upper"] <= 9
    assert served(tune.folder / "bare") == chosen
    said = capsys.readouterr().out
    assert f"why: {result['why']}\n" in said
    assert result["why"].startswith("a pool of three eighths of the experts with S=0, tau=")
    names = f"first choices alone (S=1) name {alone['active'] / E:.0%} of the experts there"
    assert (
        f"from 8 rows on, because {names} and the pool 38%, and it is the fastest" in result["why"]
    )
    assert f"it reads {held['chosen']['active']:.1f} of {E} experts where" in result["why"]
    assert "no pool" in result["why"] and "the paper's rule" in result["why"]


def test_maps_are_chosen_once_for_all_batch_sizes_and_their_bytes_are_counted(tune: Any) -> None:
    cost = Cost(b=1.0, a=0.0, route=0.01)
    result = tune("kl=0.02", "mapped", cost=cost)
    chosen = Policy.from_dict(result["policy"])
    assert chosen.frees and chosen.rank in (RANK, RANK // 2, None)
    for override in filter(None, chosen.batches.values()):
        assert set(override) <= set(BATCH_KEYS)
    assert served(tune.folder / "mapped") == chosen
    assert {*result["by_batch"][1]["maps"]} == {"linear 2", "linear 1", "constant"}
    shares = {"linear 2": 2 * 2 + 1, "linear 1": 2 * 1 + 1, "constant": 1}
    mapped = [p for p in result["by_batch"][1]["points"] if p["kind"] in shares]
    assert any(point["read"] > point["active"] for point in mapped)
    for point in mapped:
        share = shares[point["kind"]] * HIDDEN / (3 * HIDDEN * WIDTH)
        maps = (point["read"] - point["active"]) / share
        assert 0 <= maps <= E  # how many answered in a step
        seconds = LAYERS * (point["read"] + 2 * cost.route)  # a launch to re-route, one to answer
        assert point["seconds"] == pytest.approx(seconds)
    bare = tune("kl=0.02", cost=cost)
    by_maps, by_experts = (
        sum(h["chosen"]["seconds"] for h in r["held_out"]) for r in (result, bare)
    )
    assert by_maps < by_experts
    assert "of them are maps' bytes" in result["why"]


def test_a_table_without_maps_is_searched_as_ever_and_so_is_a_model_that_takes_none(
    tune: Any,
) -> None:
    bare, mapped = (Table.load(tune.folder / name) for name in ("bare", "mapped"))
    takes, refuses = (SimpleNamespace(adapter=SimpleNamespace(adds=adds)) for adds in (True, False))
    assert kinds_of(bare, [takes]) == [ERROR] == kinds_of(mapped, [takes, refuses])  # type: ignore[list-item]
    assert [kind.name for kind in kinds_of(mapped, [takes])] == [  # type: ignore[list-item]
        *("error", "linear 2", "linear 1", "constant")
    ]


def test_a_pool_is_tried_only_where_it_can_read_less(make_table: Any) -> None:
    table = make_table()
    assert pools_of(table, 3.0) == []
    assert pools_of(table, 3.5) == [(0.375, 0), (0.375, 1)]
    assert pools_of(table, 5.0) == [(0.5, 0), (0.5, 1), (0.375, 0), (0.375, 1)]
    draws = torch.randint(E, (100_000, 4), generator=torch.Generator().manual_seed(0))
    named = sum((draws == u).any(1).double().mean() for u in range(E))
    assert first_choices(E, 4) == pytest.approx(float(named), 0.01)


@pytest.mark.parametrize(
    ("bound", "tried"),
    [
        (math.inf, [9, 4, 1, 2, 3]),  # of 20, those below 3 keep the budget
        (15.0, [9]),  # keeps it not, and takes 25 - 9: those before it take longer
    ],
)
def test_what_cannot_be_faster_any_more_is_left_out(
    table: Table, bound: float, tried: Sequence[int]
) -> None:
    policies = [ERROR.at(i / 100, 0, 0.5) for i in range(20)]

    class Canned(Tuner):
        def points(self, policies: Any, batch: int) -> list[Point]:
            numbers = [round(100 * policy.tau) for policy in policies]
            return [
                Point(policy, batch, batch, 1.0, 1.0, 0.0, float(n >= 3), 25.0 - n)
                for policy, n in zip(policies, numbers, strict=True)
            ]

    tuner = Canned(table, None, Budget("kl", 0.5), READING, settings=100)  # type: ignore[arg-type]
    seen = tuner.boldest(policies, 8, faster_than=bound)
    assert [round(100 * p.policy.tau) for p in seen if p.policy] == tried  # type: ignore[operator]
    assert tuner.settings == 100 - (5 - len(tried))


def test_a_run_that_goes_on_says_what_it_has_and_what_is_left(
    tune: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tune.folder / "killed.json"
    kept = tune.folder / "killed.json.unfinished"
    measured = Judge._pass

    def stopping(judge: Judge, model: Any, piece: Any) -> Changed:
        if len(judge.journal) > 12:
            raise KeyboardInterrupt
        return measured(judge, model, piece)  # type: ignore[return-value]

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Judge, "_pass", stopping)
        tune("kl=9", output=str(output))
    assert "an earlier run" not in capsys.readouterr().err
    before = kept.read_bytes()
    assert tune("kl=9", output=str(output), dry_run=True) == {}
    said = capsys.readouterr().err
    # Twelve pieces: stock's of both halves is one setting.
    assert "an earlier run has left 11 of them in killed.json.unfinished" in said
    total = int(said.split("about ")[1].split(" settings")[0])
    assert f"which are not measured again: about {total - 11} are left" in said
    assert "stock routing took" in said
    assert kept.read_bytes() == before  # --dry-run costs nobody what is there
    head, *pieces = before.decode().splitlines()
    older = {k: v for k, v in json.loads(head).items() if k != "version of the search"}
    kept.write_text("\n".join([json.dumps(older), *pieces, ""]))
    with pytest.raises(JournalError, match=r"other settings \(version of the search\); remove it"):
        tune("kl=9", output=str(output))
    kept.write_bytes(before)
    assert tune("kl=9", output=str(output))["by_batch"] and not kept.exists()


def test_a_journal_can_be_left_to_another_run(tmp_path: Path) -> None:
    with Journal(tmp_path / "j", {}) as journal:
        journal.add("one", 1)
        journal.keep()
    with Journal(tmp_path / "j", {}) as journal:
        assert list(journal) == ["one"]
    assert not (tmp_path / "j").exists()


def test_where_nothing_is_chosen_the_reason_is_said(tune: Any) -> None:
    result = tune("kl=0.02", cost=Cost(b=1.0, a=0.0, route=100.0))
    assert result["policy"] is None and result["why"] == "what keeps the budget saves no time"
    assert why(result) == result["why"]


def test_what_maps_and_pools_will_take_is_said_before(
    tune: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert beside(tune.folder / "mapped").exists() and not beside(tune.folder / "bare").exists()
    assert tune("kl=9", dry_run=True) == {}  # its maps were lost
    pools = 4 * 5  # two pools, S=0 and S=1, five tau each
    plain = 2 * (1 + 8) + 5 + 3 + pools
    assert f"about {plain} settings" in (said := capsys.readouterr().err) and "maps" not in said
    assert tune("kl=9", "mapped", dry_run=True) == {}
    maps = 3 * (5 + pools) + 8  # ranks 2, 1 and 0; 8 until one policy does for all batch sizes
    said = capsys.readouterr().err
    assert f"about {plain + maps} settings on 24 passages each (at most {4 * pools} of them" in said
    assert f"with a pool, at most {maps} of them with maps)" in said
