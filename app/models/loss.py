"""Compute the training loss: only supervised positions reach the LM head."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from app.models.batch import IGNORED_LABEL, Batch


class SupervisedLogits(NamedTuple):
    """The LM head's output at the supervised positions of a batch, in row-major order."""

    logits: Tensor  # (S, vocabulary), in the model's dtype
    labels: Tensor  # (S,) the token each position should predict
    first: Tensor  # (B,) row of `logits` at which each example's answer begins


@contextmanager
def select_positions_for_lm_head(head: nn.Module, chosen: Tensor) -> Iterator[None]:
    """Let only the chosen (B, T) positions of the hidden states into the LM head, in row-major order."""

    def select(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0][chosen].unsqueeze(0), *args[1:])

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


def supervised_logits(model: nn.Module, base: PreTrainedModel, batch: Batch) -> SupervisedLogits:
    """Run the model and return the logits at the supervised positions alone.

    The hidden states are selected before the LM head, so that whatever the architecture does
    with logits (scaling, soft-capping) still happens, and the (B, T, vocabulary) tensor never exists.

    Args:
        model: What is called: the model itself or a wrapper around it.
        base: The transformers model inside, for its head and its kind.
        batch: See `Batch`. A causal model predicts labels[:, t + 1] at t; a sequence-to-sequence
            model's decoder predicts labels[:, t] at t.
    """
    if "position_ids" in batch and "flash" in str(base.config._attn_implementation):
        # It tells packed examples apart in one row only, where none is padded to the longest.
        batch = {k: v.view(1, -1) if v.ndim == 2 else v for k, v in batch.items()}
    labels = batch["labels"]
    names = ("input_ids", "attention_mask", "position_ids")
    inputs = {name: batch[name] for name in names if name in batch}
    if base.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = base.prepare_decoder_input_ids_from_labels(labels)  # type: ignore
        wanted = labels
    else:
        wanted = torch.full_like(labels, IGNORED_LABEL)
        wanted[:, :-1] = labels[:, 1:]
    chosen = wanted != IGNORED_LABEL
    with select_positions_for_lm_head(base.get_output_embeddings(), chosen):  # type: ignore[arg-type]
        logits = model(**inputs, use_cache=False).logits[0]
    per_row = chosen.sum(dim=1)
    return SupervisedLogits(logits, wanted[chosen], per_row.cumsum(0) - per_row)


def summed_loss(supervised: SupervisedLogits) -> Tensor:
    """Sum the cross-entropy over supervised tokens, in float32.

    Divide by the number of supervised tokens (of the batch, or of a whole set) for the token mean.
    """
    logits = supervised.logits.float()
    return nn.functional.cross_entropy(logits, supervised.labels, reduction="sum")
