"""`sere evaluate` on a tiny model: what it reports, beside figures computed another way."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sere import demo_model
from sere.calibration.calibrate import calibrate
from sere.cli import main
from sere.demo_model.tasks import examples
from sere.engine_runs import generation
from sere.evaluation.arms import parse_arm, served_policies, spelt_out
from sere.evaluation.decoding import Passage
from sere.evaluation.evaluate import _inert, _quality_table, as_text, run
from sere.evaluation.passages import load_passages
from sere.evaluation.passes import _add_passage
from sere.evaluation.quality import EvaluationError, Judge, Sums, figures, mean
from sere.models.adapters import Mixture
from sere.models.loading import load_model, load_tokenizer
from sere.policy import Policy, PolicyError
from sere.table import Table, TableError

POLICIES = ['{"S": 2, "name": "off"}', '{"S": 1, "min_active": 1}', '{"S": 1, "tau": 0.05}']
POLICIES += ['{"rival": "top_k", "k": 1}', '{"rival": "top_k", "k": 1, "weights": "keep"}']


@pytest.fixture(scope="module")
def tiny(model_dir: Path, corpus_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("evaluate")
    calibrate(str(model_dir), folder / "t", data=corpus_file, samples=20, length=64, progress=False)
    options = {"data": str(corpus_file), "samples": 12, "prompt": 4, "length": 12}

    def evaluate(output: str = "e.json", **more: Any) -> dict[str, Any]:
        settings = {"policies": POLICIES, "batches": [1, 4], **options, **more}
        return run(str(model_dir), str(folder / "t"), str(folder / output), **settings)

    evaluate.folder = folder  # type: ignore[attr-defined]
    return evaluate


@pytest.fixture(scope="module")
def result(tiny: Any) -> dict[str, Any]:
    found: dict[str, Any] = tiny()
    return found


def test_a_result_of_other_settings_is_not_replaced(tiny: Any, result: dict[str, Any]) -> None:
    kept = (tiny.folder / "e.json").read_bytes()
    with pytest.raises(FileExistsError, match="which differs in policies and tables: choose"):
        tiny(policies=POLICIES[1:])
    with pytest.raises(FileExistsError, match="differs in batches"):
        tiny(batches=[4])
    (tiny.folder / "e.json").write_text(json.dumps({"provenance": {}, "settings": {"load": 1}}))
    with pytest.raises(FileExistsError, match="a result of another verb or version: choose"):
        tiny()
    (tiny.folder / "e.json").write_bytes(kept)
    assert not list(tiny.folder.glob("*.unfinished"))


def test_no_lost_answer_is_no_certainty() -> None:
    """The rule of three, exactly: of 60 answers that all came back, 4.9 % may be lost."""
    nothing = dict.fromkeys(("active", "kl", "top1", "perplexity", "answers_lost_gross"), (0, 0))
    own = {**nothing, "exact_match": (0.6, 0.0), "exact_match_over_stock": (0, 0)}
    own["perplexity_over_stock"] = (0, 0)
    told = _quality_table("8", {"stock": own}, 100)
    assert "where none of 60 answers is lost, up to 4.9% may be (95 %)" in told
    text = _quality_table("8", {"stock": {**own, "exact_match": (0.0, 0.0)}}, 100)
    assert "answers" not in text


def test_text_that_the_model_cannot_read_is_told(
    tiny: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model of random weights cannot read any."""
    found = tiny(output=str(tiny.folder / "unread.json"))
    said = capsys.readouterr().err
    assert "THE MODEL CANNOT READ THIS TEXT" in said
    assert all(line in said for line in found["warnings"] if not line.startswith("batch"))
    assert "batches +- is hardly known" in found["warnings"][-1]


def test_a_policy_under_which_nothing_can_move_is_told(tiny: Any) -> None:
    table = Table.load(tiny.folder / "t")
    texts = [*POLICIES, '{"rho": 1.5, "S": 1}']
    told = _inert([parse_arm(text, table) for text in texts])
    assert [line.split(":")[0] for line in told] == ["off", "S=1 rho=1.5"]


def arm(result: dict[str, Any], name: str, batch: int) -> dict[str, Any]:
    found: dict[str, Any] = next(
        a["batches"][str(batch)] for a in result["arms"] if a["name"] == name
    )
    return found


