"""What an engine said, judged by transformers and the evaluation's own arithmetic."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sere import demo_model
from sere.evaluation.arms import parse_arm
from sere.evaluation.decoding import Passage, Reading, decoded
from sere.models.adapters import Changed
from sere.models.loading import load_model, load_tokenizer
from sere.models.moe import MoELayer, moe_layers, routed
from sere.table import Table


def check_answers(run: list[Any], prompts: Sequence[str], table: Path, policy: Any) -> None:
    """Of the bundled model in float32, its requests decoded together from the first token on.

    run: what `generate` of `tests/engine_script.py` gave. policy: what the engine followed.
    """
    tokenizer, model = load_tokenizer(str(demo_model.PATH)), load_model(str(demo_model.PATH))
    arm = parse_arm(json.dumps(policy), Table.load(table))
    prompt_ids = [tokenizer(p, add_special_tokens=False)["input_ids"] for p in prompts]
    passages = [
        Passage(ids + written, len(ids)) for ids, (written, _) in zip(prompt_ids, run, strict=True)
    ]
    reading = Reading(passages, len(passages))
    with decoded(
        moe_layers(model),
        reading,
        lambda layer, step: arm.route(layer, step.ids, step.weights, None, hidden=step.hidden),
    ):
        logits, _ = reading.run(model.float())
    _compare([best for _, logprobs in run for best in logprobs], logits)


def check_prompt(run: list[Any], prompt: str, table: Path, policy: Any) -> None:
    """Of one request alone, whose prompt's rows were re-routed together, the first token.

    run, policy: as in `check_answers`, but for `"rows": "all"`, which the policy says here not.
    """
    tokenizer, model = load_tokenizer(str(demo_model.PATH)), load_model(str(demo_model.PATH))
    arm = parse_arm(json.dumps(policy), Table.load(table))
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]

    def change(layer: MoELayer, hidden: Tensor, ids: Tensor, weights: Tensor) -> Changed:
        return arm.route(layer, ids, weights, None, hidden=hidden)

    with torch.no_grad(), routed(moe_layers(model), change):
        logits = model.float()(input_ids=ids).logits[0, -1:]
    ((_, said),) = run
    _compare(said, logits)


def _compare(said: list[dict[str, float]], logits: Tensor) -> None:
    """said: the best tokens' logprobs. logits: [n, vocabulary]."""
    for wanted, best in zip(logits.log_softmax(-1), said, strict=True):
        found = torch.tensor(list(best.values()))
        torch.testing.assert_close(
            found, wanted[[int(token) for token in best]], atol=2e-3, rtol=1e-3
        )
