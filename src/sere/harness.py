"""`sere evaluate --tasks`: lm-evaluation-harness under each policy and under stock, side by side.

One model object serves all runs: vLLM's engine, whose policy is switched in place, or transformers
with the operator hooked in. Only decoding is re-routed: tasks that score given answers
(log-likelihoods) read prompts alone and come out as stock's, which is said where it happens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sere import demo_model, report
from sere.evaluate import load
from sere.files import check_writable
from sere.kernels import COUNTERS, RowClass, new_counters
from sere.moe import rerouted
from sere.policy import Policy
from sere.quality import EvaluationError
from sere.serving.engine import prepare
from sere.serving.settings import KEY
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
    folder: str | None = None,
    limit: int | None = None,
    dtype: str = "auto",
    seed: int = 0,
) -> dict[str, Any]:
    """Run the tasks, print a table, write `output` (JSON).

    tasks: names that the harness knows, or those of YAML files in `folder`.
    Raises `EvaluationError` for tasks that nobody knows.
    """
    check_writable(output)
    table = Table.load(table_path)
    chosen: list[tuple[str, Policy | None]] = [("stock", None)]
    for text in policies:
        policy = Policy.from_json(text)
        policy.check_against(table.fingerprint.K, table.fingerprint.E)
        chosen.append((policy.brief(), policy))
    manager = _task_manager(tasks, folder)
    model_folder = demo_model.resolve(model_name)
    arms: _Vllm | _Transformers
    if backend == "vllm":
        arms = _Vllm(model_folder, table_path, batch, dtype, seed)
    else:
        arms = _Transformers(model_folder, table, batch)
    runs = []
    for name, rule in chosen:
        with arms.policy(rule):
            found = _evaluated(arms.lm, tasks, manager, limit, seed)
        found["slots_rerouted"] = arms.rerouted()
        runs.append({"name": name, "rule": rule.to_dict() if rule else None, **found})
    result = {
        "provenance": report.provenance(),
        "model": model_name,
        "backend": backend,
        "batch": batch,
        "limit": limit,
        "arms": runs,
    }
    report.save_json(output, result)
    print(as_text(result))
    print(f"\nwritten: {output}")
    return result


def _task_manager(tasks: Sequence[str], folder: str | None) -> Any:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise EvaluationError(
            f"--tasks needs lm-evaluation-harness ({error}): pip install 'sere[eval]'"
        ) from error
    if folder is not None and not Path(folder).is_dir():
        raise EvaluationError(f"{folder}: no such folder of tasks")
    manager = TaskManager(include_path=folder)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise EvaluationError(
            f"unknown tasks {', '.join(unknown)}: see `lm-eval ls tasks`, or name the folder of "
            "yours with --task-folder"
        )
    return manager


def _evaluated(
    lm: Any, tasks: Sequence[str], manager: Any, limit: int | None, seed: int
) -> dict[str, Any]:
    """Metrics by task, length of what was written, and whether the task decodes at all."""
    from lm_eval import simple_evaluate

    found = simple_evaluate(
        model=lm,
        tasks=list(tasks),
        task_manager=manager,
        limit=limit,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
        bootstrap_iters=0,
    )
    samples = found["samples"]
    return {
        "metrics": {
            task: {
                name: value
                for name, value in metrics.items()
                if isinstance(value, int | float) and "stderr" not in name and name != "sample_len"
            }
            for task, metrics in found["results"].items()
        },
        "errors": {task: _standard_errors(samples[task]) for task in samples},
        "decodes": {
            task: config["output_type"] == "generate_until"
            for task, config in found["configs"].items()
        },
        "answers": {task: [_text_of(sample) for sample in samples[task]] for task in samples},
    }


def _standard_errors(samples: list[dict[str, Any]]) -> dict[str, float]:
    """Of every metric that is a number for each sample."""
    errors: dict[str, float] = {}
    for metric in samples[0].get("metrics", []):
        values = [sample[metric] for sample in samples if metric in sample]
        if len(values) > 1 and all(isinstance(v, int | float) for v in values):
            errors[metric] = (torch.tensor(values).double().std() / len(values) ** 0.5).item()
    return errors


def _text_of(sample: dict[str, Any]) -> str:
    response = sample["resps"][0][0]
    return response if isinstance(response, str) else ""


class _Vllm:
    """The harness's vLLM model with re-routing loaded."""

    def __init__(self, folder: str, table: str, batch: int, dtype: str, seed: int) -> None:
        prepare()
        from lm_eval.api.registry import get_model

        _name_vllm()
        self.lm: Any = get_model("vllm")(
            pretrained=folder,
            dtype=dtype,
            seed=seed,
            batch_size="auto",  # all requests at once: the engine makes the batches
            max_num_seqs=batch,
            enable_prefix_caching=False,
            additional_config={KEY: {"table": str(Path(table).absolute())}},
        )

    @contextmanager
    def policy(self, policy: Policy | None) -> Iterator[None]:
        settings = policy.to_dict() if policy else None
        self.lm.model.collective_rpc("sere_policy", args=(settings,))
        self.lm.model.collective_rpc("sere_reset")
        yield

    def rerouted(self) -> int:
        """Slots that were re-routed since the policy was set."""
        stats = self.lm.model.collective_rpc("sere_stats")[0]
        return sum(layer["slots_rerouted"] for layer in stats.values())


