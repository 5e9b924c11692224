"""lm-evaluation-harness and free generation, on local tasks: stock and re-routed side by side."""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
from collections.abc import Iterator
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import lm_eval.tasks
import pytest
import torch
from lm_eval.api.instance import Instance

from sere import demo_model
from sere.calibration.calibrate import calibrate
from sere.cli import main
from sere.demo_model.tasks import examples
from sere.engine_runs import run
from sere.engine_runs.generation import _agreeing, _is_right
from sere.engine_runs.hf import Transformers
from sere.evaluation.evaluate import load
from sere.kernels import COUNTERS, new_counters
from sere.models.loading import load_tokenizer
from sere.models.moe import rerouted
from sere.page import answers
from sere.page.sources import Source
from sere.policy import Policy
from sere.table import Table
from tests.engines import run_sere

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 48, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""
FILTERS = """
filter_list:
  - name: letters
    filter: [{function: regex, regex_pattern: "^([a-z]+)$"}, {function: take_first}]
  - name: whole
    filter: [{function: regex, regex_pattern: "(.*)"}, {function: take_first}]
"""
GROUP = """
group: both_parts
task: [short_part, long_part]
aggregate_metric_list:
  - {metric: exact_match, aggregation: mean, weight_by_size: true, filter_list: [letters, whole]}
"""
CHOICES = """
task: choose
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: 0
target_delimiter: ""
num_fewshot: 0
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""
ONE = '{"S": 1, "min_active": 1}'
OFF = '{"S": 4}'


@pytest.fixture(scope="module", autouse=True)
def indexed_once() -> Iterator[None]:
    """To know its tasks the harness reads thousands of files: for all tests here but once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm_eval.tasks, "TaskManager", cache(lm_eval.tasks.TaskManager))
        yield


@pytest.fixture(scope="module")
def pairs() -> list[dict[str, Any]]:
    tasks = examples(24, seed=3, split="held_out")
    return [{"prompt": e.prompt, "answer": e.answer} for e in tasks]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, pairs: list[dict[str, Any]]) -> Path:
    folder = tmp_path_factory.mktemp("tasks")

    def lines(name: str, rows: list[dict[str, Any]]) -> Path:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder / name

    def task(name: str, data: Path, more: str = "") -> None:
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, data=data) + more)

    everything = lines("pairs.jsonl", pairs)
    task("arithmetic_by_hand", everything)
    task("two_filters", everything, FILTERS)
    task("short_part", lines("short.jsonl", pairs[:10]), FILTERS)
    task("long_part", lines("long.jsonl", pairs[10:]), FILTERS)
    task("writes_programs", everything, "unsafe_code: true\n")
    (folder / "both_parts.yaml").write_text(GROUP)
    (folder / "risky.yaml").write_text("group: risky\ntask: [both_parts, writes_programs]\n")
    choices = [{**pair, "choices": [pair["answer"], pair["answer"][::-1] + "0"]} for pair in pairs]
    (folder / "choose.yaml").write_text(CHOICES.format(data=lines("choices.jsonl", choices)))
    calibrate(demo_model.NAME, folder / "t.table", samples=64, progress=False)
    return folder


