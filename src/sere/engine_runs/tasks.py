"""Which of lm-evaluation-harness's tasks are run, refused before a model is loaded for them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sere.evaluation.quality import EvaluationError
from sere.extras import with_remedy


@dataclass(frozen=True)
class Selection:
    """The harness's own objects, loaded once for all policies.

    manager: its `TaskManager`. tasks, groups: `Task` and `Group` by name; the groups' tasks and
    those of groups within groups included.
    """

    manager: Any
    tasks: dict[str, Any]
    groups: dict[str, Any]

    @property
    def leaves(self) -> dict[str, list[str]]:
        """By group, the names of all its tasks."""
        return {
            name: [task.task_name for task in group.get_all_tasks()]
            for name, group in self.groups.items()
        }

    @property
    def scores(self) -> bool:
        """Whether any task scores given answers."""
        types = (task.get_config("output_type") for task in self.tasks.values())
        return any(each != "generate_until" for each in types)

    @property
    def roots(self) -> list[Any]:
        """What is in no group, and the groups that are in no other."""
        inner = {each.name for group in self.groups.values() for each in group.get_all_groups()}
        inside = {name for leaves in self.leaves.values() for name in leaves}
        groups = [group for name, group in self.groups.items() if name not in inner]
        return groups + [task for name, task in self.tasks.items() if name not in inside]


def select(
    names: Sequence[str],
    folder: str | None = None,
    *,
    fewshot: int | None = None,
    allow_unsafe_code: bool = False,
) -> Selection:
    """Load tasks, groups and tags by name, those of YAML files in `folder` among them.

    fewshot: examples in the prompt, which every task has to accept.
    Raises `EvaluationError` for names that nobody knows, for tasks that run what the model writes
    unless that is allowed, and for tasks that would ignore `fewshot`.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise EvaluationError(
            f"--tasks needs lm-evaluation-harness: {with_remedy(error)}"
        ) from error
    if folder is not None and not Path(folder).is_dir():
        raise EvaluationError(f"{folder}: no such folder of tasks")
    manager = TaskManager(include_path=folder)
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise EvaluationError(
            f"unknown tasks {', '.join(unknown)}: see `lm-eval ls tasks`, or name the folder of "
            "yours with --task-folder"
        )
    unsafe = dict.fromkeys(_unsafe(manager.task_index, names))
    if unsafe and not allow_unsafe_code:
        raise EvaluationError(
            f"{', '.join(unsafe)}: to score an answer, the program that the model wrote is run on "
            "this machine. Where that may be (in a container without network), add "
            "--allow-unsafe-code, which also sets HF_ALLOW_CODE_EVAL=1"
        )
    if unsafe:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # else the metric refuses, when a task is loaded
    loaded = manager.load(list(names))
    selection = Selection(manager, loaded["tasks"], loaded.get("groups", {}))
    fixed = [name for name, task in selection.tasks.items() if task.get_config("num_fewshot") == 0]
    if fewshot and fixed:
        raise EvaluationError(
            f"--fewshot {fewshot}: {', '.join(fixed)} says num_fewshot: 0 in its own settings, "
            "which the harness never changes: leave --fewshot out, or the task"
        )
    return selection


def _unsafe(index: Mapping[str, Any], members: Sequence[str | dict[str, Any]]) -> Iterator[str]:
    """Names of the tasks among and below these that are marked `unsafe_code`.

    Read from the YAML files: loading such a task already runs code.
    """
    for member in members:
        own = member if isinstance(member, dict) else {}
        name = own.get("task", own.get("group", "")) if own else member
        entry = index.get(name) if isinstance(name, str) else None
        config = {**((entry and entry.cfg) or {}), **own}
        if config.get("unsafe_code"):
            yield str(name)
        if entry is not None and entry.kind.name == "TAG":
            yield from _unsafe(index, sorted(entry.tags))
        elif isinstance(config.get("task"), list):
            yield from _unsafe(index, config["task"])
