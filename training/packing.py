"""Pack short examples into fixed rows, so that hardly any padding is computed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from sere.demo_model.tasks import FAMILIES, examples

MEAN_EXAMPLE_LENGTH = 27.2
FILL = 0.95
"""How full to aim to fill the rows; examples that then find no room are dropped."""


@dataclass(frozen=True)
class Batch:
    """Rows of token ids, each holding several examples that must not see one another."""

    input_ids: Tensor
    position_ids: Tensor
    example_ids: Tensor  # -1 where the row is padding
    is_answer: Tensor  # the token is part of an answer, or its end-of-text
    families: Tensor  # family index by example id

    @property
    def attention_mask(self) -> Tensor:
        """Causal, and within one example only (padding sees padding, to keep softmax finite)."""
        same = self.example_ids[:, None, :, None] == self.example_ids[:, None, None, :]
        return same.tril()

    def share(self, rank: int, ranks: int) -> Batch:
        """The rows that one of several processes works on."""
        mine = slice(rank, None, ranks)
        return Batch(
            self.input_ids[mine],
            self.position_ids[mine],
            self.example_ids[mine],
            self.is_answer[mine],
            self.families,
        )


def packed_batch(
    tokenizer: PreTrainedTokenizerFast, rows: int, row_length: int, *, seed: int
) -> Batch:
    """Draw training examples and pack them, longest first, each into the fullest row it fits."""
    drawn = examples(int(FILL * rows * row_length / MEAN_EXAMPLE_LENGTH), seed=seed)
    ids = tokenizer([example.prompt + example.answer for example in drawn]).input_ids
    input_ids = torch.full((rows, row_length), tokenizer.pad_token_id)
    position_ids = torch.zeros((rows, row_length), dtype=torch.long)
    example_ids = torch.full((rows, row_length), -1)
    is_answer = torch.zeros((rows, row_length), dtype=torch.bool)
    used = [0] * rows
    for i in sorted(range(len(drawn)), key=lambda i: -len(ids[i])):
        length = len(ids[i]) + 1
        roomy = (row for row in range(rows) if used[row] + length <= row_length)
        row = max(roomy, key=used.__getitem__, default=None)
        if row is None:
            continue
        part = slice(used[row], used[row] + length)
        input_ids[row, part] = torch.tensor([*ids[i], tokenizer.eos_token_id])
        position_ids[row, part] = torch.arange(length)
        example_ids[row, part] = i
        is_answer[row, part.start + len(drawn[i].prompt) : part.stop] = True
        used[row] += length
    families = torch.tensor([FAMILIES.index(example.family) for example in drawn])
    return Batch(input_ids, position_ids, example_ids, is_answer, families)
