"""lm-evaluation-harness's transformers model, re-routed as serving would.

`generate` writes a batch step by step. A step's rows are the sequences still being written: those
that have ended are fed padding until the last one ends, and no engine would have them. Where a
task scores given answers nothing is decoded, unless their tokens are taken for decode steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sere.evaluation.arms import Arm
from sere.evaluation.decoding import Passage, Reading, Step, decoded
from sere.evaluation.evaluate import load
from sere.evaluation.quality import EvaluationError
from sere.kernels import COUNTERS, new_counters
from sere.models.moe import MoELayer, routed
from sere.policy import Policy
from sere.table import Table


class Transformers:
    """lm: the harness's model.

    score_as_decode: take the tokens of given answers for decode steps, `batch` requests together,
    in the harness's order. The last token of a prompt is then the first to be decoded, so that
    answers of one token depend on the policy too.
    """

    def __init__(
        self, folder: str, table: Table, batch: int, *, score_as_decode: bool = False
    ) -> None:
        from lm_eval.api.registry import get_model

        self.model, self._layers = load(folder)
        self._table, self._batch = table, batch
        self._arm = Arm("stock", None, table)
        self._counters = new_counters(self.model.device)
        self._running = Running(self.model)
        self.lm: Any = get_model("hf")(pretrained=self.model, tokenizer=folder, batch_size=batch)
        self._score_as_decode = score_as_decode
        if score_as_decode:
            self.lm._loglikelihood_tokens = self._scored

    @contextmanager
    def policy(self, policy: Policy | None) -> Iterator[None]:
        """Run under a policy; None is stock routing.

        Raises `EvaluationError` for one that re-routes prompts where given answers are decoded.
        """
        if policy is not None and policy.rows == "all" and self._score_as_decode:
            raise EvaluationError(
                '--score-as-decode leaves prompts alone, and a policy says "rows": "all": leave '
                "one of the two out"
            )
        self._arm = Arm("stock" if policy is None else policy.brief(), policy, self._table)
        self._counters.zero_()
        with nullcontext() if policy is None else routed(self._layers, self._changed):
            yield

    def rerouted(self) -> int:
        """Slots that were re-routed since the policy was set."""
        return int(self._counters[COUNTERS.index("slots_rerouted")])

    def _changed(
        self, layer: MoELayer, hidden: Tensor, ids: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The pass's decoded rows together, all others as they are."""
        assert isinstance(self._arm.rule, Policy)
        rows = self._running.rows(prompts=self._arm.rule.rows == "all").to(ids.device)
        if not len(rows):
            return ids, weights
        if len(hidden) != self._running.size:
            raise EvaluationError(
                f"{layer.name}: it sees {len(hidden)} rows where {self._running.size} tokens were "
                "fed: use --backend vllm for this architecture"
            )
        new_ids, new_weights = ids.clone(), weights.clone()
        new_ids[rows], new_weights[rows] = self._routed(layer, ids[rows], weights[rows])
        return new_ids, new_weights

    def _routed(self, layer: MoELayer, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        new = self._arm.route(layer, ids, weights, None, self._counters)
        return new.ids, new.weights

    def _scored(
        self,
        requests: list[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """In place of the harness's own: log-likelihood of each (_, context, continuation), and
        whether it is what greedy decoding writes."""
        found = []
        for start in tqdm(range(0, len(requests), self._batch), "score", disable=disable_tqdm):
            part = requests[start : start + self._batch]
            passages = [_passage(*request[1:], self.lm.max_length) for request in part]
            reading = Reading(passages, self._batch)
            with decoded(self._layers, reading, self._step):
                logits, _ = reading.run(self.model)
            told = torch.split(logits, [len(passage.continuation) for passage in passages])
            answers = [answer for _, _, answer in part]
            found += [
                _score(own[-len(answer) :], answer)
                for own, answer in zip(told, answers, strict=True)
            ]
        return found

    def _step(self, layer: MoELayer, step: Step) -> tuple[Tensor, Tensor]:
        return self._routed(layer, step.ids, step.weights)


def _passage(context: list[int], continuation: list[int], longest: int) -> Passage:
    """Cut on the left like the harness's; decoded from the token that foretells the answer."""
    tokens = (context + continuation)[-(longest + 1) :]
    return Passage(tokens, max(len(tokens) - len(continuation) - 1, 1))


def _score(logits: Tensor, answer: list[int]) -> tuple[float, bool]:
    """logits: [n, vocabulary], those that foretell each of the answer's n tokens."""
    wanted = torch.tensor(answer, device=logits.device)
    told = logits.log_softmax(-1).gather(1, wanted[:, None]).sum()
    return told.item(), torch.equal(logits.argmax(-1), wanted)


class Running:
    """Which rows of a transformers model's forward pass belong to sequences still being written.

    size: rows of the pass. Watches forward passes, and `generate`: there the harness's own criteria
    tell which sequences have come to a stop string. Such a sequence ends, as it does in an engine,
    and no longer runs on until all have found one.
    """

    def __init__(self, model: Any) -> None:
        self.size = 0
        self._rows = torch.zeros(0, dtype=torch.long)
        self._alive: Tensor | None = None  # [B], in decode steps
        self._generate = model.generate
        self._ends = model.generation_config
        model.generate = self._watched
        model.register_forward_pre_hook(self._note, with_kwargs=True)

    def rows(self, *, prompts: bool) -> Tensor:
        """[n] indices of the rows that are decoded; with `prompts` also those of prompts."""
        return self._rows if prompts or self._alive is not None else self._rows[:0]

    def _note(self, _module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        ids: Tensor = named["input_ids"] if "input_ids" in named else given[0]
        mask = named.get("attention_mask")  # [B, past + S]: padding on the left is no row
        real = torch.ones_like(ids).bool()
        if isinstance(mask, Tensor) and mask.ndim == 2:
            real = mask[:, -ids.shape[1] :].bool()
        if self._alive is not None:
            real = real & self._alive[:, None]
        self.size, self._rows = ids.numel(), real.flatten().nonzero().flatten()

    def _watched(self, *given: Any, stopping_criteria: Any = None, **named: Any) -> Any:
        from transformers import StoppingCriteriaList

        own = list(stopping_criteria or [])
        prompt: Tensor = given[0] if given else named["input_ids"]
        ends = torch.tensor(_as_list(named.get("eos_token_id", self._ends.eos_token_id)))

        def finished(written: Tensor, _scores: Any, **_: Any) -> Tensor:
            done = torch.isin(written[:, prompt.shape[1] :], ends.to(written)).any(1)
            for stop in own:
                if len(told := getattr(stop, "done_tracker", [])) == len(done):
                    done |= torch.tensor(told, device=done.device)
            self._alive = ~done
            return done

        try:
            criteria = StoppingCriteriaList([*own, finished])
            return self._generate(*given, stopping_criteria=criteria, **named)
        finally:
            self._alive = None


def _as_list(ids: Any) -> list[int]:
    return [] if ids is None else list(ids) if isinstance(ids, list | tuple) else [int(ids)]
