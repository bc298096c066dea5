"""Rows of prompts and free answers: which are taken, which validate and which are tested."""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from app.utils.errors import InputError
from data_modules.encoding import chunks
from data_modules.row_checks import SPLITS, rows_of_examples
from data_modules.rows import EncodedRow, TextRow
from data_modules.sampling import split_off
from data_modules.text import TextDataModule
from data_modules.token_cache import cached


class GenerativeDataModule(TextDataModule):
    """Train on prompts and free answers, of which only the loss is scored; benchmarks score the rest.

    Rows are taken in the order of the file. An empty answer, and a row of more than `max_length` tokens, is
    dropped and counted: cutting would lose the end of a question or of an answer.

    Args:
        path: Local file; null takes the published rows.
        max_length: Most tokens of prompt and answer with EOS; a longer row is dropped.
        keep_below: Drop rows of so many tokens or more, counted as the authors do: the text of prompt, space
            and answer in the model's tokens, with BOS and without EOS, whatever the chat template; null
            keeps all.
        max_rows: Train on the first so many rows that are left; null takes all.
        completion_only_loss: Learn the answers alone; false learns the prompts, too (TRL's name).
        validation_size: Rows that validate: those that follow the training rows, or, where too few follow,
            rows drawn from them, the same for every seed; 0 trains without validation.
        test_size: Rows that are tested by their loss, found likewise behind those that validate; 0 for none.
        **options: See `TextDataModule`.
    """

    def __init__(
        self,
        path: str | None = None,
        max_length: int = 1024,
        keep_below: int | None = None,
        max_rows: int | None = None,
        validation_size: int = 1000,
        test_size: int = 0,
        completion_only_loss: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(
            path=path, max_length=max_length, validation_size=validation_size, **options
        )
        for name, value in (("keep_below", keep_below), ("max_rows", max_rows)):
            if value is not None and value < 1:
                raise InputError(f"--data.{name}={value}: expected at least 1, or null for all")
        for name, value in (("validation_size", validation_size), ("test_size", test_size)):
            if value < 0:
                raise InputError(f"--data.{name}={value}: expected at least 0")
        self.keep_below = keep_below
        self.max_rows = max_rows
        self.test_size = test_size
        self.splits = SPLITS if test_size else ("train", "validation")
        self.completion_only_loss = completion_only_loss
        self._candidates: list[TextRow] = []
        self._tokens: dict[TextRow, EncodedRow] = {}

    def examples(self) -> Iterator[tuple[str, str]]:
        """Yield prompt and answer of each row, in the order of the file; each source writes this."""
        raise NotImplementedError

    def candidates(self) -> list[TextRow]:
        """Return a row of each example; a source of conversations writes this."""
        return rows_of_examples(self.examples(), self.task_name)

    def read(self) -> None:
        """Read the rows that have an answer; which of them are short enough depends on the tokenizer."""
        if not self._candidates:
            rows = self.candidates()
            self._candidates = [row for row in rows if row.answer.strip()]
            self.dropped_rows["empty_answer"] = len(rows) - len(self._candidates)
            if not self._candidates:
                raise InputError(
                    f"{self.source} has no row of {self.task_name} with an answer: change --data.path"
                )

    def load(self) -> dict[str, list[TextRow]]:
        """Return the rows by their use; the model's tokenizer decides which are too long."""
        self.read()
        kept = self._short_enough()
        rows = {"train": kept[: self.max_rows]}
        following = kept[len(rows["train"]) :]
        for split in self.splits[1:]:
            name = f"{split}_size"
            size = getattr(self, name) or 0
            if size <= len(following):
                rows[split], following = following[:size], following[size:]
            else:
                rows["train"], rows[split] = split_off(rows["train"], size, f"data.{name}")
        return rows

    @property
    def held_out(self) -> int:
        """How many rows validate or are tested."""
        return (self.validation_size or 0) + self.test_size

    def _short_enough(self) -> list[TextRow]:
        """Return the rows that are short enough, up to those needed, and keep their tokens."""
        limits = (self.max_length, self.keep_below, self.max_rows, self.held_out)
        identity = partial(self.encoder.identity, *limits)
        encoded, num_read = cached(self._candidates, identity, self._encode_candidates)
        kept = [self._candidates[row.index] for row in encoded]
        self._tokens = dict(zip(kept, encoded, strict=True))
        self.dropped_rows["too_long"] = num_read - len(kept)
        settings = f"--data.max_length={self.max_length}"
        if self.keep_below is not None:
            settings += f" or --data.keep_below={self.keep_below}"
        if not kept:
            raise InputError(f"no row of {self.task_name} is as short as {settings} asks: raise it")
        dropped = [f"{count:,} {why}" for why, count in self.dropped_rows.items() if count]
        if dropped:
            rank_zero_info(
                f"rows of {self.task_name} that are left out: {', '.join(dropped)} ({settings})"
            )
        return kept

    def _encode_candidates(self) -> tuple[list[EncodedRow], int]:
        """Return the rows that are short enough, numbered as candidates, and how many were read for them."""
        rows, num_read = self._candidates, 0
        kept: list[EncodedRow] = []
        needed = len(rows) if self.max_rows is None else self.max_rows + self.held_out
        for start, chunk in chunks(rows, self.task_name):
            part = list(enumerate(chunk, start))
            num_read += len(part)
            if self.keep_below is not None:
                texts = [f"{row.prompt} {row.answer}" for _, row in part]
                lengths = map(len, self.encoder.tokenizer(texts)["input_ids"])
                below = zip(part, lengths, strict=True)
                part = [numbered for numbered, length in below if length < self.keep_below]
            texts_of = [row for _, row in part]
            for tokens in self.encode(texts_of):
                kept.append(dataclasses.replace(tokens, index=part[tokens.index][0]))
            if len(kept) >= needed:
                break
        return kept, num_read

    def encode(self, rows: Sequence[TextRow]) -> list[EncodedRow]:
        """Return the rows of at most `max_length` tokens as token ids, numbered as they stand in `rows`."""
        return self.encoder.rows(rows, self.max_length, self.task_name, "drop")[0]

    def encoded(self, split: str) -> list[EncodedRow]:
        """Return the rows of a split as token ids; none is cut."""
        if split not in self._encoded:
            rows = [self._tokens[row] for row in self.rows(split)]
            if not self.completion_only_loss:
                rows = [self._learning_prompt(row) for row in rows]
            numbered = enumerate(rows)
            self._encoded[split] = [dataclasses.replace(row, index=i) for i, row in numbered]
            self.cut_prompts[split] = 0
        return self._encoded[split]

    def _learning_prompt(self, row: EncodedRow) -> EncodedRow:
        """Supervise all tokens of a row but the first, which nothing predicts."""
        if self.encoder.is_encoder_decoder:
            raise InputError(
                "--data.completion_only_loss=false, but model.name is a sequence-to-sequence model, whose "
                "decoder writes no prompt: set it to true"
            )
        ids = row.prompt_ids + row.answer_ids
        return dataclasses.replace(row, prompt_ids=ids[:1], answer_ids=ids[1:], read_only=())

    def describe(self) -> dict[str, Any]:
        """Return what the base does, and which rows are taken."""
        return {**super().describe(), "max_rows": self.max_rows, "keep_below": self.keep_below}
