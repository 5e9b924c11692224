"""`sere tune` on a tiny model: the budget, the choice, and what becomes of it in the table."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import tuned
from sere.calibration.calibrate import calibrate
from sere.cli import main
from sere.evaluation import evaluate
from sere.evaluation.arms import Arm
from sere.evaluation.decoding import Passage, Reading, decoded
from sere.evaluation.quality import Judge, Sums
from sere.models.loading import load_model
from sere.models.moe import moe_layers
from sere.policy import STOCK, Policy
from sere.results import provenance
from sere.results.journal import Journal, JournalError
from sere.serving.settings import Settings
from sere.step_cost.cost import Cost, Step, fitted, from_bench, roofline
from sere.table import Table
from sere.tuning.budget import Budget, BudgetError, most
from sere.tuning.by_layer import _exchange, neighbours
from sere.tuning.choice import front, in_place
from sere.tuning.joint import composed, together
from sere.tuning.kinds import TAUS
from sere.tuning.search import Point, Tuner
from sere.tuning.tune import _cost, run

RESULTS = Path(__file__).parents[2] / "benchmarks/results"
READING = Cost(b=1.0, a=0.0)  # time is what is read
IN_TURN: Any = SimpleNamespace(at_once=lambda searches: [each() for each in searches])  # no model


@pytest.fixture(scope="module")
def corpus_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough short texts for intervals of some use at a batch of four."""
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    words = "quick brown fox jumps"
    texts = [f"{words[i % 9 :][:5]}{i:02} {words[i % 7 :]}"[: 8 + i % 11] for i in range(56)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def tune(model_dir: Path, corpus_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tune")
    calibrate(str(model_dir), folder / "t", data=corpus_file, samples=56, length=64, progress=False)

    def tuned(budget: str, **more: Any) -> dict[str, Any]:
        options = {"data": str(corpus_file), "samples": 56, "prompt": 2, "length": 10}
        settings = {"batches": [1, 4], "output": str(folder / "o.json"), "cost": READING, **options}
        (folder / "o.json").unlink(missing_ok=True)  # of another budget, which is kept
        return run(str(model_dir), str(folder / "t"), budget=budget, **{**settings, **more})

    tuned.folder, tuned.model = folder, model_dir  # type: ignore[attr-defined]
    return tuned


def test_a_tighter_budget_loads_more_experts_and_loses_less(tune: Any) -> None:
    found = {}
    for budget in ("kl=1.0", "kl=0.003"):
        result = tune(budget, per_layer=False)
        found[budget] = result["held_out"][1]["chosen"]
        assert result["by_batch"][0]["error"] is None  # a row alone has no expert but its own
        for own in result["by_batch"][1:]:
            best = own["error"]
            assert best["upper"] <= float(budget[3:]) and best["seconds"] < own["stock"]["seconds"]
    loose, tight = found.values()
    assert loose["active"] < tight["active"] < result["held_out"][1]["stock"]["active"]
    assert tight["loss"] < loose["loss"]


def test_settings_per_layer_are_used_only_where_they_are_faster(tune: Any) -> None:
    plain, layered = tune("kl=0.001", per_layer=False), tune("kl=0.001")
    seconds = [r["held_out"][1]["chosen"]["seconds"] for r in (plain, layered)]
    if layered["policy"] != plain["policy"]:
        assert "layers" in str(layered["policy"]["batches"])
    else:
        assert seconds[0] == seconds[1]


def test_what_a_policy_was_searched_on_is_told_where_it_is_judged(
    tune: Any, corpus_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It looks best there. Another draw shares some; another policy was not chosen on any."""
    tune("kl=0.01", per_layer=False)

    def said(policy: str = "tuned", **more: Any) -> str:
        options = {"data": str(corpus_file), "samples": 56, "prompt": 2, "length": 10, **more}
        output = tmp_path / f"{len([*tmp_path.iterdir()])}.json"
        table = str(tune.folder / "t")
        evaluate.run(str(tune.model), table, str(output), policies=[policy], batches=[4], **options)
        return capsys.readouterr().err

    capsys.readouterr()
    assert "28 of the 56 passages are among those that `sere tune` searched on" in said()
    assert " of the 20 passages are among those" in said(samples=20, seed=3)
    assert "searched on" not in said('{"S": 1, "tau": 0.5}')


def test_serving_finds_the_choice_in_the_table(tune: Any) -> None:
    result = tune("kl=0.01", per_layer=False)
    path = tune.folder / "t"
    chosen = Policy.from_dict(result["policy"])
    assert Table.load(path).policy == chosen and chosen.tau

    def policy(**given: Any) -> Policy:
        settings = {"table": str(path), **given}
        return Settings.parse(settings, model_folder=None, model_default={}).policy

    assert policy() == chosen
    assert policy(S=2) == Policy(S=2)  # what the user says goes


def test_where_nothing_saves_time_it_says_so(tune: Any, capsys: pytest.CaptureFixture[str]) -> None:
    slow = Cost(b=1.0, a=0.0, route=100.0)
    assert tune("kl=0.01", cost=slow)["policy"] is None
    assert "do not enable" in capsys.readouterr().out
    # Serving does what was found best, and not what it does with a table that nobody tuned.
    stored = Settings.parse(
        {"table": str(tune.folder / "t")}, model_folder=None, model_default={}
    ).policy
    assert stored.is_stock and stored.brief() == "stock"
    assert all(stored.for_bucket(stored.bucket(rows)) is None for rows in (1, 2, 500))
    assert (tune.folder / "o.png").exists()


def test_a_choice_that_unseen_passages_do_not_confirm_is_called_so(
    tune: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sere.tuning.joint.confirmed", lambda *_: None)
    tune("kl=0.05")
    said = capsys.readouterr().out
    assert "do not enable" in said and "do not confirm" in said and "raise --samples" in said
    assert Table.load(tune.folder / "t").policy == STOCK


def test_the_command_line(
    tune: Any, model_dir: Path, corpus_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, output = str(tune.folder / "t"), str(tune.folder / "cli.json")
    flags = ["--data", str(corpus_file), "--samples", "56", "--prompt", "2", "--length", "6"]
    flags += ["--batch", "1", "--expert-mb", "10", "--route-us", "7", "--budget", "top1=0.8"]
    flags += ["-o", output]
    assert main(["tune", str(model_dir), table, *flags]) == 0
    result = json.loads(Path(output).read_text())
    assert "10 MB an expert" in result["cost"]["source"] and result["cost"]["route"] == 7e-6
    assert result["settings"]["budget"] == {"name": "top1", "limit": 0.8}
    # Another run's is not replaced unasked, and its own is.
    kept, other = Path(output).read_bytes(), [*flags, "--budget", "top1=0.7"]
    assert main(["tune", str(model_dir), table, *other]) == 1
    said = "is of another run, which differs in budget: choose another output"
    assert said in capsys.readouterr().err
    assert Path(output).read_bytes() == kept
    moved = json.dumps({**result, "settings": {**result["settings"], "model": "other/model"}})
    Path(output).write_text(moved)
    assert main(["tune", str(model_dir), table, *flags]) == 1
    assert "is of other/model, which differs in model" in capsys.readouterr().err
    assert main(["tune", str(model_dir), table, *flags, "--force"]) == 0
    assert main(["tune", str(model_dir), table, *flags]) == 0


def test_it_says_what_it_will_take_before_it_starts(
    tune: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    before = Table.load(tune.folder / "t").policy
    assert tune("kl=0.01", per_layer=False, output=str(tune.folder / "dry"), dry_run=True) == {}
    assert not [path for path in tune.folder.iterdir() if path.name.startswith("dry")]
    assert Table.load(tune.folder / "t").policy == before
    said = capsys.readouterr().err
    # at both: stock; at 4 also 5 halvings of 20 tau, K-1=1 by the paper's rule and 2 thresholds;
    # the first choices of 4 rows name up to 3.3 experts: a pool of 3 has S=0 and S=1, 5 tau each
    pools = 2 * 5
    assert f"about {2 * (1 + 8) + 5 + 3 + pools} settings on 28 passages each" in said
    assert f"(at most {pools} of them with a pool)" in said
    assert "GB of weights" in said and "stock routing took" in said
    tune("kl=0.01", per_layer=False, output=str(tune.folder / "wet.json"))
    assert re.search(r"setting \d+ of about \d+, about \d+ s left", capsys.readouterr().err)


def test_predictions_name_the_card_that_they_are_of(
    tune: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody said on what will be served: that it pays is only said of an H100."""
    large = {"expert_bytes": 1e9}
    tune("kl=0.5", cost=None, device=large, per_layer=False)
    said = capsys.readouterr().out
    assert re.search(r"x on an H100 +enable on an H100", said)
    assert "an H100 is not here" in said and "3350 GB/s (an H100's)" in said
    tune("kl=0.5", cost=None, device={"expert_bytes": 1.0}, per_layer=False)
    assert "saves no time on an H100: do not enable" in capsys.readouterr().out
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert _cost(moe_layers(load_model(str(tune.model))), 2, None, large).card == ""
    monkeypatch.undo()
    everything = {**large, "bandwidth": 1e12, "flops": 1e14, "route": 1e-6}
    tune("kl=0.5", cost=None, device=everything, per_layer=False)
    said = capsys.readouterr().out
    assert "H100" not in said and "1000 GB/s, 1e+14 flop/s" in said


def test_the_table_and_the_front_name_one_policy_alike(
    tune: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is served at 4 rows does something else below: no line calls it by what it is not."""
    result = tune("kl=0.01", per_layer=False)
    chosen, own = Policy.from_dict(result["policy"]), result["by_batch"][1]
    name = in_place(chosen, 4)
    assert name.endswith("below 4 stock")
    said = capsys.readouterr().out
    (line,) = [line for line in said.splitlines() if name in line and "->" not in line]
    assert f" {own['as_chosen']['active']:.1f} " in line and line.split()[-1] == "yes"
    assert own["as_chosen"]["policy"] == result["policy"]
    assert len([line for line in said.splitlines() if name in line and "->" in line]) == 1


@pytest.mark.parametrize(
    "text",
    ["kl", "kl=0", "kl=-1", "kl=inf", "kl=nan", "ppl=1", "kl=x", "top1=5", "exact_match=1.5"],
)
def test_budgets_that_cannot_be_read(text: str) -> None:
    with pytest.raises(BudgetError, match="expected NAME=LOSS"):
        Budget.parse(text)


def test_too_few_passages_to_be_sure(tune: Any) -> None:
    with pytest.raises(BudgetError, match="raise --samples"):
        tune("kl=0.1", batches=[32])


def test_a_loss_counts_with_its_error() -> None:
    def sums(*parts: tuple[int, float]) -> list[Sums]:
        lost = [{"exact": 9 - n, "lost_answers": n, "top1": top1} for n, top1 in parts]
        return [Sums(tokens=10, passages=10, **part) for part in lost]

    t = 6.3138  # two batches: one degree of freedom
    stock, arm = sums((0, 10), (0, 10)), sums((0, 10), (2, 8))
    assert Budget("exact_match", 1).loss(arm, stock) == pytest.approx((1 / 9, (1 + t) / 9), 1e-4)
    # Three more batches as bad as the worst, which changed two of the twenty tokens.
    upper = 0.1 + t * 0.1 + 2.9957 * 2 / 20
    assert Budget("top1", 1).loss(arm, stock) == pytest.approx((0.1, upper), 1e-4)
    assert Budget("top1", 1).loss(stock, stock) == (0, pytest.approx(3 / 20, 2e-3))
    some = [replace(part, kl=kl) for part, kl in zip(stock, (0.0, 0.4), strict=True)]
    assert Budget("kl", 1).loss(some, stock)[1] == pytest.approx(0.02 + t * 0.02 + 0.05991, 1e-3)
    assert Budget("kl", 1).loss(stock, stock) == (0, 0)
    # Nothing lost of the 18 answers that stock gets right: up to 3 / 18 may be, with 95 %.
    assert Budget("exact_match", 1).loss(stock, stock) == (0, pytest.approx(3 / 18, 2e-3))
    for name in ("kl", "top1", "exact_match"):  # one batch tells nothing of its error
        assert Budget(name, 1).loss(stock[:1], stock[:1]) == (0, math.inf)


@pytest.mark.parametrize(
    ("seen", "expected"),  # half the upper 5 % points of chi-square with 2 (seen + 1) degrees
    [(0, 5.991 / 2), (1, 9.488 / 2), (2, 12.592 / 2), (9, 31.410 / 2), (49, 124.342 / 2)],
)
def test_few_lost_answers_may_have_been_more(seen: int, expected: float) -> None:
    assert most(seen) == pytest.approx(expected, abs=6e-4)


def test_the_engines_answers_are_judged_as_the_tuner_judges() -> None:
    """Half of 1000 prompts are right under stock: 4 lost of 500, though as many are newly right."""
    figures = {"exact_match": [0.5, 0.0], "same_as_stock": [0.9, 0.0], "active": [2.0, 0.0]}
    engine = {
        "batch": 8,
        "prompts": 1000,
        "kept": False,
        "stock": {**figures},
        "tuned": {**figures, "answers_lost": [0.0, 0.002], "answers_lost_gross": [0.004, 0.002]},
    }
    loss, upper = tuned.lost(engine, Budget("exact_match", 0.01))
    assert loss == pytest.approx(4 / 500) and upper == pytest.approx(9.1535 / 500, 1e-4)
    engine["tuned"] |= {"answers_lost": [0.0, 0.0], "answers_lost_gross": [0.0, 0.0]}
    assert "0.00% (< 0.60%)" in tuned.as_text({"budget": 0.01, "engine": [engine]})


def test_a_budget_of_answers_needs_answers_that_stock_gets_right(
    tune: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(BudgetError, match="at least 300 are needed"):
        Budget("exact_match", 0.01).check_passages(128)
    Budget("exact_match", 0.01).check_passages(300)
    Budget("kl", 0.01).check_passages(1)
    Budget("kl", 0.01).check_answers(0, 9)
    with pytest.raises(BudgetError, match="gets 299 of 512 passages right"):
        Budget("exact_match", 0.01).check_answers(299, 512)
    # Text has no answers: stock's most likely tokens are never all of it, and nothing can be lost.
    with pytest.raises(BudgetError, match=r"gets 0 of \d+ passages right.*kl or top1"):
        tune("exact_match=0.9", output=str(tune.folder / "text.json"))
    tune("kl=0.01", per_layer=False, output=str(tune.folder / "text.json"))  # and nothing is left


def written(model: Any, layers: Any, prompt: list[int], arm: Arm) -> list[int]:
    """The prompt and what an arm answers alone, greedily, a token a pass."""
    tokens = list(prompt)
    for _ in range(3):
        reading = Reading([Passage([*tokens, 0], len(prompt))], 1)
        with decoded(layers, reading, lambda layer, s: arm.route(layer, s.ids, s.weights, None)):
            tokens.append(int(reading.run(model)[0][-1].argmax()))
    return tokens


@pytest.fixture(scope="module")
def answered(tune: Any, model_dir: Path) -> Any:
    """A judge of twenty answers, ten of them stock's own and ten a policy's; stock and policy."""
    model = load_model(str(model_dir))
    layers, table = moe_layers(model), Table.load(tune.folder / "t")
    arms = Arm("stock", None, table), Arm("arm", Policy(S=1, rho_quantile=0.5, min_active=1), table)
    prompts = [[5 + i, 40 + i, 60 + i] for i in range(10)]
    answers = [written(model, layers, prompt, arm) for arm in arms for prompt in prompts]
    passages = [Passage(tokens, 3) for tokens in answers]
    journal = Journal(tune.folder / "answered", {})
    return Judge(model, layers, passages, journal, False, "check"), arms


@pytest.mark.xfail(reason="a row alone has no expert but its own: answers must be written together")
def test_an_answer_that_is_newly_right_does_not_make_up_for_a_lost_one(answered: Any) -> None:
    judge, arms = answered
    sums = {name: found[1] for name, found in judge.measure(arms, [1]).items()}
    own, others = judge.passages[:10], judge.passages[10:]
    differ = sum(mine != theirs for mine, theirs in zip(own, others, strict=True))
    assert 0 < differ < 10
    assert [sum(s.exact for s in sums[name]) for name in ("stock", "arm")] == 2 * [20 - differ]
    assert sum(s.lost_answers for s in sums["arm"]) == differ
    assert not any(s.lost_answers for s in sums["stock"])
    loss, _ = Budget("exact_match", 1).loss(sums["arm"], sums["stock"])
    assert loss == differ / (20 - differ)


def test_batch_sizes_share_one_policy_that_keeps_the_budget(tune: Any) -> None:
    result = tune("kl=0.003", per_layer=False, batches=[4, 1])
    chosen = Policy.from_dict(result["policy"])
    rule = "paper" if chosen.tau is None else "error"
    assert [found["batch"] for found in result["by_batch"]] == [1, 4]
    assert all(held["kept"] for held in result["held_out"])
    for found in result["by_batch"]:
        own, alone = chosen.at(found["batch"]), found[rule]
        assert own is None or alone
        if own and own.tau is not None:
            assert own.tau <= alone["policy"]["tau"]


def test_a_threshold_lets_the_papers_rule_in_where_s_alone_loses_too_much(
    tune: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sere.tuning.one_size.TAUS", ())  # without a rival
    result = tune("kl=0.003", per_layer=False, batches=[4])
    (found,) = result["by_batch"]
    by_rule = [p for p in found["points"] if p["policy"]["tau"] is None]
    alone = [p for p in by_rule if p["policy"]["rho_quantile"] is None]
    assert [p["policy"]["S"] for p in alone] == [1] and alone[0]["upper"] > 0.003
    best = found["paper"]
    assert best["policy"]["rho_quantile"] and best["upper"] <= 0.003 < alone[0]["upper"]
    others = [p for p in by_rule if p["upper"] <= 0.003]
    assert best["seconds"] == min(p["seconds"] for p in others) < found["stock"]["seconds"]
    assert Policy.from_dict(result["searched"]).at(4) == Policy.from_dict(best["policy"])


def test_the_front_is_what_nothing_beats(tune: Any, capsys: pytest.CaptureFixture[str]) -> None:
    result = tune("kl=0.003", per_layer=False)
    printed = capsys.readouterr().out
    for found in result["by_batch"]:
        kept = front(found)
        for point in [found["stock"], *found["points"]]:
            no_worse = [
                p for p in kept if p["active"] <= point["active"] and p["loss"] <= point["loss"]
            ]
            assert no_worse and (point not in kept or no_worse == [point])
        for point in kept:
            brief = Policy.from_dict(point["policy"]).brief() if point["policy"] else "stock"
            speed = f"{found['stock']['seconds'] / point['seconds']:.2f}x"
            row = f"{found['batch']} {point['active']:.1f} {point['loss']:.2g} (<"
            shown = [line for line in map(str.split, printed.splitlines()) if line[:1]]
            rows = [" ".join(line) for line in shown]
            assert any(r.startswith(row) and f"{speed} {brief}" in r for r in rows), row


def stopping_at(monkeypatch: pytest.MonkeyPatch, number: int | None) -> list[str]:
    """Lets no measurement begin after so many; the list grows by what is measured."""
    done: list[str] = []
    measured = Judge._pass

    def stopping(judge: Judge, model: Any, piece: Any) -> Any:
        if len(done) == number:
            raise KeyboardInterrupt
        start, size, batch, arm = piece
        chunk = judge.passages[start : start + size]
        done.append(f"{len(chunk)} {chunk[0].tokens} {batch} {arm.name}")
        return measured(judge, model, piece)

    monkeypatch.setattr(Judge, "_pass", stopping)
    return done


def test_a_killed_search_goes_on_where_it_was(tune: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    output = str(tune.folder / "killed.json")
    with monkeypatch.context() as patch:
        wanted_work = stopping_at(patch, None)
        wanted = tune("kl=0.003", output=output)
    work: list[str] = []
    for more in (7, len(wanted_work) - 9):  # in the search, and in the check
        with monkeypatch.context() as patch:
            done = stopping_at(patch, more)
            with pytest.raises(KeyboardInterrupt):
                tune("kl=0.003", output=output)
        work += done
    # What a table carries for serving is not what the search reads.
    table = Table.load(tune.folder / "t")
    replace(table, policy=STOCK).save(tune.folder / "t")
    with monkeypatch.context() as patch:
        done = stopping_at(patch, None)
        result = tune("kl=0.003", output=output)
    assert work + done == wanted_work  # nothing twice, nothing left out
    assert {k: v for k, v in result.items() if k != "provenance"} == {
        k: v for k, v in wanted.items() if k != "provenance"
    }
    assert not list(tune.folder.glob("killed*unfinished"))


def test_pieces_of_two_tables_are_never_mixed(
    tune: Any, model_dir: Path, corpus_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, output = tune.folder / "t", str(tune.folder / "mixed.json")
    text = {"data": str(corpus_file), "samples": 8, "prompt": 2, "length": 10}
    policy = json.dumps({"S": 1, "table": str(path)})

    def evaluated() -> Any:
        other, batches = str(tune.folder / "other"), [4]
        return evaluate.run(
            str(model_dir), other, f"{output}.e", policies=[policy], batches=batches, **text
        )

    before = path.read_bytes()
    (tune.folder / "other").write_bytes(before)
    for work in (lambda: tune("kl=0.003", output=output), evaluated):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            stopping_at(patch, 1)
            work()
    calibrate(
        *(str(model_dir), path),
        data=corpus_file,
        samples=20,
        length=64,
        overwrite=True,
        progress=False,
    )
    for work in (lambda: tune("kl=0.003", output=output), evaluated):
        with pytest.raises(JournalError, match=r"other settings \(tables\)"):
            work()
    path.write_bytes(before)
    assert tune("kl=0.003", output=output)["by_batch"] and evaluated()["arms"]


@pytest.mark.parametrize("budget", ["kl=0.005", "top1=0.007", "exact_match=0.06"])
def test_every_kind_of_budget_on_a_model_that_answers(
    table_path: Path, tmp_path: Path, budget: str
) -> None:
    """The bundled model gets nearly all of its tasks right: a choice that loses few is found."""
    (tmp_path / "t").write_bytes(table_path.read_bytes())
    flags = ["--budget", budget, "--samples", "161", "--no-per-layer"]
    flags += ["--batch", "1", "--batch", "8"]
    flags += ["--expert-mb", "9.4", "-o", str(tmp_path / "o.json")]
    assert main(["tune", "demo", str(tmp_path / "t"), *flags]) == 0
    result = json.loads((tmp_path / "o.json").read_text())
    (_, found), (_, held) = result["by_batch"], result["held_out"]
    name, limit = result["settings"]["budget"].values()
    assert result["policy"] and held["kept"] and held["enable"]
    assert held["chosen"]["loss"] <= held["chosen"]["upper"] <= limit
    # Of few rows one may keep an expert that nobody else needs, so that it names K of them.
    assert held["chosen"]["active"] < 0.85 * held["stock"]["active"]
    worst = max(found["points"], key=lambda p: p["loss"])
    assert worst["upper"] > limit  # the budget kept something out
    if name == "exact_match":
        half = result["passages"]["check"]
        assert 2.99 / half < held["stock"]["upper"] < 3 / (0.9 * half)  # nearly all are right


def test_what_batch_sizes_have_in_common_is_said_once() -> None:
    base = Policy(S=1, tau=0.01)
    own = {2: None, 8: base, 16: base, 32: Policy(S=1, tau=0.1, layers={3: {"tau": 0.2}})}
    policy = composed(base, own)
    assert policy.batches == {1: None, 8: {}, 32: {"tau": 0.1, "layers": {3: {"tau": 0.2}}}}
    for batch, wanted in own.items():
        assert policy.for_bucket(policy.bucket(batch)) == wanted
    assert policy.for_bucket(policy.bucket(1)) is None  # nobody looked: as the smallest that was
    del own[2]  # of smaller steps nothing is known at all
    assert composed(base, own).batches == policy.batches
    own[1] = base
    assert composed(base, own).batches == {32: {"tau": 0.1, "layers": {3: {"tau": 0.2}}}}


def test_layers_of_a_group_share_their_tau(tune: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured for a tau by layer follows the number of groups, not of layers."""
    alone = []
    for groups in (1, 12):
        with monkeypatch.context() as patch:
            patch.setattr("sere.tuning.by_layer.GROUPS", groups)
            done = stopping_at(patch, None)
            result = tune("kl=0.003", batches=[4], output=str(tune.folder / "groups.json"))
        alone.append(sum('"S": 2' in work for work in done))  # the other layers are as in stock
        by_layer = [p["policy"]["layers"] for p in result["by_batch"][0]["points"]]
        assert any(by_layer) == (groups > 1)
    assert alone == [0, 10]  # of two layers at five taus; a single group is all layers


def test_the_exchange_gives_freedom_where_it_costs_least() -> None:
    """Layer 0 loses ten times as much as layer 1 for the same saving."""
    taus = [0.1, 0.2]

    def point(active: float, loss: float) -> Point:
        return Point(None, 1, 1.0, active, active, loss, loss, 0.0)

    curves = [point(9, 0.1), point(8, 1.0), point(9, 0.01), point(8, 0.1)]
    assert _exchange(taus, curves, 10.0, 0.2) == [0.1, 0.2]
    assert _exchange(taus, curves, 10.0, 2.0) == [0.2, 0.2]


def test_many_layers_are_searched_in_a_few_groups() -> None:
    layers = [i for i in range(50) if i not in (0, 7)]
    groups = neighbours(layers, 12)
    assert [len(group) for group in groups] == 12 * [4]
    assert [i for group in groups for i in group] == layers
    assert neighbours([3, 5, 6], 12) == [[3], [5], [6]]


def test_costs_from_a_data_sheet_and_from_measurements(model_dir: Path) -> None:
    layer = moe_layers(load_model(str(model_dir)))[0]
    parameters = 3 * 32 * 16
    cost = roofline(layer, 2, bandwidth=1e9, flops=1e12)
    assert cost.b == pytest.approx(2 * parameters / 1e9)
    assert cost.a == pytest.approx(2 * 2 * parameters / 1e12)
    truth = Cost(b=3e-6, a=2e-7, rest=1e-3)
    kinds = ((4, 1), (8, 8), (12, 8), (20, 32))
    steps = [Step(a, r, truth.seconds(a, r, 4, routed=False)) for a, r in kinds]
    found = fitted(steps, 4)
    assert (found.b, found.a, found.rest) == pytest.approx((truth.b, truth.a, truth.rest))
    flat = fitted([replace(step, seconds=1e-3) for step in steps], 4)
    assert min(flat.b, flat.a, flat.rest) >= 0
    with pytest.raises(ValueError, match="3 constants needs 4"):
        fitted(steps[:3], 4)
    routed = [Step(a / 2, r, truth.seconds(a / 2, r, 4), routed=True) for a, r in kinds]
    assert fitted([*steps, *routed], 4).route == pytest.approx(truth.route)


def test_small_batches_read_an_expert_for_every_slot() -> None:
    """The committed measurements of an H100 are met within 5 % at every point: without the term for
    slots that read an expert once more, S=1 at batch 4 is missed by 18 %."""
    found = json.loads((RESULTS / "bench_h100_qwen3.json").read_text())
    steps = [
        Step(arm["active_after"], each["batch"], arm["tpot_ms"] / 1e3, bool(arm["policy"]))
        for each in found["results"]
        for arm in each["arms"]
    ]
    layers, E, K = found["layers"], found["E"], found["K"]

    def worst(cost: Cost) -> float:
        return max(
            abs(cost.seconds(s.active, s.rows, layers, routed=s.routed) / s.seconds - 1)
            for s in steps
        )

    assert len(steps) == 32
    assert worst(fitted(steps, layers, E, K)) < 0.05 < 0.15 < worst(fitted(steps, layers))


def benched(model_dir: Path, cost: Cost, **changed: Any) -> dict[str, Any]:
    """As `sere bench` writes it, of an engine that takes exactly `cost`."""
    layers = moe_layers(load_model(str(model_dir)))
    E, arms = layers[0].E, [("stock", None, 1.0), ("S=1", {"S": 1}, 0.6), ("S=2", {"S": 2}, 0.8)]

    def arm(name: str, policy: Any, share: float, batch: int) -> dict[str, Any]:
        active = share * min(E, 2 * batch)
        ms = 1e3 * cost.seconds(active, batch, len(layers), routed=policy is not None)
        return {
            "name": name,
            "policy": policy,
            "active_after": active,
            "tpot_ms": ms,
        }

    results = [{"batch": b, "arms": [arm(*a, b) for a in arms]} for b in (1, 2, 4)]
    sizes = {"expert": 3.0 * 32 * 16, "layers": len(layers)}
    known = {"model": "tiny", "dtype": "float32", "E": E, "K": 2}
    return {**known, "roofline": {"sizes": sizes}, "results": results, **changed}


def test_time_is_what_a_bench_measured(
    tune: Any, model_dir: Path, corpus_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An engine in which routing costs more than it saves, beside one in which it does not."""
    table, output, bench = (str(tune.folder / name) for name in ("t", "b.json", "bench.json"))
    flags = ["--data", str(corpus_file), "--samples", "56", "--prompt", "2", "--length", "10"]
    flags += ["--batch", "4", "--budget", "kl=1", "-o", output, "--bench", bench]
    found = {}
    for route in (0.0, 1.0):
        truth = Cost(b=0.1, a=0.01, route=route, rest=0.5)
        provenance.save_json(bench, benched(model_dir, truth))
        assert main(["tune", str(model_dir), table, *flags]) == 0
        found[route] = result = json.loads(Path(output).read_text())
        cost = Cost(**result["cost"])
        assert (cost.b, cost.a, cost.route, cost.rest) == pytest.approx(
            (truth.b, truth.a, truth.route, truth.rest), abs=1e-6
        )
        assert "9 measured steps" in cost.source and bench in cost.source
    assert "the whole step, fitted to 9 measured steps" in capsys.readouterr().out
    assert found[0.0]["policy"] and not found[1.0]["policy"]
    assert main(["tune", str(model_dir), table, *flags, "--bandwidth", "100"]) == 1
    assert "--bench leaves nothing for" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"E": 16}, "another model, tiny: .* 16 experts.*this one has .* 8 experts"),
        ({"roofline": {"sizes": {"expert": 1536.0, "layers": 1}}}, "1 layers of 8 experts"),
        ({"roofline": {"sizes": {"expert": 99.0, "layers": 2}}}, "99 parameters each"),
        ({"results": None}, "expected what `sere bench"),
    ],
)
def test_a_bench_of_something_else_is_refused(
    model_dir: Path, tmp_path: Path, changed: dict[str, Any], reason: str
) -> None:
    layers = moe_layers(load_model(str(model_dir)))
    path = tmp_path / "bench.json"
    provenance.save_json(path, benched(model_dir, READING, **changed))
    with pytest.raises(ValueError, match=reason):
        from_bench(path, layers, 2)


def test_a_file_that_is_no_bench_is_refused_in_a_line(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    with pytest.raises(ValueError, match="no such file"):
        from_bench(path, [], 2)
    path.write_bytes(b"\xc0\x0b" * 50_000)
    with pytest.raises(ValueError, match="is no result of a bench") as refused:
        from_bench(path, [], 2)
    assert len(str(refused.value)) < 300


def test_one_batch_size_does_not_tell_rows_from_the_rest(model_dir: Path, tmp_path: Path) -> None:
    found = benched(model_dir, READING)
    found["results"] = [dict(found["results"][0], arms=2 * found["results"][0]["arms"])]
    provenance.save_json(tmp_path / "bench.json", found)
    with pytest.raises(ValueError, match="measure at least two"):
        from_bench(tmp_path / "bench.json", moe_layers(load_model(str(model_dir))), 2)


def test_a_batch_size_where_the_choice_is_no_faster_is_left_stock(tune: Any) -> None:
    """Caution on the unseen half may leave too little to pay for the operator."""
    base, bold, shy = (Policy(S=1, tau=tau, min_active=1) for tau in (TAUS[0], TAUS[5], TAUS[4]))
    seconds = {shy.tau: 1.01, bold.tau: 0.7, None: 1.0}

    class Canned(Tuner):
        def points(self, policies: Any, batch: int) -> list[Point]:
            here = [p and p.for_bucket(p.bucket(batch)) for p in policies]
            taus = [policy.tau if policy else None for policy in here]
            loss = {bold.tau: 2.0 if batch == 1 else 0.0}  # more than the budget, at batch 1
            return [
                Point(p, batch, batch, 1.0, 1.0, 0.0, loss.get(tau, 0.0), seconds[tau])
                for p, tau in zip(policies, taus, strict=True)
            ]

    tuner = Canned(Table.load(tune.folder / "t"), IN_TURN, Budget("kl", 1.0), READING)
    policy, _ = together(tuner, base, {1: bold, 8: bold})
    assert policy and policy.batches == {1: None, 8: {"tau": bold.tau}}
    assert together(tuner, base, {1: bold}) == (None, [])


def test_small_steps_pay_for_what_their_bold_settings_lose(tune: Any) -> None:
    """In a batch of eight, too, once most of its answers have ended."""
    base, shy, bold = (Policy(S=1, tau=tau, min_active=1) for tau in (TAUS[0], TAUS[4], TAUS[6]))

    class Canned(Tuner):
        def points(self, policies: Any, batch: int) -> list[Point]:
            small = [p and p.for_bucket(p.bucket(1)) for p in policies]
            lost = [2.0 * (batch == 8 and own is not None and own.tau == bold.tau) for own in small]
            return [
                Point(p, batch, batch, 1.0, 1.0, 0.0, upper, 0.5 if p else 1.0)
                for p, upper in zip(policies, lost, strict=True)
            ]

    tuner = Canned(Table.load(tune.folder / "t"), IN_TURN, Budget("kl", 1.0), READING)
    policy, _ = together(tuner, base, {1: bold, 8: shy})
    assert policy and policy.batches == {1: {"tau": TAUS[5]}, 8: {"tau": TAUS[4]}}


def test_what_is_left_off_is_stored_as_stock(tune: Any) -> None:
    chosen_somewhere = 0
    for route in (0.05, 0.2, 0.4, 0.8):
        result = tune("kl=0.003", per_layer=False, cost=Cost(b=1.0, a=0.0, route=route))
        if result["policy"]:
            chosen_somewhere += 1
            policy = Policy.from_dict(result["policy"])
            for held in result["held_out"]:
                re_routes = policy.for_bucket(policy.bucket(held["batch"])) is not None
                assert re_routes == held["enable"]
    assert chosen_somewhere


def test_work_that_ends_before_its_first_piece_leaves_no_journal(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    with pytest.raises(ValueError, match="wrong"), Journal(path, {"a": 1}):
        raise ValueError("wrong")
    with Journal(path, {"a": 2}):
        pass


def test_a_journal_survives_a_torn_line_and_knows_its_work(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    with pytest.raises(KeyboardInterrupt), Journal(path, {"a": 1}) as journal:
        journal.add("one", [1.5])
        raise KeyboardInterrupt
    with path.open("a") as file:
        file.write('["two", [2')
    with pytest.raises(JournalError, match="other settings"):
        Journal(path, {"a": 2})
    with pytest.raises(KeyboardInterrupt), Journal(path, {"a": 1}) as journal:
        assert journal.get("one") == [1.5] and journal.get("two") is None
        journal.add("two", 2)
        raise KeyboardInterrupt
    with Journal(path, {"a": 1}) as journal:  # what came after the torn line can be read
        assert journal.get("one") == [1.5] and journal.get("two") == 2
    assert not path.exists()
