"""Compute the training loss: only supervised positions reach the LM head, so many at a time."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from app.models.batch import IGNORED_LABEL, Batch
from app.models.chunked_loss import ChunkedLoss, LogitsTail

Weighting = Literal["tokens", "rows"]
"""What counts alike in a mean loss: each supervised token, or each row, with the mean over its own tokens."""


class SupervisedLogits(NamedTuple):
    """The LM head's output at the supervised positions of a batch, in row-major order."""

    logits: Tensor  # (S, vocabulary), in the model's dtype
    labels: Tensor  # (S,) the token each position should predict
    first: Tensor  # (B,) row of `logits` at which each example's answer begins
    rows: Tensor  # (S,) number of the example that each position belongs to, ascending


@contextmanager
def select_positions_for_lm_head(
    head: nn.Module, chosen: Tensor, see: Callable[[Tensor], Tensor] = lambda hidden: hidden
) -> Iterator[None]:
    """Let only the chosen (B, T) positions of the hidden states into the LM head, in row-major order.

    Args:
        head: The LM head.
        chosen: (B, T) which positions.
        see: From the hidden states (S, n) of the chosen positions to those that the head is given.
    """

    def select(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (see(args[0][chosen]).unsqueeze(0), *args[1:])

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


def _inputs_and_wanted(base: PreTrainedModel, batch: Batch) -> tuple[dict[str, Any], Tensor]:
    """Return what the model is called with, and the token (B, T) that each position should predict."""
    if "position_ids" in batch and "flash" in str(base.config._attn_implementation):
        # It tells packed examples apart in one row only, where none is padded to the longest.
        batch = {k: v.view(1, -1) if v.ndim == 2 else v for k, v in batch.items()}
    labels = batch["labels"]
    names = ("input_ids", "attention_mask", "position_ids")
    inputs = {name: batch[name] for name in names if name in batch}
    if base.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = base.prepare_decoder_input_ids_from_labels(labels)  # type: ignore
        return inputs, labels
    wanted = torch.full_like(labels, IGNORED_LABEL)
    wanted[:, :-1] = labels[:, 1:]
    return inputs, wanted


def _rows_of(chosen: Tensor, inputs: dict[str, Any]) -> Tensor:
    """Return the number of the example that each chosen (B, T) position belongs to, ascending."""
    if "position_ids" in inputs:  # each of the packed examples begins at 0
        numbers = (inputs["position_ids"] == 0).flatten().cumsum(0).view_as(chosen)
    else:
        numbers = torch.arange(len(chosen), device=chosen.device)[:, None].expand_as(chosen)
    return numbers[chosen]


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
    inputs, wanted = _inputs_and_wanted(base, batch)
    chosen = wanted != IGNORED_LABEL
    with select_positions_for_lm_head(base.get_output_embeddings(), chosen):  # type: ignore[arg-type]
        logits = model(**inputs, use_cache=False).logits[0]
    per_row = chosen.sum(dim=1)
    first = per_row.cumsum(0) - per_row
    return SupervisedLogits(logits, wanted[chosen], first, _rows_of(chosen, inputs))


def label_logits(supervised: SupervisedLogits, label_token_ids: Tensor, rows: Tensor) -> Tensor:
    """Return the logits (R, C) of the label words, by their first tokens, where the answers of rows begin.

    Args:
        supervised: Of a batch of B rows.
        label_token_ids: (C,) the first token of each class's word.
        rows: (B,) bool, which rows: R of them. Not those without a supervised token.
    """
    return supervised.logits[supervised.first[rows]][:, label_token_ids]


def row_weights(rows: Tensor) -> tuple[Tensor, int]:
    """Return the weight of each supervised token in the sum of the rows' means, and the number of rows.

        w_s = 1 / (supervised tokens of the row of s)

    Args:
        rows: (S,) number of the row that each token belongs to, ascending.

    Returns:
        (S,) float32, and how many rows have supervised tokens.
    """
    _, place, tokens = rows.unique_consecutive(return_inverse=True, return_counts=True)
    return 1 / tokens[place], len(tokens)


def summed_loss(supervised: SupervisedLogits, weighting: Weighting = "tokens") -> Tensor:
    """Sum the cross-entropy over supervised tokens, or its means over the tokens of each row, in float32.

    Divide by the number of supervised tokens, or of rows (of the batch, or of a whole set), for the mean.
    """
    logits = supervised.logits.float()
    if weighting == "tokens":
        return nn.functional.cross_entropy(logits, supervised.labels, reduction="sum")
    weights, _ = row_weights(supervised.rows)
    return weights @ nn.functional.cross_entropy(logits, supervised.labels, reduction="none")


def supervised_loss(
    model: nn.Module, base: PreTrainedModel, batch: Batch, weighting: Weighting = "tokens"
) -> tuple[Tensor, int]:
    """Run the model and return `summed_loss` and what to divide it by, without the (S, vocabulary) logits.

    The model runs with no position for its head; then the head, and what the architecture does with logits,
    are given the supervised positions in chunks. Each chunk's gradient follows at once, so that neither logits
    nor their gradient exist for more than a chunk.

    Args:
        model: As for `supervised_logits`.
        base: As for `supervised_logits`.
        batch: As for `supervised_logits`.
        weighting: What counts alike in the mean. A packed example is a row.
    """
    inputs, wanted = _inputs_and_wanted(base, batch)
    chosen = wanted != IGNORED_LABEL
    labels = wanted[chosen]
    weights, number = None, len(labels)
    if weighting == "rows":
        weights, number = row_weights(_rows_of(chosen, inputs))
    head: nn.Module = base.get_output_embeddings()  # type: ignore[assignment]
    tail = LogitsTail()
    seen: list[Tensor] = []

    def no_rows(hidden: Tensor) -> Tensor:
        seen.append(hidden)
        return hidden[:0]

    def record(module: nn.Module, args: Any, logits: Tensor) -> None:
        tail.value = logits
        stack.enter_context(tail)

    def loss(module: nn.Module, args: Any, output: Any) -> Tensor:
        stack.close()
        tail.check(output.logits)
        trained = [p for p in head.parameters() if p.requires_grad]
        options = (head, tail, output.logits.shape[-1], labels, weights)
        return ChunkedLoss.apply(*options, *seen, *trained)  # type: ignore[no-any-return]

    with ExitStack() as stack:
        stack.enter_context(select_positions_for_lm_head(head, chosen, no_rows))
        stack.callback(head.register_forward_hook(record).remove)
        # Ahead of FSDP2's hook, which frees the head's gathered weights.
        stack.callback(model.register_forward_hook(loss, prepend=True).remove)
        return model(**inputs, use_cache=False), number