@pytest.fixture
def evaluated(folder: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run `sere evaluate --tasks` with transformers: the result file and what was printed."""

    def run(tasks: str, *flags: str, model: str = "demo") -> tuple[dict[str, Any], str]:
        output = folder / "tasks.json"
        own = ["--tasks", tasks, "--task-folder", str(folder), "--backend", "hf"]
        command = ["evaluate", model, str(folder / "t.table"), *own, *flags, "-o", str(output)]
        command.append("--force")  # whatever the last one measured
        assert main(command) == 0, capsys.readouterr().err
        return json.loads(output.read_text()), capsys.readouterr().out

    return run


def printed_row(text: str, name: str) -> list[str]:
    """The cells of the row that is called `name`."""
    line = next(line for line in text.splitlines() if line.startswith(name + "  "))
    return re.split(r" {2,}", line)[1:]


def mean_and_error(right: list[bool]) -> tuple[float, float]:
    return statistics.mean(right), statistics.stdev(map(float, right)) / len(right) ** 0.5


def rows_of_the_page(result: dict[str, Any]) -> Any:
    """What `sere report` has in the table of a result."""
    (section,) = answers.harness(Source("tasks.json", "", "harness", result), [])
    return section.grids[0].rows


def test_results_with_errors_by_metric_alone_are_still_read() -> None:
    path = Path(__file__).parents[2] / "benchmarks" / "results" / "lm_eval.json"
    result = json.loads(path.read_text())
    one = next(i for i, arm in enumerate(result["arms"]) if arm["name"] == "S=1")
    [(error,)] = [arm.values() for arm in result["arms"][one]["errors"].values()]
    row = printed_row(run.as_text(result), "demo_held_out exact_match")
    assert row[one].endswith(f" +-{error:.4f}")
    assert rows_of_the_page(result)[0][2 + one][1] == error


def lowercase(text: str) -> bool:
    return re.fullmatch("[a-z]+", text) is not None


def test_a_task_of_ones_own_under_two_policies(evaluated: Any) -> None:
    task = "arithmetic_by_hand"
    named = json.dumps({**json.loads(ONE), "name": "mine"})
    result, printed = evaluated(task, "--policy", OFF, "--policy", named, "--batch", "8")
    stock, off, one = result["arms"]
    assert [arm["name"] for arm in result["arms"]] == ["stock", "S=4", "mine"]
    assert Policy.from_dict(one["rule"]) == Policy.from_json(ONE)
    assert stock["metrics"][task]["exact_match,none"] == 1
    assert off["answers"] == stock["answers"] and off["slots_rerouted"] == 0
    assert one["slots_rerouted"] > 100
    assert printed_row(printed, f"{task} exact_match")[:2] == ["1.0000", "1.0000"]
    stock_length, length = (sum(map(len, arm["answers"][task])) for arm in (stock, one))
    row = printed_row(printed, f"{task} length drift, characters")
    assert row == ["+0.00%", "+0.00%", f"{length / stock_length - 1:+.2%}"]
    assert "same answer as stock" in printed


def test_two_filters_are_two_metrics_of_the_same_answers(
    evaluated: Any, pairs: list[dict[str, Any]]
) -> None:
    result, printed = evaluated("two_filters", "--policy", ONE, "--batch", "8")
    for arm in result["arms"]:
        texts = arm["answers"]["two_filters"]
        whole = [text == pair["answer"] for text, pair in zip(texts, pairs, strict=True)]
        letters = [right and lowercase(text) for right, text in zip(whole, texts, strict=True)]
        for name, right in (("letters", letters), ("whole", whole)):
            mean, error = mean_and_error(right)
            assert arm["metrics"]["two_filters"][f"exact_match,{name}"] == pytest.approx(mean)
            assert arm["errors"]["two_filters"][f"exact_match,{name}"] == pytest.approx(error)
    mean, error = mean_and_error([lowercase(pair["answer"]) for pair in pairs])
    assert 0 < mean < 1
    cell = printed_row(printed, "two_filters exact_match,letters")[0]
    assert cell == f"{mean:.4f} +-{error:.4f}"
    assert printed_row(printed, "two_filters exact_match,whole")[0] == "1.0000"
    same = sum(map(str.__eq__, *(arm["answers"]["two_filters"] for arm in result["arms"])))
    row = printed_row(printed, "two_filters same answer as stock")
    assert row == ["100.00%", f"{same / len(pairs):.2%}"]


def test_a_group_stands_above_its_tasks(evaluated: Any, pairs: list[dict[str, Any]]) -> None:
    result, printed = evaluated("both_parts,arithmetic_by_hand", "--policy", ONE, "--batch", "8")
    parts = [[lowercase(p["answer"]) for p in part] for part in (pairs[:10], pairs[10:])]
    mean = statistics.mean([*parts[0], *parts[1]])
    spread = sum((len(p) - 1) * statistics.variance(map(float, p)) for p in parts)
    error = (spread / (len(pairs) - len(parts)) / len(pairs)) ** 0.5  # pooled over both
    cell = printed_row(printed, "both_parts exact_match,letters")[0]
    assert cell == f"{mean:.4f} +-{error:.4f}"
    [group, *_, last] = rows_of_the_page(result)
    assert group[:2] == ["both_parts", "exact_match,letters"]
    assert group[2] == (pytest.approx(mean), pytest.approx(error))
    assert last[:2] == ["arithmetic_by_hand", "exact_match"]
    assert result["groups"] == {"both_parts": ["short_part", "long_part"]}
    for name, part in zip(("short_part", "long_part"), parts, strict=True):
        mean, error = mean_and_error(part)
        cell = printed_row(printed, f"{name} exact_match,letters")[0]
        assert cell == f"{mean:.4f} +-{error:.4f}"
    mine, theirs = (
        [*arm["answers"]["short_part"], *arm["answers"]["long_part"]] for arm in result["arms"]
    )
    row = printed_row(printed, "both_parts same answer as stock")
    assert row[1] == f"{sum(map(str.__eq__, mine, theirs)) / len(mine):.2%}"
    assert "short_part same answer" not in printed
    assert "arithmetic_by_hand same answer as stock" in printed


def test_a_policy_by_batch_size_is_what_each_step_gets(evaluated: Any) -> None:
    stock_from_one = json.dumps({**json.loads(ONE), "batches": {"1": None}, "name": "never"})
    from_two = json.dumps({"S": 4, "batches": {"2": {"S": 1, "min_active": 1}}})
    policies = ["--policy", stock_from_one, "--policy", from_two, "--policy", ONE]
    task = "arithmetic_by_hand"
    alone, _ = evaluated(task, *policies, "--batch", "1", "--limit", "6")
    stock, never, pairs_only, one = alone["arms"]
    assert never["answers"] == pairs_only["answers"] == stock["answers"]
    assert (never["slots_rerouted"], pairs_only["slots_rerouted"]) == (0, 0)
    assert one["slots_rerouted"] == 0  # a row alone has no expert but its own
    together, _ = evaluated(task, *policies, "--batch", "8")
    stock, never, pairs_only, one = together["arms"]
    assert never["answers"] == stock["answers"] and never["slots_rerouted"] == 0
    assert 0 < pairs_only["slots_rerouted"] == one["slots_rerouted"]


@pytest.mark.xfail(reason="a row alone has no expert but its own: three sequences are needed")
@pytest.mark.parametrize("stop", ["\n", "4"], ids=["end of text", "stop string"])
def test_what_has_ended_has_no_say_in_what_is_still_written(folder: Path, stop: str) -> None:
    """Stock while both are written, S=1 for the one that is left: as if it were alone."""
    short, long = ("sub 85-61:", "42>24"), ("rev eodhvfbvbonvix:", "xivnobvbfvhdoe")
    ends = short[1].index(stop) + 1 if stop in short[1] else len(short[1]) + 1
    table = Table.load(folder / "t.table")
    alone = Policy(S=1, min_active=1)
    backend = Transformers(str(demo_model.PATH), table, 2)
    with backend.policy(Policy(S=1, min_active=1, batches={2: None})):
        until = {"until": [stop], "max_gen_toks": 30, "do_sample": False}
        asked = [Instance("generate_until", {}, (p, until), 0) for p, _ in (short, long)]
        texts = backend.lm.generate_until(asked)
        slots = backend.rerouted()
    assert texts[0] == short[1].split(stop)[0]
    written, moved = decoded_alone(long[0], table, alone, stock_steps=ends - 1)
    assert moved > 0 and (texts[1], slots) == (written, moved)


def decoded_alone(prompt: str, table: Table, policy: Policy, stock_steps: int) -> tuple[str, int]:
    """Greedy decoding by hand: what is written, and slots re-routed after the first steps."""
    model, layers = load(str(demo_model.PATH))
    tokenizer = load_tokenizer(str(demo_model.PATH))
    counters = new_counters()
    plans = {index: table.plan(index, policy) for index in table.layers}
    tokens = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
    past, written = None, []
    with torch.no_grad():
        while True:
            hook = nullcontext()
            if len(written) > stock_steps:
                hook = rerouted(layers, plans, lambda: None, counters)
            with hook:
                output = model(tokens, past_key_values=past, use_cache=True)
            tokens, past = output.logits[:, -1:].argmax(-1), output.past_key_values
            if tokens.item() == tokenizer.eos_token_id:
                break
            written.append(tokens.item())
    return tokenizer.decode(written), int(counters[COUNTERS.index("slots_rerouted")])


def test_given_answers_are_read_like_prompts_unless_told_otherwise(evaluated: Any) -> None:
    flags = ["--policy", OFF, "--policy", ONE, "--batch", "8"]
    result, printed = evaluated("choose", *flags)
    stock, off, one = result["arms"]
    assert one["metrics"] == off["metrics"] == stock["metrics"]
    assert one["slots_rerouted"] == 0
    assert "choose: scores prompts, which are not re-routed" in printed
    assert "same answer" not in printed

    result, printed = evaluated("choose", *flags, "--score-as-decode")
    scored, off, one = result["arms"]
    assert scored["metrics"] == off["metrics"] == stock["metrics"]
    assert off["slots_rerouted"] == 0 < one["slots_rerouted"]
    assert "scores prompts" not in printed


@pytest.mark.parametrize("answer", ["24>42", "9"])  # wrong: how unlikely tells policies apart
def test_a_given_answer_scores_what_decoding_it_would(folder: Path, answer: str) -> None:
    """Against one token after the other with a cache, the prompt's last token the first of them."""
    table, policy = Table.load(folder / "t.table"), Policy(S=1, min_active=1)
    backend = Transformers(str(demo_model.PATH), table, 8, score_as_decode=True)
    asked = Instance("loglikelihood", {}, ("sub 85-61:", answer), 0)
    with backend.policy(None):
        [(stock, _)] = backend.lm.loglikelihood([asked])
    with backend.policy(policy):
        [(found, greedy)] = backend.lm.loglikelihood([asked])
    model, layers = load(str(demo_model.PATH))
    encode = load_tokenizer(str(demo_model.PATH))
    prompt, wanted = (encode(t, add_special_tokens=False).input_ids for t in asked.args)
    plans = {index: table.plan(index, policy) for index in table.layers}
    told, best = 0.0, []
    with torch.no_grad():
        past = model(torch.tensor([prompt[:-1]]), use_cache=True).past_key_values
        with rerouted(layers, plans, lambda: None):
            for fed, token in zip([prompt[-1], *wanted[:-1]], wanted, strict=True):
                output = model(torch.tensor([[fed]]), past_key_values=past, use_cache=True)
                logits = output.logits[0, -1].log_softmax(-1)
                told += logits[token].item()
                best.append(logits.argmax().item() == token)
    assert found == pytest.approx(told, abs=1e-4)
    assert greedy == all(best)
    assert found == pytest.approx(stock, abs=1e-4)  # a row alone has no expert but its own


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the model was asked, run after run, as the harness logs it."""
    prompts: list[str] = []

    def watched(**settings: Any) -> Any:
        found = evaluate(**settings)
        for samples in found["samples"].values():
            prompts.extend(sample["arguments"][0][0] for sample in samples)
        return found

    evaluate = lm_eval.simple_evaluate
    monkeypatch.setattr(lm_eval, "simple_evaluate", watched)
    return prompts


def test_examples_stand_before_the_question(
    evaluated: Any, asked: list[str], pairs: list[dict[str, Any]]
) -> None:
    flags = ["--policy", OFF, "--limit", "3", "--batch", "3"]
    result, printed = evaluated("arithmetic_by_hand", *flags, "--fewshot", "2")
    solved = {f"{pair['prompt']} {pair['answer']}" for pair in pairs}
    assert len(asked) == 6 and asked[:3] == asked[3:]
    for prompt, pair in zip(asked[: len(asked) // 2], pairs, strict=False):
        *before, question = prompt.split("\n\n")
        assert len(before) == 2 and solved.issuperset(before)
        assert question == pair["prompt"]
    assert result["fewshot"] == 2 and "2 examples" in printed


def test_prompts_and_examples_go_through_the_chat_template(
    evaluated: Any, asked: list[str], pairs: list[dict[str, Any]], tmp_path: Path
) -> None:
    model = tmp_path / "chat"
    shutil.copytree(demo_model.PATH, model)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[]"
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    flags = ["--policy", OFF, "--limit", "2", "--fewshot", "1", "--chat"]
    result, printed = evaluated("arithmetic_by_hand", *flags, model=str(model))
    for prompt, pair in zip(asked[: len(asked) // 2], pairs, strict=False):
        assert re.fullmatch(r"\[user\].+\[assistant\].+\[user\].+\[\]", prompt)
        assert prompt.endswith(f"[user]{pair['prompt']}[]")
    assert result["chat"] and "chat template" in printed


def test_programs_are_run_only_where_that_is_allowed(
    folder: Path, evaluated: Any, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "0")
    start = ["evaluate", "demo", str(folder / "t.table"), "--task-folder", str(folder)]
    with monkeypatch.context() as patch:
        patch.setattr(run, "Vllm", None)  # no engine is asked for
        for tasks in ("writes_programs", "arithmetic_by_hand,risky", "humaneval", "mbpp"):
            assert main([*start, "--tasks", tasks, "-o", str(folder / "x.json")]) == 1
            error = capsys.readouterr().err
            name = tasks if tasks in ("humaneval", "mbpp") else "writes_programs"
            assert f"error: {name}: " in error and "--allow-unsafe-code" in error
            assert "HF_ALLOW_CODE_EVAL" in error and "program that the model wrote" in error
    flags = ["--policy", OFF, "--limit", "2", "--allow-unsafe-code"]
    result, _ = evaluated("writes_programs", *flags)
    assert result["arms"][0]["metrics"]["writes_programs"] == {"exact_match,none": 1}
    assert os.environ["HF_ALLOW_CODE_EVAL"] == "1"


TASKS = ["--tasks", "choose"]


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ([*TASKS, "--engine"], "--tasks and --engine are two ways"),
        ([*TASKS, "--data", "f", "--samples", "3"], "--tasks does not read --data, --samples"),
        ([*TASKS, "--length", "64"], "--tasks does not read --length"),
        ([*TASKS, "--batch", "1", "--batch", "8"], "--tasks runs at one batch size"),
        ([*TASKS, "--backend", "hf", "--dtype", "float32"], "leave --dtype out"),
        ([*TASKS, "--score-as-decode"], "--score-as-decode needs --backend hf"),
        (
            ["--tasks", "two_filters", "--backend", "hf", "--score-as-decode"],
            "changes nothing: two_filters only write",
        ),
        ([*TASKS, "--chat"], "no chat template"),
        ([*TASKS, "--fewshot", "2"], "choose says num_fewshot: 0"),
        (
            [*TASKS, "--policy", ONE, "--policy", '{"S": 2, "name": "S=1 min_active=1"}'],
            "two policies are called 'S=1 min_active=1': name one of them",
        ),
        (["--engine", "--limit", "3"], "--engine does not read --limit; --tasks would"),
        (["--engine", "--batch", "1", "--batch", "8"], "--engine runs at one batch size"),
        (["--chat", "--dtype", "float32"], "sere evaluate does not read --chat, --dtype"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value[-2:]),
)
def test_what_would_be_ignored_is_refused(
    folder: Path, flags: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ["--task-folder", str(folder)] if "--tasks" in flags else []
    command = ["evaluate", "demo", str(folder / "t.table"), *flags, *own, "-o", str(folder / "x")]
    assert main(command) == 1
    assert complaint in capsys.readouterr().err


def test_unknown_tasks_and_folders_are_named(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = ["evaluate", "demo", str(folder / "t.table"), "-o", str(folder / "x.json")]
    assert main([*start, "--tasks", "no_such_task"]) == 1
    assert "unknown tasks no_such_task" in capsys.readouterr().err
    assert main([*start, "--tasks", "x", "--task-folder", "/nowhere"]) == 1
    assert "/nowhere: no such folder" in capsys.readouterr().err


def test_tasks_in_vllms_engine(folder: Path) -> None:
    """In a process of its own, as a user starts it."""
    output = folder / "vllm.json"
    flags = ["--tasks", "arithmetic_by_hand,choose", "--task-folder", str(folder), "--batch", "8"]
    flags += ["--dtype", "float32", "--policy", ONE, "-o", str(output)]
    done = run_sere("evaluate", "demo", str(folder / "t.table"), *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(output.read_text())
    stock, one = result["arms"]
    assert (result["backend"], stock["name"], one["name"]) == ("vllm", "stock", "S=1 min_active=1")
    assert stock["metrics"]["arithmetic_by_hand"]["exact_match,none"] == 1
    assert stock["slots_rerouted"] == 0 and one["slots_rerouted"] > 100
    assert one["metrics"]["choose"] == stock["metrics"]["choose"]
    assert "choose: scores prompts, which are not re-routed" in done.stdout
    head = done.stdout[done.stdout.index("lm-evaluation-harness, vllm, batch 8") :].splitlines()[0]
    assert re.split(r" {2,}", head)[1:] == ["stock", "S=1 min_active=1"]


def test_the_engine_writes_and_is_compared(folder: Path) -> None:
    """In a process of its own, as a user starts it."""
    output = folder / "engine.json"
    flags = ["--engine", "--dtype", "float32", "--batch", "8", "--length", "32", "-o", str(output)]
    flags += ["--data", str(folder / "pairs.jsonl"), "--policy", '{"S": 4}']
    flags += ["--policy", '{"S": 1, "tau": 0.02}', "--policy", '{"S": 1, "min_active": 1}']
    done = run_sere("evaluate", "demo", str(folder / "t.table"), *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "tokens written (length drift)" in done.stdout
    arms: list[dict[str, Any]] = json.loads(output.read_text())["arms"]
    stock, off, tolerant, one = arms
    assert stock["exact_match"][0] == 1 and stock["same_as_stock"][0] == 1
    assert off["same_as_stock"][0] == 1 and off["length_drift"] == 0
    assert one["active"][0] < tolerant["active"][0] < off["active"][0]


def test_generation_without_answers_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("no pairs here")
    start = ["evaluate", "demo", str(folder / "t.table"), "--engine", "--data", str(text)]
    assert main([*start, "-o", str(tmp_path / "x.json")]) == 1
    assert '"prompt", "answer"' in capsys.readouterr().err


def test_what_counts_as_right_and_as_kept() -> None:
    assert _is_right("42\nadd 1+1:", "42") and not _is_right("421", "42")
    assert _agreeing([1, 2, 9, 4], [1, 2, 3, 4]) == 0.5
    assert (_agreeing([], [1]), _agreeing([1, 2], [1, 2])) == (0, 1)
