"""What batched decoding would compute, from one teacher-forced pass.

Decode step j of a batch feeds token j of every continuation that is long enough; those rows decide
together which experts are loaded. All tokens being known, one forward pass over whole passages can
compute every step at once: at each MoE layer its rows are taken apart by step, and the operator
that serving runs sees one step after the other. The result equals token-by-token decoding with a
cache (tested), and no engine is needed. Prompts keep their routing, as in serving.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sere.evaluation.routers import RouterOutput as RouterOutput
from sere.evaluation.routers import router_logits as router_logits
from sere.models.adapters import Changed
from sere.models.fit import check_vocabulary
from sere.models.moe import MoELayer, routed


@dataclass(frozen=True)
class Passage:
    """A prompt and its continuation; start: index of the continuation's first token, >= 1."""

    tokens: list[int]
    start: int

    @property
    def continuation(self) -> list[int]:
        return self.tokens[self.start :]


class Reading:
    """Passages as one right-padded forward pass, decoded in batches of `batch`.

    rows: [n], the rows (of passages x positions, flattened) that are decoded, step after step.
    sizes: how many rows each step has. batch_of: the batch of each step. prompts: the rows of the
    prompts; what is neither of the two is padding. made: the rows whose logits say a continuation's
    tokens, passage after passage: the prompt's last, then those that are decoded.
    """

    def __init__(self, passages: Sequence[Passage], batch: int) -> None:
        length = max(len(passage.tokens) for passage in passages)
        self.ids = torch.zeros(len(passages), length, dtype=torch.long)
        self.mask = torch.zeros_like(self.ids)
        steps: dict[tuple[int, int], list[int]] = {}
        prompts: list[int] = []
        made: list[int] = []
        for i, passage in enumerate(passages):
            self.ids[i, : len(passage.tokens)] = torch.tensor(passage.tokens)
            self.mask[i, : len(passage.tokens)] = 1
            first, end = i * length + passage.start, i * length + len(passage.tokens)
            prompts.extend(range(i * length, first))
            made.extend(range(first - 1, end - 1))
            for j in range(len(passage.continuation) - 1):  # the last token is never fed
                steps.setdefault((i // batch, j), []).append(first + j)
        self.rows = torch.tensor([row for step in steps.values() for row in step])
        self.prompts, self.made = torch.tensor(prompts), torch.tensor(made)
        self.sizes = [len(step) for step in steps.values()]
        self.batch_of = [number for number, _ in steps]

    def run(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        """One forward pass: logits [made, vocabulary] float32, and what the output matrix is given
        of the prompts [prompts, H].

        No other row meets the output matrix: at 150,000 tokens a row's logits are 0.6 MB.
        """
        device = next(model.parameters()).device
        check_vocabulary(model, int(self.ids.max()))
        given: list[Tensor] = []

        def narrow(_module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor] | None:
            if _RUNNING.get() is not self:  # other passes may be under way, side by side
                return None
            hidden = arguments[0].flatten(0, -2)
            given.append(hidden[self.prompts.to(hidden.device)])
            return (hidden[self.made.to(hidden.device)][None],)

        handle = output_matrix(model).register_forward_pre_hook(narrow)
        token = _RUNNING.set(self)
        try:
            with torch.no_grad():
                output = model(
                    input_ids=self.ids.to(device),
                    attention_mask=self.mask.to(device),
                    use_cache=False,
                )
        finally:
            _RUNNING.reset(token)
            handle.remove()
        return output.logits[0].float(), given[0]


_RUNNING: ContextVar[Reading | None] = ContextVar("running", default=None)


def running() -> Reading | None:
    """Whose forward pass this is."""
    return _RUNNING.get()


def output_matrix(model: Any) -> nn.Module:
    """The module that makes logits [n, vocabulary] of the last hidden states [n, H].

    Raises `ValueError` for a model without one.
    """
    found: nn.Module | None = model.get_output_embeddings()
    if found is None:
        raise ValueError(
            f"{type(model).__name__} has no output matrix: only a model that predicts the next "
            "token can be evaluated"
        )
    return found


@dataclass(frozen=True)
class Step:
    """One decode step at one layer.

    number: of the step. rows: [n], its rows of the forward pass. hidden: [n, H], what the experts
    get. ids, weights: [n, K], the router's choice.
    """

    number: int
    rows: Tensor
    hidden: Tensor
    ids: Tensor
    weights: Tensor


Route = Callable[[MoELayer, Step], tuple[Tensor, Tensor] | Changed]


@contextmanager
def decoded(layers: list[MoELayer], reading: Reading, route: Route) -> Iterator[None]:
    """Run forward passes over `reading` with `route(layer, step)` deciding every decode step's ids
    and weights [n, K], and what is added to the mixture.

    Rows of prompts run apart from all others, so that not even a rounding of theirs depends on how
    those are routed.
    """

    def change(layer: MoELayer, hidden: Tensor, ids: Tensor, weights: Tensor) -> Changed:
        if len(hidden) != reading.ids.numel():
            raise RuntimeError(
                f"{layer.name}: it sees {len(hidden)} rows where {reading.ids.numel()} tokens were "
                "fed: this architecture cannot be evaluated in one pass"
            )
        new_ids, new_weights, added = ids.clone(), weights.clone(), None
        for number, rows in enumerate(torch.split(reading.rows.to(ids.device), reading.sizes)):
            step = Step(number, rows, hidden[rows], ids[rows], weights[rows])
            new_ids[rows], new_weights[rows], more, _ = Changed(*route(layer, step))
            if more is not None:
                added = hidden.new_zeros(hidden.shape, dtype=more.dtype) if added is None else added
                added[rows] = more
        return Changed(new_ids, new_weights, added)

    with routed(layers, change, apart=reading.prompts):
        yield
