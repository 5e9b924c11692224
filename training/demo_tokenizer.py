"""The demo model's tokenizer: one token per character."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sere.demo_model.tasks import ALPHABET, END_OF_TEXT

PAD = "<|pad|>"
UNKNOWN = "<|unk|>"


def build_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    """Build it; nothing is learned, so it is the same every time."""
    vocabulary = {token: i for i, token in enumerate([PAD, END_OF_TEXT, UNKNOWN, *ALPHABET])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    # A plain "." would not match a newline.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    # Without a decoder, tokens would be joined by spaces.
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        unk_token=UNKNOWN,
        model_max_length=max_length,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
