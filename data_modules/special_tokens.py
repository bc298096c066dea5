"""Find the characters of special tokens in text, where they are no tokens."""

import re

from transformers import PreTrainedTokenizerBase


def special_token_pattern(tokenizer: PreTrainedTokenizerBase) -> "re.Pattern[str]":
    """Return what matches the characters of each special token of a tokenizer, the longest first."""
    marks = tokenizer.added_tokens_decoder.values()
    words = sorted({mark.content for mark in marks if mark.special}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, words)) or "$^")
