"""Does what `sere tune` chooses keep its budget in the real engine, on prompts that it never saw?

    python benchmarks/tuned.py -o benchmarks/results/tuned.json

What a user would run, on the bundled model: calibrate, tune for a budget of lost answers,
then let vLLM write the answers to other prompts under stock and under the policy in the table, at
every batch size that was tuned for. The tuner is told of an H100 and of experts as large as
Qwen3-30B-A3B's, so that there is speed to be gained; the answers are the bundled model's own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from sere import demo_model
from sere.demo_model.tasks import examples
from sere.files import check_writable
from sere.results import provenance
from sere.table import Table
from sere.tuning.budget import Budget

BATCHES = (1, 8, 32)
TUNED_ON = 2048  # prompts, of seed 0
UNSEEN = 900  # the seed of those that are decoded


def sere(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "sere", *arguments], check=True)


def unseen(prompts: int) -> list[dict[str, str]]:
    """Held-out tasks, none of them twice, that the tuner has not seen."""
    seen = {task.prompt for task in examples(TUNED_ON, seed=0, split="held_out")}
    drawn = examples(2 * prompts, seed=UNSEEN, split="held_out")
    fresh = {task.prompt: task.answer for task in drawn if task.prompt not in seen}
    return [{"prompt": p, "answer": a} for p, a in list(fresh.items())[:prompts]]


def measured(folder: Path, table: Path, batch: int, prompts: int) -> dict[str, Any]:
    """What the engine wrote under stock and under the table's policy."""
    policy = Table.load(table).policy
    if policy is None:
        raise SystemExit("the tuner found nothing that keeps the budget and saves time")
    output = folder / f"{batch}.json"
    flags = ["--engine", "--dtype", "float32", "--batch", str(batch), "--length", "48"]
    flags += ["--samples", str(prompts), "--policy", policy.to_json()]
    flags += ["--data", str(folder / "unseen.jsonl")]
    sere("evaluate", demo_model.NAME, str(table), *flags, "-o", str(output))
    stock, tuned = json.loads(output.read_text())["arms"]
    return {"batch": batch, "prompts": prompts, "stock": stock, "tuned": tuned}


def lost(found: dict[str, Any], budget: Budget) -> tuple[float, float]:
    """(loss, upper end of its interval) as the tuner reckons them: of the answers that stock gets
    right; net where the engine's result does not tell them apart."""
    prompts, figures = found["prompts"], found["tuned"]
    right = round(found["stock"]["exact_match"][0] * prompts)
    gross = figures.get("answers_lost_gross", figures["answers_lost"])
    loss, error = (figure * prompts / max(right, 1) for figure in gross)
    return loss, budget.upper(loss, error, -(-prompts // found["batch"]), right)


def as_text(result: dict[str, Any]) -> str:
    """A row for each batch size."""
    budget = Budget("exact_match", result["budget"])
    rows = []
    for found in result["engine"]:
        loss, upper = lost(found, budget)
        rows.append(
            [
                str(found["batch"]),
                f"{found['tuned']['active'][0]:.1f}",
                f"{found['stock']['exact_match'][0]:.2%}",
                f"{found['tuned']['exact_match'][0]:.2%}",
                f"{loss:.2%} (< {upper:.2%})",
                f"{found['tuned']['same_as_stock'][0]:.2%}",
                "yes" if found["kept"] else "NO",
            ]
        )
    head = ["batch", "active experts", "right, stock", "right, tuned", "answers lost"]
    return provenance.text_table([*head, "same as stock", "kept"], rows)


def main() -> None:
    """Tune, then measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", default="tuned.json")
    parser.add_argument("--budget", type=float, default=0.005, help="share of answers lost")
    parser.add_argument("--prompts", type=int, default=1024)
    arguments = parser.parse_args()
    check_writable(arguments.output)
    budget = Budget.parse(f"exact_match={arguments.budget}")
    with tempfile.TemporaryDirectory() as name:
        folder, table = Path(name), Path(name) / "sere.table"
        sere("calibrate", demo_model.NAME, "-o", str(table))
        lines = [json.dumps(pair) + "\n" for pair in unseen(arguments.prompts)]
        (folder / "unseen.jsonl").write_text("".join(lines))
        flags = ["--budget", f"{budget.name}={budget.limit}", "--samples", str(TUNED_ON)]
        flags += ["--expert-mb", "9.4"]
        flags += [word for batch in BATCHES for word in ("--batch", str(batch))]
        sere("tune", demo_model.NAME, str(table), *flags, "-o", str(folder / "tuning.json"))
        tuning = json.loads((folder / "tuning.json").read_text())
        engine = [measured(folder, table, batch, arguments.prompts) for batch in BATCHES]
    for found in engine:
        found["kept"] = lost(found, budget)[1] <= budget.limit
    result = {
        "provenance": provenance.provenance(),
        "budget": budget.limit,
        "tuning": tuning,
        "engine": engine,
    }
    provenance.save_json(arguments.output, result)
    print(as_text(result))


if __name__ == "__main__":
    main()