def _name_vllm() -> None:
    """vLLM's CPU build is installed under another name than the harness asks for."""
    known = metadata.version

    def version(distribution_name: str) -> str:
        try:
            return known(distribution_name)
        except metadata.PackageNotFoundError:
            return known(f"{distribution_name}-cpu") + "+cpu"

    metadata.version = version
    try:
        import_module("lm_eval.models.vllm_causallms")  # keeps the function that it finds
    finally:
        metadata.version = known


class _Transformers:
    """The harness's transformers model; a step that feeds one token per sequence is decoding."""

    def __init__(self, folder: str, table: Table, batch: int) -> None:
        from lm_eval.api.registry import get_model

        self._model, self._layers = load(folder)
        self._table = table
        self._shape = torch.Size()
        self._counters = new_counters(self._model.device)
        self._model.register_forward_pre_hook(self._note, with_kwargs=True)
        self.lm: Any = get_model("hf")(pretrained=self._model, tokenizer=folder, batch_size=batch)

    def _note(self, _module: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        ids: Tensor = named["input_ids"] if "input_ids" in named else arguments[0]
        self._shape = ids.shape

    def policy(self, policy: Policy | None) -> Any:
        if policy is None:
            self._counters.zero_()
            return nullcontext()
        plans = {i: self._table.plan(i, policy).to(self._model.device) for i in self._table.layers}
        self._counters.zero_()

        def rows() -> Tensor:
            decoding = policy.rows == "all" or self._shape[1] == 1
            kind = RowClass.FAST if decoding else RowClass.EXACT
            return torch.full((self._shape.numel(),), int(kind), dtype=torch.int8).to(
                self._model.device
            )

        return rerouted(self._layers, plans, rows, self._counters)

    def rerouted(self) -> int:
        """Slots that were re-routed since the policy was set."""
        return int(self._counters[COUNTERS.index("slots_rerouted")])


def as_text(result: dict[str, Any]) -> str:
    """A row for each metric, a column for each policy; then how long and how equal answers are."""
    arms = result["arms"]
    stock = arms[0]
    rows = []
    for task, metrics in stock["metrics"].items():
        for metric in metrics:
            cells = [_cell(arm, task, metric) for arm in arms]
            rows.append([f"{task} {metric.removesuffix(',none')}", *cells])
        if not stock["decodes"].get(task, True):
            rows.append([f"{task}: scores prompts, which are not re-routed", *[""] * len(arms)])
            continue
        theirs = stock["answers"].get(task, [])
        same, drift = [], []
        for arm in arms:
            mine = arm["answers"][task]
            same.append(f"{sum(map(str.__eq__, mine, theirs)) / len(theirs):.2%}")
            total = sum(map(len, theirs))
            drift.append(f"{sum(map(len, mine)) / total - 1:+.2%}" if total else "-")
        rows += [[f"{task} same answer as stock", *same], [f"{task} length drift", *drift]]
    rows.append(["slots re-routed", *(str(arm["slots_rerouted"]) for arm in arms)])
    head = f"lm-evaluation-harness, {result['backend']}, batch {result['batch']}"
    return report.text_table([head, *(arm["name"] for arm in arms)], rows)


def _cell(arm: dict[str, Any], task: str, metric: str) -> str:
    error = arm["errors"].get(task, {}).get(metric.split(",")[0])
    return f"{arm['metrics'][task][metric]:.4f}" + (f" +-{error:.4f}" if error else "")
