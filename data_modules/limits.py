"""Refuse sizes out of range, and rows that a model has no positions or no embeddings for."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from app.evaluation.benchmark import PreparedBenchmark
from app.models.loading import empty_model
from app.models.packing import packing_obstacle
from app.models.protocols import TokenizedModel
from app.models.text_limits import context_length, has_position_table, num_embeddings
from app.utils.errors import InputError
from data_modules.rows import EncodedRow

MOST_WORKERS = 1024
Rows = Mapping[str, Sequence[EncodedRow]]
"""The rows of each set, by its name."""


def check_sizes(settings: Mapping[str, Any]) -> None:
    """Raise InputError for a setting of a data module's batches that is out of range."""
    for name in ("max_length", "batch_size", "eval_batch_size", "num_workers"):
        least = int(name != "num_workers")
        if settings[name] < least:
            raise InputError(f"--data.{name}={settings[name]}: expected at least {least}")
    if settings["num_workers"] > MOST_WORKERS:  # each is a process
        raise InputError(
            f"--data.num_workers={settings['num_workers']}: expected at most {MOST_WORKERS}"
        )


def check_max_length(max_length: int, model: TokenizedModel) -> None:
    """Raise InputError if rows may be longer than a model's table of positions."""
    context = context_length(model.config)
    if context is None or max_length <= context or not _has_table(model):
        return
    raise InputError(
        f"--data.max_length={max_length}, but model.name has {context} positions and no more: expected at "
        f"most {context}; set --data.max_length={context}"
    )


def check_packing(model: TokenizedModel) -> None:
    """Raise InputError if packed examples would see each other."""
    obstacle = packing_obstacle(
        empty_model(model.source, attn_implementation=model.attn_implementation)
    )
    if obstacle is not None:
        raise InputError(
            f"--data.packing=true, but model.name={model.source.name!r} {obstacle}: expected a causal model "
            "that keeps packed examples apart, such as Llama, Qwen3 or GPT-2; set --data.packing=false"
        )


def check_encoded(
    rows: Rows, benchmarks: Sequence[PreparedBenchmark], model: TokenizedModel
) -> None:
    """Raise InputError if a decoder has too few positions for an answer, or a token has no embedding.

    Rows that are longer than those a model without a table of positions was trained on are warned of. Tokens
    that nothing uses are let pass: the tokenizer of Gemma 3 has one for images, which its models of text alone
    have no embedding for.

    Args:
        rows: The rows of each set, by its name.
        benchmarks: Their questions and choices.
        model: Its configuration and tokenizer.
    """
    context = context_length(model.config)
    if context is not None:
        _check_lengths(rows, context, model)
    known, tokenizer = num_embeddings(model.config), model.tokenizer
    if known is None or max(tokenizer.get_vocab().values()) < known:
        return
    for ids, where in _used(rows, benchmarks, tokenizer.pad_token_id):
        if (largest := max(ids, default=0)) >= known:
            token = tokenizer.convert_ids_to_tokens(largest)
            raise InputError(
                f"{where} has the token {token!r} with the id {largest}, but the embedding of model.name has "
                f"{known} rows: expected ids up to {known - 1}; take the tokenizer as it was published, or "
                "save the model with resize_token_embeddings"
            )


def _check_lengths(rows: Rows, context: int, model: TokenizedModel) -> None:
    """Hold rows to the context; `max_length` does not limit the answers of an encoder-decoder model."""
    for name, part in rows.items():
        sides = (
            [row.prompt_ids, row.answer_ids] if model.is_encoder_decoder else [row] for row in part
        )
        lengths = [max(map(len, side)) for side in sides]
        long = [number for number, length in enumerate(lengths) if length > context]
        if long and _has_table(model):
            raise InputError(
                f"row {long[0]} of {name} has an answer of {lengths[long[0]]} tokens, but model.name has "
                f"{context} positions and no more: expected at most {context}; correct the data (--data.path)"
            )
        if long:
            rank_zero_warn(
                f"{len(long)} of {len(part)} rows of {name} are longer than the {context} positions that "
                f"model.name was trained on, the longest has {max(lengths)} tokens: expected no more; set "
                f"--data.max_length={context}"
            )


def _has_table(model: TokenizedModel) -> bool:
    return has_position_table(empty_model(model.source))


def _used(
    rows: Rows, benchmarks: Sequence[PreparedBenchmark], pad_token_id: int | None
) -> Iterator[tuple[Sequence[int], str]]:
    """Yield token ids and where they stand."""
    yield [pad_token_id or 0], "the padding of the tokenizer"
    for name, part in rows.items():
        for row in part:
            yield row.prompt_ids, f"row {row.index} of {name}"
            yield row.answer_ids, f"the answer of row {row.index} of {name}"
    for prepared in benchmarks:
        name = prepared.benchmark.name
        for ids in prepared.choice_ids:
            yield ids, f"a choice of {name}"
        for question in prepared.questions:
            yield question.prompt_ids, f"{question.question.key} of {name}"
