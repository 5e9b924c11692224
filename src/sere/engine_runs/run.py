"""`sere evaluate --tasks`: lm-evaluation-harness under each policy and under stock, side by side.

One model object serves all runs: vLLM's engine, whose policy is switched in place, or transformers
with the operator hooked in. Only decoding is re-routed: tasks that score given answers
(log-likelihoods) read prompts alone and come out as stock's, which is said where it happens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from sere.engine_runs.hf import Transformers
from sere.engine_runs.tasks import Selection, select
from sere.engine_runs.vllm import Vllm
from sere.evaluation.arms import served_policies
from sere.evaluation.quality import EvaluationError
from sere.files import check_writable
from sere.models.hub import located
from sere.models.loading import load_tokenizer
from sere.policy import Policy
from sere.results import provenance
from sere.results.journal import table_hash
from sere.table import Table


def run(
    model_name: str,
    table_path: str,
    output: str,
    *,
    policies: Sequence[str],
    tasks: Sequence[str],
    backend: str = "vllm",
    batch: int = 32,
    task_folder: str | None = None,
    limit: int | None = None,
    fewshot: int | None = None,
    chat: bool = False,
    allow_unsafe_code: bool = False,
    score_as_decode: bool = False,
    dtype: str | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Run the tasks, print a table, write `output` (JSON).

    tasks: names that the harness knows, or those of YAML files in `task_folder`. fewshot: examples
    in each prompt (default: each task's own). chat: prompts go through the chat template, examples
    as turns of it. score_as_decode: see `sere.engine_runs.hf`. dtype: of vLLM's engine.
    Raises `EvaluationError` for what cannot be run as asked, before a model is loaded.
    """
    check_writable(output, table_path, kind="result")
    _check_backend(backend, dtype=dtype, score_as_decode=score_as_decode)
    table = Table.load(table_path)
    chosen: dict[str, Policy | None] = {"stock": None, **served_policies(policies, table)}
    selection = select(tasks, task_folder, fewshot=fewshot, allow_unsafe_code=allow_unsafe_code)
    _check_scores(selection, score_as_decode)
    told = {"model": model_name, "backend": backend, "batch": batch, "limit": limit}
    told |= {"fewshot": fewshot, "chat": chat, "score_as_decode": score_as_decode}
    settings = {**told, **_more(table, chosen, selection, seed, dtype)}
    provenance.check_settings(output, settings)
    folder = located(model_name)
    table.check_made_for(folder)
    if chat:
        _check_template(model_name, folder)
    arms: Vllm | Transformers = (
        Vllm(folder, table_path, batch, dtype or "auto", seed, chosen.values())
        if backend == "vllm"
        else Transformers(folder, table, batch, score_as_decode=score_as_decode)
    )
    asked = _asked(seed, limit, fewshot, chat, allow_unsafe_code)
    result = {
        "provenance": provenance.provenance(),
        "settings": settings,
        **told,
        "groups": selection.leaves,
        "arms": [
            _run(arms, name, rule, selection, asked, score_as_decode)
            for name, rule in chosen.items()
        ],
    }
    print(as_text(result))
    provenance.save_json(output, result)
    print(f"\nwritten: {output}")
    return result


def _more(
    table: Table,
    chosen: dict[str, Policy | None],
    selection: Selection,
    seed: int,
    dtype: str | None,
) -> dict[str, Any]:
    """What else a result depends on."""
    return {
        "table": table_hash(table),
        "policies": {name: policy and policy.to_dict() for name, policy in chosen.items()},
        "tasks": list(selection.leaves),
        "seed": seed,
        "dtype": dtype,
    }


def _check_backend(backend: str, *, dtype: str | None, score_as_decode: bool) -> None:
    if backend == "hf" and dtype is not None:
        raise EvaluationError(
            "--dtype is of the vLLM engine, and --backend hf computes in the checkpoint's (on CPUs "
            "in float32): leave --dtype out"
        )
    if backend == "vllm" and score_as_decode:
        raise EvaluationError(
            "--score-as-decode needs --backend hf: vLLM reads given answers as part of the prompt"
        )


def _check_scores(selection: Selection, score_as_decode: bool) -> None:
    if score_as_decode and not selection.scores:
        raise EvaluationError(
            f"--score-as-decode changes nothing: {', '.join(selection.tasks)} only write answers, "
            "which are decoded anyway: leave it out"
        )


def _check_template(model_name: str, folder: str) -> None:
    if load_tokenizer(folder).chat_template is None:
        raise EvaluationError(f"{model_name}: its tokenizer has no chat template: leave --chat out")


def _asked(
    seed: int, limit: int | None, fewshot: int | None, chat: bool, allow_unsafe_code: bool
) -> dict[str, Any]:
    """As the harness calls it."""
    return {
        "limit": limit,
        "num_fewshot": fewshot,
        "apply_chat_template": chat,
        "fewshot_as_multiturn": chat,
        "confirm_run_unsafe_code": allow_unsafe_code,
        "random_seed": seed,
        "numpy_random_seed": seed,
        "torch_random_seed": seed,
        "fewshot_random_seed": seed,
    }


def _run(
    arms: Vllm | Transformers,
    name: str,
    rule: Policy | None,
    selection: Selection,
    asked: dict[str, Any],
    score_as_decode: bool,
) -> dict[str, Any]:
    """All tasks under one policy."""
    with arms.policy(rule):
        found = _evaluated(arms.lm, selection, asked, score_as_decode)
    moved = {"slots_rerouted": arms.rerouted()}
    return {"name": name, "rule": rule.to_dict() if rule else None, **found, **moved}


