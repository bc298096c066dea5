"""What other rooms use of a model that is trained or scored."""

from typing import Protocol

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from app.models.batch import Batch
from app.models.loss import SupervisedLogits
from app.models.source import ModelSource


class TokenizedModel(Protocol):
    """A model as a data module sees it: how it reads text, known without its weights.

    Attributes:
        attn_implementation: Attention kernel, in transformers' names; None lets transformers choose.
    """

    attn_implementation: str | None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, a fast one."""

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether prompt and answer are sequences of their own (T5)."""

    @property
    def config(self) -> PreTrainedConfig:
        """The model's configuration."""

    @property
    def source(self) -> ModelSource:
        """Where the model comes from."""


class ScoredModel(TokenizedModel, Protocol):
    """A model as scoring sees it, in evaluation mode.

    Attributes:
        model: What is called: the PEFT model, or the transformers model without an adapter.
    """

    model: nn.Module

    @property
    def base(self) -> PreTrainedModel:
        """The transformers model inside."""

    @property
    def device(self) -> torch.device:
        """Where batches are."""

    def supervised_logits(self, batch: Batch) -> SupervisedLogits:
        """Run the model on a batch; see `app.models.loss.supervised_logits`."""
