"""What other rooms use of a model that is trained or scored."""

from typing import Protocol

from transformers import PreTrainedTokenizerBase


class TokenizedModel(Protocol):
    """A model as a data module sees it: how it reads text, known without its weights."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, a fast one."""

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether prompt and answer are sequences of their own (T5)."""

    @property
    def context_length(self) -> int | None:
        """Number of positions that the model knows; None if there is no limit."""