def _evaluated(
    lm: Any, selection: Selection, asked: dict[str, Any], score_as_decode: bool
) -> dict[str, Any]:
    """By task, and by group where it can be: metrics, their errors, what was written, and whether
    anything is decoded at all."""
    from lm_eval import simple_evaluate

    found = simple_evaluate(
        model=lm,
        tasks=selection.roots,
        task_manager=selection.manager,
        bootstrap_iters=0,
        **asked,
    )
    results, samples = found["results"], found["samples"]
    metrics = {name: _numbers(results.get(name, {})) for name in [*selection.groups, *samples]}
    errors = {task: _standard_errors(samples[task], metrics[task]) for task in samples}
    writes = {task: c["output_type"] == "generate_until" for task, c in found["configs"].items()}
    return {
        "metrics": {name: numbers for name, numbers in metrics.items() if numbers},
        "errors": errors | _errors_of_groups(selection, results, errors),
        "decodes": {task: score_as_decode or writing for task, writing in writes.items()},
        "answers": {task: _answers(samples[task]) for task in samples if writes[task]},
    }


def _numbers(results: dict[str, Any]) -> dict[str, float]:
    """By "metric,filter"."""
    return {
        name: value
        for name, value in results.items()
        if isinstance(value, int | float) and "stderr" not in name and name != "sample_len"
    }


def _standard_errors(samples: list[dict[str, Any]], metrics: dict[str, float]) -> dict[str, float]:
    """By "metric,filter", of every metric that is the mean of a number for each document.

    samples: the harness logs one for each document and filter.
    """
    errors: dict[str, float] = {}
    for key, mean in metrics.items():
        metric, _, own = key.partition(",")
        values = [s[metric] for s in samples if s["filter"] == own and metric in s]
        if len(values) > 1 and all(isinstance(v, int | float) for v in values):
            each = torch.tensor(values).double()
            if math.isclose(each.mean().item(), mean, rel_tol=1e-6, abs_tol=1e-9):
                errors[key] = (each.std() / len(values) ** 0.5).item()
    return errors


def _errors_of_groups(
    selection: Selection, results: dict[str, Any], errors: dict[str, dict[str, float]]
) -> dict[str, dict[str, float]]:
    """As the harness pools its own, which it left out."""
    told = {
        task: {**results[task], **{key.replace(",", "_stderr,", 1): e for key, e in own.items()}}
        for task, own in errors.items()
    }
    pooled = {}
    for name, group in selection.groups.items():
        found = group.aggregate(told).items()
        pooled[name] = {
            key.replace("_stderr,", ",", 1): value
            for key, value in found
            if "_stderr," in key and isinstance(value, float)
        }
    return pooled


def _answers(samples: list[dict[str, Any]]) -> list[str]:
    """What was written, once for each document: filters read the same text."""
    first = [s for s in samples if s["filter"] == samples[0]["filter"]]
    return [str(s["resps"][0][0]) for s in first]


def as_text(result: dict[str, Any]) -> str:
    """A row for each metric, a column for each policy, the tasks of a group below it; for what is
    in no group, how long and how equal answers are."""
    arms, groups = result["arms"], result.get("groups", {})
    metrics = arms[0]["metrics"]
    inside = {task for tasks in groups.values() for task in tasks}
    rows = []
    for name in dict.fromkeys([*groups, *metrics]):
        for metric in metrics.get(name, {}):
            cells = [_cell(arm, name, metric) for arm in arms]
            rows.append([f"{name} {metric.removesuffix(',none')}", *cells])
        if name not in inside:
            rows += _beside_stock(name, groups.get(name, [name]), arms)
    rows.append(["slots re-routed", *(str(arm["slots_rerouted"]) for arm in arms)])
    head = f"lm-evaluation-harness, {result['backend']}, batch {result['batch']}"
    if (shots := result.get("fewshot")) is not None:
        head += f", {shots} examples"
    if result.get("chat"):
        head += ", chat template"
    return provenance.text_table([head, *(arm["name"] for arm in arms)], rows)


def _beside_stock(
    name: str, tasks: Sequence[str], arms: Sequence[dict[str, Any]]
) -> list[list[str]]:
    """Rows about a task, or about all tasks of a group together."""
    stock, rows = arms[0], []
    if not all(stock["decodes"].get(task, True) for task in tasks):
        note = "scores prompts, which are not re-routed"
        if any((arm["rule"] or {}).get("rows") == "all" for arm in arms):
            note = 'scores prompts, which "rows": "all" alone re-routes'
        rows.append([f"{name}: {note}", *[""] * len(arms)])
    writing = [t for t in tasks if stock["decodes"].get(t, True) and stock["answers"].get(t)]
    if not writing:
        return rows
    theirs = [text for task in writing for text in stock["answers"][task]]
    total = sum(map(len, theirs))
    same, drift = [], []
    for arm in arms:
        mine = [text for task in writing for text in arm["answers"][task]]
        same.append(f"{sum(map(str.__eq__, mine, theirs)) / len(theirs):.2%}")
        drift.append(f"{sum(map(len, mine)) / total - 1:+.2%}" if total else "-")
    return [
        *rows,
        [f"{name} same answer as stock", *same],
        [f"{name} length drift, characters", *drift],
    ]


def _cell(arm: dict[str, Any], task: str, metric: str) -> str:
    own = arm["errors"].get(task, {})
    error = own.get(metric, own.get(metric.split(",")[0]))  # by metric alone in older results
    return f"{arm['metrics'][task][metric]:.4f}" + (f" +-{error:.4f}" if error else "")