def test_stock_has_the_models_own_perplexity(
    result: dict[str, Any], model_dir: Path, corpus_file: Path
) -> None:
    passages = load_passages(
        "x", str(model_dir), str(corpus_file), samples=12, prompt=4, length=12, seed=0
    )
    model = load_model(str(model_dir))
    losses = []
    for passage in passages:
        with torch.no_grad():
            logits = model(torch.tensor([passage.tokens])).logits[0]
        for at in range(passage.start, len(passage.tokens) - 1):
            losses.append(-logits[at].log_softmax(-1)[passage.tokens[at + 1]].item())
    stock = arm(result, "stock", 4)
    assert stock["perplexity"][0] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert (stock["kl"][0], stock["top1"][0]) == (0, 1)


def test_what_was_measured_can_be_read_back_from_its_rule(result: dict[str, Any]) -> None:
    rules = {arm["name"]: arm["rule"] for arm in result["arms"]}
    assert rules["stock"] is None
    assert Policy.from_dict(rules["S=1 tau=0.05"]) == Policy(S=1, tau=0.05)
    kept = {"rival": "top_k", "k": 1, "weights": "keep"}
    assert rules["top_k k=1 weights=keep"] == kept
    assert rules["top_k k=1"] == {"rival": "top_k", "k": 1}


