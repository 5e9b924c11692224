"""`sere tune` on a tiny model: the budget, the choice, and what becomes of it in the table."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sere import report
from sere.arms import Arm
from sere.calibrate import calibrate
from sere.cli import main
from sere.cost import Cost, Step, fitted, from_bench, roofline
from sere.decoding import Passage, Reading, decoded
from sere.journal import Journal, JournalError
from sere.loading import load_model
from sere.moe import moe_layers
from sere.policy import STOCK, Policy
from sere.quality import Judge, Sums
from sere.search import TAUS, Budget, BudgetError, Point, Tuner, _exchange, composed
from sere.serving.settings import Settings
from sere.table import Table
from sere.tune import run

READING = Cost(b=1.0, a=0.0)  # time is what is read


@pytest.fixture(scope="module")
def tune(model_dir: Path, corpus_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tune")
    calibrate(str(model_dir), folder / "t", data=corpus_file, samples=20, length=64, progress=False)

    def tuned(budget: str, **more: Any) -> dict[str, Any]:
        options = {"data": str(corpus_file), "samples": 20, "prompt": 2, "length": 10}
        settings = {"batches": [1, 4], "output": str(folder / "o.json"), "cost": READING, **options}
        return run(str(model_dir), str(folder / "t"), budget=budget, **{**settings, **more})

    tuned.folder = folder  # type: ignore[attr-defined]
    return tuned


def test_a_tighter_budget_loads_more_experts_and_loses_less(tune: Any) -> None:
    found = {}
    for budget in ("kl=1.0", "kl=0.002"):
        result = tune(budget, per_layer=False)
        found[budget] = result["held_out"][1]["chosen"]
        for own in result["by_batch"]:
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
    monkeypatch.setattr("sere.tune._confirmed", lambda *_: None)
    tune("kl=0.05")
    said = capsys.readouterr().out
    assert "do not enable" in said and "do not confirm" in said and "raise --samples" in said
    assert Table.load(tune.folder / "t").policy == STOCK


def test_the_command_line(tune: Any, model_dir: Path, corpus_file: Path) -> None:
    table, output = str(tune.folder / "t"), str(tune.folder / "cli.json")
    flags = ["--data", str(corpus_file), "--samples", "20", "--prompt", "2", "--length", "6"]
    flags += ["--batch", "4", "--expert-mb", "10", "--budget", "top1=0.5", "-o", output]
    assert main(["tune", str(model_dir), table, *flags]) == 0
    result = json.loads(Path(output).read_text())
    assert "10 MB an expert" in result["cost"]["source"]
    assert result["settings"]["budget"] == {"name": "top1", "limit": 0.5}


@pytest.mark.parametrize(
    "text", ["kl", "kl=0", "kl=-1", "ppl=1", "kl=x", "top1=5", "exact_match=1.5"]
)
def test_budgets_that_cannot_be_read(text: str) -> None:
    with pytest.raises(BudgetError, match="expected NAME=LOSS"):
        Budget.parse(text)


def test_too_few_passages_to_be_sure(tune: Any) -> None:
    with pytest.raises(BudgetError, match="raise --samples"):
        tune("kl=0.1", batches=[32])


def test_a_loss_counts_with_its_error() -> None:
    def sums(*parts: tuple[int, float]) -> list[Sums]:
        return [Sums(tokens=10, passages=10, exact=exact, top1=top1) for exact, top1 in parts]

    stock, arm = sums((9, 10), (9, 10)), sums((9, 10), (7, 8))
    assert Budget("exact_match", 1).loss(arm, stock) == pytest.approx((0.1, 0.1 + 1.645 * 0.1))
    assert Budget("top1", 1).loss(arm, stock) == pytest.approx((0.1, 0.1 + 1.645 * 0.1))
    # Nothing lost of 20 answers: up to 3 / 20 may be, with 95 %.
    assert Budget("exact_match", 1).loss(stock, stock) == (0, pytest.approx(3 / 20))
    with pytest.raises(BudgetError, match="at least 300 are needed"):
        Budget("exact_match", 0.01).check_passages(128)
    Budget("exact_match", 0.01).check_passages(300)
    Budget("kl", 0.01).check_passages(1)


def written(model: Any, layers: Any, prompt: list[int], arm: Arm) -> list[int]:
    """The prompt and what an arm answers alone, greedily, a token a pass."""
    tokens = list(prompt)
    for _ in range(3):
        reading = Reading([Passage([*tokens, 0], len(prompt))], 1)
        with decoded(layers, reading, lambda layer, s: arm.route(layer, s.ids, s.weights, None)):
            tokens.append(int(reading.logits(model)[0, len(tokens) - 1].argmax()))
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


def test_an_answer_that_is_newly_right_does_not_make_up_for_a_lost_one(answered: Any) -> None:
    judge, arms = answered
    sums = {name: found[1] for name, found in judge.measure(arms, [1]).items()}
    own, others = judge.passages[:10], judge.passages[10:]
    differ = sum(mine != theirs for mine, theirs in zip(own, others, strict=True))
    assert 0 < differ < 10
    assert [sum(s.exact for s in sums[name]) for name in ("stock", "arm")] == 2 * [20 - differ]
    assert sum(s.lost_answers for s in sums["arm"]) == differ
    assert not any(s.lost_answers for s in sums["stock"])


def test_batch_sizes_share_one_policy_that_keeps_the_budget(tune: Any) -> None:
    result = tune("kl=0.003", per_layer=False, batches=[4, 1])
    chosen = Policy.from_dict(result["policy"])
    assert [found["batch"] for found in result["by_batch"]] == [1, 4]
    for found in result["by_batch"]:
        own = chosen.for_bucket(chosen.bucket(found["batch"]))
        if found["error"]:
            assert own is not None and own.tau <= found["error"]["policy"]["tau"]
        else:
            assert own is None


def test_what_batch_sizes_have_in_common_is_said_once() -> None:
    base = Policy(S=1, tau=0.01)
    own = {2: None, 8: base, 16: base, 32: Policy(S=1, tau=0.1, layers={3: {"tau": 0.2}})}
    policy = composed(base, own)
    assert policy.batches == {1: None, 8: {}, 32: {"tau": 0.1, "layers": {3: {"tau": 0.2}}}}
    for batch, wanted in own.items():
        assert policy.for_bucket(policy.bucket(batch)) == wanted
    assert policy.for_bucket(policy.bucket(1)) is None  # nobody looked: as the smallest that was
    del own[2]
    assert composed(base, own).batches == {32: {"tau": 0.1, "layers": {3: {"tau": 0.2}}}}


def test_the_exchange_gives_freedom_where_it_costs_least() -> None:
    """Layer 0 loses ten times as much as layer 1 for the same saving."""
    taus = [0.1, 0.2]

    def point(active: float, loss: float) -> Point:
        return Point(None, 1, active, loss, loss, 0.0)

    curves = [point(9, 0.1), point(8, 1.0), point(9, 0.01), point(8, 0.1)]
    assert _exchange([0, 1], taus, curves, 10.0, 0.2) == {0: 0.1, 1: 0.2}
    assert _exchange([0, 1], taus, curves, 10.0, 2.0) == {0: 0.2, 1: 0.2}


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
            "merge": False,
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
    flags = ["--data", str(corpus_file), "--samples", "20", "--prompt", "2", "--length", "10"]
    flags += ["--batch", "4", "--budget", "kl=1", "-o", output, "--bench", bench]
    found = {}
    for route in (0.0, 1.0):
        truth = Cost(b=0.1, a=0.01, route=route, rest=0.5)
        report.save_json(bench, benched(model_dir, truth))
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
    report.save_json(path, benched(model_dir, READING, **changed))
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
    report.save_json(tmp_path / "bench.json", found)
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
                Point(p, batch, 1.0, 0.0, loss.get(tau, 0.0), seconds[tau])
                for p, tau in zip(policies, taus, strict=True)
            ]

    table = Table.load(tune.folder / "t")
    tuner = Canned(table, None, Budget("kl", 1.0), READING)  # type: ignore[arg-type]
    policy, _ = tuner.together(base, {1: bold, 8: bold})
    assert policy and policy.batches == {1: None, 8: {"tau": bold.tau}}
    assert tuner.together(base, {1: bold}) == (None, [])


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