def test_a_masked_vocabulary_loses_nothing(
    tiny: Any, result: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Models pad theirs, and put the logits of what is no token to -inf."""
    from sere.evaluation import evaluate

    plain = evaluate.load

    def masked(folder: str, stream: bool | None) -> Any:
        model, layers = plain(folder, stream)
        mask = torch.zeros(model.config.vocab_size)
        mask[-3:] = -math.inf
        model.lm_head.register_forward_hook(lambda _module, _given, logits: logits + mask)
        return model, layers

    monkeypatch.setattr(evaluate, "load", masked)
    found = tiny("masked.json")
    assert arm(found, "off", 4)["kl"][0] == 0
    lost, whole = (arm(r, "S=1 min_active=1", 4)["kl"][0] for r in (found, result))
    assert lost == pytest.approx(whole, rel=0.5)  # of 3 in 98 tokens


def test_kl_is_that_of_what_stock_may_say() -> None:
    random = torch.Generator().manual_seed(0)
    logits, stock = torch.randn(2, 4, 9, generator=random)
    logits[:, 6:] = stock[:, 6:] = -math.inf
    stock[:, 5] = -math.inf  # what only the arm says
    passage, sums = Passage([1, 2, 3, 4, 0], 1), Sums()
    _add_passage(sums, passage, logits, stock)
    p, q = stock[1:, :5].softmax(-1), logits[1:, :6].softmax(-1)[:, :5]
    assert sums.kl == pytest.approx((p * (p / q).log()).sum().item(), rel=1e-5)
    logits[1, 2] = -math.inf  # what the arm never says
    _add_passage(sums, passage, logits, stock)
    assert sums.kl == math.inf
    assert mean([(sums.kl, 3), (0.1, 3)]) == (math.inf, math.inf)


def test_a_policy_by_batch_size_follows_the_rows_of_each_step(tiny: Any) -> None:
    """Stock from four rows on: at batch 4 only the steps of fewer rows are re-routed."""
    by_rows = {"S": 1, "min_active": 1, "name": "by rows"}
    policies = [
        *POLICIES,
        json.dumps({**by_rows, "batches": {"4": None}}),
        json.dumps({**by_rows, "batches": {"2": {}}, "name": "same"}),
    ]
    result = tiny("rows.json", policies=policies)
    one = "S=1 min_active=1"
    for figure in ("active", "kl"):
        rows = [arm(result, name, 4)[figure][0] for name in ("stock", "by rows", one)]
        assert rows[0] != rows[1] != rows[2]
        assert arm(result, "by rows", 1)[figure] == arm(result, one, 1)[figure]
        for batch in (1, 4):
            assert arm(result, "same", batch)[figure] == arm(result, one, batch)[figure]


def test_answers_lost_are_those_that_stock_had_right(table_path: Path, tmp_path: Path) -> None:
    bold = '{"S": 1, "min_active": 1}'
    found = run(
        "demo", str(table_path), str(tmp_path / "e"), policies=[bold], batches=[8], samples=200
    )
    stock, lossy = (each["batches"]["8"] for each in found["arms"])
    assert stock["answers_lost_gross"] == (0, 0)
    lost = stock["exact_match"][0] - lossy["exact_match"][0]
    assert 0 < lost <= lossy["answers_lost_gross"][0] + 1e-12
    assert 0 < lossy["answers_lost_gross"][1] < lossy["answers_lost_gross"][0]
    assert lossy["exact_match_over_stock"][0] == pytest.approx(-lost)
    worse = lossy["perplexity"][0] - stock["perplexity"][0]
    assert lossy["perplexity_over_stock"][0] == pytest.approx(worse)
    assert lossy["nll_over_stock"][0] == pytest.approx(
        math.log(lossy["perplexity"][0] / stock["perplexity"][0])
    )
    assert "exact match, % *" in as_text(found)


def test_where_stock_has_no_answer_right_none_is_printed(
    tiny: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """On plain text: 0 of 0 would look like a loss of all."""
    tiny("plain.json")
    assert arm(tiny("plain.json"), "stock", 4)["exact_match"][0] == 0
    printed = capsys.readouterr().out
    assert "perplexity *" in printed and "exact match" not in printed and "lost" not in printed


def test_what_is_hard_for_both_is_no_error_of_their_difference() -> None:
    """Batches differ a hundred times more than what the arm does to each."""
    hard = [Sums(tokens=10, nll=10 * x, passages=10, exact=e) for x, e in ((1, 9), (3, 2), (2, 5))]
    same = [
        replace(p, nll=p.nll + d, exact=p.exact - 1) for p, d in zip(hard, (1, 2, 3), strict=True)
    ]
    found = figures(same, hard)
    assert found["nll_over_stock"] == pytest.approx((0.2, 0.1 / math.sqrt(3)))
    assert found["exact_match_over_stock"] == pytest.approx((-0.1, 0))
    worse = math.exp(2.2) - math.exp(2.0)
    assert found["perplexity_over_stock"] == pytest.approx((worse, math.exp(2.2) * 0.1 / 3**0.5))
    assert found["perplexity"][1] > 5 * found["perplexity_over_stock"][1]
    assert "nll_over_stock" not in figures(same)


def test_off_is_stock_and_re_routing_is_not(result: dict[str, Any]) -> None:
    for batch in (1, 4):
        off, stock = arm(result, "off", batch), arm(result, "stock", batch)
        for figure in ("kl", "perplexity", "active", "top1"):
            assert off[figure] == stock[figure], figure
    paper, stock = arm(result, "S=1 min_active=1", 4), arm(result, "stock", 4)
    assert paper["kl"][0] > 1e-6
    assert paper["active"][0] < stock["active"][0]
    assert all(0 < error[0] < 2 for error in paper["output_error_by_layer"].values())
    assert all(a["batches"]["4"]["prompt_difference"] == 0 for a in result["arms"])


def test_a_token_alone_keeps_its_experts_by_default(result: dict[str, Any]) -> None:
    assert arm(result, "S=1 tau=0.05", 1)["kl"][0] == 0
    assert arm(result, "top_k k=1", 1)["active"][0] == 1


def test_interrupted_work_resumes_and_ends_with_the_same_figures(
    tiny: Any, result: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, measured = [0], Judge._pass

    def stopping(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == 4:
            raise KeyboardInterrupt
        return measured(*arguments)

    monkeypatch.setattr(Judge, "_pass", stopping)
    with pytest.raises(KeyboardInterrupt):
        tiny("again.json")
    with pytest.raises(ValueError, match="other settings"):
        tiny("again.json", batches=[2])
    again = tiny("again.json")
    assert calls[0] == 1 + 2 * (1 + len(POLICIES))  # nothing was measured twice
    assert again["arms"] == result["arms"]
    assert not (tiny.folder / "again.json.unfinished").exists()


def test_passes_hold_whole_batches_within_a_bound_of_logits(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sere.evaluation import passes as arms
    from sere.evaluation import quality

    passes: list[int] = []
    reading = arms.Reading

    def counted(passages: Any, batch: int) -> Any:
        passes.append(len(passages))
        return reading(passages, batch)

    monkeypatch.setattr(arms, "Reading", counted)
    large = tiny("large.json", batches=[3, 5])
    assert set(passes) == {8}
    passes.clear()
    monkeypatch.setattr(quality, "LOGITS", 1)
    small = tiny("smaller.json", batches=[3, 5])
    assert sorted(set(passes)) == [2, 3, 5]  # a batch each; the last of either is smaller
    for mine, theirs in zip(small["arms"], large["arms"], strict=True):
        for batch, own in mine["batches"].items():
            same = theirs["batches"][batch]
            assert own["batches"] == same["batches"] == {"3": 3, "5": 2}[batch]
            for name in ("active", "kl", "top1", "perplexity", "exact_match", "rows_per_step"):
                assert own[name] == pytest.approx(same[name], rel=1e-4, abs=1e-7), name


def test_prompts_may_not_change_by_a_bit_where_experts_run_apart(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[int] = []

    def drifting(_self: Mixture, inner: Any, _rows: Any) -> Any:
        calls.append(1)
        return lambda *given: inner(*given) * (1 + 1e-5 * len(calls))

    monkeypatch.setattr(Mixture, "apart", drifting)
    with pytest.raises(EvaluationError, match=r"the prompt's .* \(nothing is allowed"):
        tiny("drift.json")
    monkeypatch.setattr(Mixture, "runs_apart", False)
    calls.clear()
    capsys.readouterr()
    result = tiny("drift.json")
    largest = max(a["batches"]["4"]["prompt_difference"] for a in result["arms"])
    assert 0 < largest < 1e-3
    assert f"differ from stock by up to {largest:.1g}, by rounding" in capsys.readouterr().out


@pytest.mark.parametrize(
    "settings",
    [{"layers": {"99": {"S": 2}}}, {"batches": {"4": {"layers": {"99": {"S": 2}}}}}],
    ids=lambda settings: next(iter(settings)),
)
def test_layers_that_the_model_has_not_are_refused(table: Table, settings: dict[str, Any]) -> None:
    text = json.dumps({"S": 1, **settings})
    for reads in (lambda: parse_arm(text, table), lambda: served_policies([text], table)):
        with pytest.raises(
            PolicyError, match=r"layers \[99\] of the policy are not among \[0, 1\]"
        ):
            reads()


def test_rivals_are_not_for_the_engine(table: Table) -> None:
    with pytest.raises(PolicyError, match=r"'oea' .*leave out --engine and --tasks"):
        served_policies(['{"rival": "oea", "k0": 1}'], table)
    assert served_policies(['{"S": 1}'], table) == {"S=1": Policy(S=1)}


def test_policies_for_the_engine_are_told_apart_by_name(table: Table) -> None:
    """Settings per layer are not in the name that a policy has by itself."""
    one, other = ({"S": 1, "layers": {layer: {"S": 2}}} for layer in ("0", "1"))
    named = [json.dumps(one), json.dumps({**other, "name": "other"})]
    assert served_policies(named, table) == {
        "S=1 per layer": Policy.from_dict(one),
        "other": Policy.from_dict(other),
    }
    with pytest.raises(PolicyError, match=r"called 'S=1 per layer': name one of them"):
        served_policies([json.dumps(one), json.dumps(other)], table)
    with pytest.raises(PolicyError, match=r"called 'stock': name one of them"):
        served_policies(['{"S": 1, "name": "stock"}'], table)
    with pytest.raises(PolicyError, match="the same policy is given twice: S=1 per layer"):
        served_policies([json.dumps(one), json.dumps({**one, "name": "again"})], table)


def test_what_the_tuner_stored_is_a_policy_by_name(table: Table) -> None:
    stored = Policy(S=1, batches={8: {"S": 2}})
    carries = replace(table, policy=stored)
    texts = spelt_out(["tuned", '{"S": 2}'], carries)
    assert [parse_arm(text, carries).name for text in texts] == ["tuned", "S=2"]
    assert served_policies(["tuned", '{"S": 2}'], carries) == {"tuned": stored, "S=2": Policy(S=2)}
    with pytest.raises(PolicyError, match=r"carries no policy: run `sere tune`"):
        spelt_out(["tuned"], table)
    with pytest.raises(PolicyError, match=r"choice of `sere tune` .* is stock routing"):
        spelt_out(["tuned"], replace(table, policy=Policy(S=1, batches={1: None})))


def test_re_routing_prompts_is_for_the_engine(tiny: Any) -> None:
    with pytest.raises(PolicyError, match="sere evaluate --engine"):
        tiny("rows.json", policies=['{"S": 1, "rows": "all"}'])


def test_a_table_made_without_text_has_defaults_of_its_own(
    tiny: Any, model_dir: Path, corpus_file: Path, tmp_path: Path
) -> None:
    calibrate(str(model_dir), tmp_path / "t", method="weights", progress=False)
    flags = ["--data", str(corpus_file), "--samples", "8", "--prompt", "4", "--batch", "4"]
    names = {}
    for folder in (tmp_path, tiny.folder):
        output = folder / "defaults.json"
        assert main(["evaluate", str(model_dir), str(folder / "t"), *flags, "-o", str(output)]) == 0
        names[folder] = [arm["name"] for arm in json.loads(output.read_text())["arms"]]
    assert names[tmp_path] == ["stock", "S=2", "S=1"]
    assert names[tiny.folder] == ["stock", "S=2", "S=1", "S=2 tau=0.02", "S=1 tau=0.1"]


def test_errors_are_those_of_whole_batches() -> None:
    value, error = mean([(1.0, 2.0), (3.0, 2.0)])
    assert value == 1 and error == pytest.approx(0.5)
    assert math.isnan(mean([(1.0, 2.0)])[1])


def test_prompts_and_answers_from_a_file(model_dir: Path, tmp_path: Path) -> None:
    pairs = [{"prompt": "add 1+2:", "answer": "3"}, {"prompt": "ab", "answer": "cd"}]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    passages = load_passages("x", str(model_dir), str(data), samples=9, prompt=1, length=1, seed=0)
    assert sorted((len(p.tokens), p.start) for p in passages) == [(5, 2), (10, 8)]


def test_a_file_sorted_by_task_is_drawn_from_all_over(model_dir: Path, tmp_path: Path) -> None:
    """By the seed, for one pass and for the engine; the demo's own tasks are drawn already."""
    data = tmp_path / "pairs.jsonl"
    tasks = [{"prompt": f"{task} {i}:", "answer": "yes"} for task in "ab" for i in range(50)]
    data.write_text("".join(json.dumps(task) + "\n" for task in tasks))

    def passages(seed: int) -> list[list[int]]:
        found = load_passages(
            "x", str(model_dir), str(data), samples=40, prompt=1, length=1, seed=seed
        )
        return [p.tokens for p in found]

    first_of = {task: load_tokenizer(str(model_dir))(task).input_ids[0] for task in "ab"}
    halves = passages(0)[:20], passages(0)[20:]
    for half in halves:
        assert {tokens[0] for tokens in half} == set(first_of.values())
    assert passages(0) == passages(0) != passages(1)
    asked = [generation._pairs("x", str(data), 40, seed) for seed in (0, 0, 1)]
    assert asked[0] == asked[1] != asked[2] and len(asked[0]) == 40
    assert {prompt[0] for prompt, _ in asked[0][:20]} == {"a", "b"}


def test_no_passage_is_measured_twice(model_dir: Path, tmp_path: Path) -> None:
    """Or the tuner's search and its check could share one; the same text may be cut elsewhere."""

    def lengths(name: str, *lines: dict[str, str]) -> list[tuple[int, int]]:
        data = tmp_path / name
        data.write_text("".join(json.dumps(line) + "\n" for line in lines))
        found = load_passages("x", str(model_dir), str(data), samples=9, prompt=2, length=3, seed=0)
        return sorted((len(p.tokens), p.start) for p in found)

    pair, other = {"prompt": "ab", "answer": "cd"}, {"prompt": "abc", "answer": "d"}
    assert lengths("pairs.jsonl", pair, other, pair) == [(5, 2), (5, 3)]
    texts = [{"text": text} for text in ("abcdefgh", "abcde", "abcdf")]  # cut to five tokens
    assert lengths("texts.jsonl", *texts) == [(5, 2), (5, 2)]
    asked = examples(160, seed=0, split="held_out")
    assert len({(e.prompt, e.answer) for e in asked}) == 159
    demo = str(demo_model.PATH)
    own = load_passages("demo", demo, None, samples=160, prompt=1, length=1, seed=0)
    assert (
        len(own) == 159
        and own[0].tokens[: own[0].start] == load_tokenizer(demo)(asked[0].prompt).input_ids
    )


@pytest.mark.parametrize("verb", ["evaluate", "tune"])
def test_lengths_of_texts_are_refused_where_answers_are_given(
    verb: str, tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "pairs.jsonl"
    data.write_text('{"prompt": "ab", "answer": "cd"}\n')
    flags = [str(tiny.folder / "t"), "--length", "8", "--prompt", "4"]
    for model, more in (("demo", []), ("x", ["--data", str(data)])):
        assert main([verb, model, *flags, *more, "-o", str(tmp_path / "o")]) == 1
        assert "--prompt and --length: for texts alone" in capsys.readouterr().err


def test_prompts_begin_as_an_engine_has_them_begin(
    model_dir: Path, corpus_file: Path, tmp_path: Path
) -> None:
    """With the token that the tokenizer puts before a text, once; answers and end without it."""
    from tokenizers.processors import TemplateProcessing

    tokenizer: Any = load_tokenizer(str(model_dir))
    first = tokenizer.pad_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<pad> $A", special_tokens=[("<pad>", first)]
    )
    tokenizer.save_pretrained(tmp_path)
    data = tmp_path / "pairs.jsonl"
    data.write_text('{"prompt": "ab", "answer": "cd"}\n')
    (pair,) = load_passages("x", str(tmp_path), str(data), samples=9, prompt=1, length=1, seed=0)
    plain = tokenizer("abcd").input_ids
    assert pair.tokens == [*plain, tokenizer.eos_token_id] and pair.start == 3
    assert plain[0] == first and first not in plain[1:]
    (text, *_) = load_passages(
        "x", str(tmp_path), str(corpus_file), samples=3, prompt=4, length=8, seed=0
    )
    assert text.tokens[0] == first and first not in text.tokens[1:]


def test_what_would_mean_nothing_is_refused(
    tiny: Any, capsys: pytest.CaptureFixture[str], model_dir: Path
) -> None:
    with pytest.raises(PolicyError, match=r"are called .*name one of them"):
        tiny(policies=['{"S": 1}', '{"S": 1}'])
    with pytest.raises(EvaluationError, match="lower --prompt"):
        tiny(prompt=500)
    with pytest.raises(EvaluationError, match="--data is needed"):
        tiny(data=None)
    assert main(["evaluate", str(model_dir), str(tiny.folder / "t"), "--policy", "{"]) == 1
    assert "not JSON" in capsys.readouterr().err


def test_the_table_and_the_plot_are_written(tiny: Any, capsys: pytest.CaptureFixture[str]) -> None:
    tiny("shown.json")
    printed = capsys.readouterr().out
    assert "batch 4" in printed and "S=1 tau=0.05" in printed and "+-" in printed
    errors = arm(tiny("shown.json"), "S=1 min_active=1", 4)["output_error_by_layer"]
    layer, (worst, _) = max(errors.items(), key=lambda item: item[1][0])
    mean_ = sum(error for error, _ in errors.values()) / len(errors)
    line = printed.split("batch 4: experts' output error, % of energy")[1].splitlines()[2]
    assert f"{100 * mean_:.2f}" in line and f"{100 * worst:.2f} +-" in line
    assert line.startswith("S=1 min_active=1") and line.endswith(f"(layer {layer})")
    assert (tiny.folder / "shown.png").stat().st_size > 10_000
    assert torch.tensor(json.loads((tiny.folder / "shown.json").read_text())["K"]) == 2


def test_batches_that_are_never_full_are_noticed(
    tiny: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    count = tiny("small.json", policies=POLICIES[:1], batches=[4])["passages"]
    assert "never full" not in capsys.readouterr().out
    tiny("full.json", policies=POLICIES[:1], batches=[count, 16])
    notes = [line for line in capsys.readouterr().out.splitlines() if "never full" in line]
    assert notes == [f"batch 16 was never full: {count} passages in all; for more, raise --samples"]


def test_a_model_with_other_experts_per_token_is_refused(
    tiny: Any, model_dir: Path, tmp_path: Path
) -> None:
    """Its weights are the table's: only the configuration says otherwise."""
    other = tmp_path / "other"
    shutil.copytree(model_dir, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "num_experts_per_tok": 3}))
    options = {"data": str(tiny.folder / "text.txt"), "policies": POLICIES[:1], "batches": [2]}
    (tiny.folder / "text.txt").write_text("one and two make three and four\n\n" * 20)
    with pytest.raises(TableError, match=r"made for 2 experts per token and the .*to 3"):
        run(str(other), str(tiny.folder / "t"), str(tmp_path / "e"), prompt=4, length=8, **options)


def test_a_table_of_other_weights_is_refused(
    tiny: Any, model_dir: Path, tmp_path: Path, corpus_file: Path
) -> None:
    from safetensors.torch import load_file, save_file

    other = tmp_path / "other"
    shutil.copytree(model_dir, other)
    weights = load_file(other / "model.safetensors")
    changed = {n: w + 0.01 if "experts" in n else w for n, w in weights.items()}
    save_file(changed, other / "model.safetensors", metadata={"format": "pt"})
    flags = ["--data", str(corpus_file), "-o", str(tmp_path / "e.json")]
    with pytest.raises(TableError, match="belongs to another model"):
        run(str(other), str(tiny.folder / "t"), str(tmp_path / "e.json"), policies=[], batches=[1])
    assert main(["evaluate", str(other), str(tiny.folder / "t"), *flags]) == 1
    assert not (tmp_path / "e.json").exists()
