"""What sources of questions and free answers share: which rows are taken, and which validate."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info
from transformers import PreTrainedTokenizerBase

from app.utils.errors import InputError
from data_modules.encoding import CHUNK_ROWS, EncodedRow, TextRow, encode
from data_modules.sampling import split_off
from data_modules.text import TextDataModule


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
        validation_size: Rows that validate: those that follow the training rows, or, where too few follow,
            rows drawn from them, the same for every seed.
        **options: See `TextDataModule`.
    """

    def __init__(
        self,
        path: str | None = None,
        max_length: int = 1024,
        keep_below: int | None = None,
        max_rows: int | None = None,
        validation_size: int = 1000,
        **options: Any,
    ) -> None:
        super().__init__(
            path=path, max_length=max_length, validation_size=validation_size, **options
        )
        for name, value in (("keep_below", keep_below), ("max_rows", max_rows)):
            if value is not None and value < 1:
                raise InputError(f"--data.{name}={value}: expected at least 1, or null for all")
        if validation_size < 1:
            raise InputError(f"--data.validation_size={validation_size}: expected at least 1")
        self.keep_below = keep_below
        self.max_rows = max_rows
        self._candidates: list[TextRow] | None = None
        self._tokens: dict[int, EncodedRow] = {}

    def examples(self) -> Iterator[tuple[str, str]]:
        """Yield prompt and answer of each row, in the order of the file; each source writes this."""
        raise NotImplementedError

    def load(self) -> dict[str, list[TextRow]]:
        """Return the rows by their use; the model's tokenizer decides which are too long.

        Raises:
            InputError: No row is left, or too few to validate.
        """
        kept = self._kept()
        held, size = kept[: self.max_rows], self.validation_size or 0
        after = kept[len(held) : len(held) + size]
        if len(after) < size:
            held, after = split_off(held, size, "data.validation_size")
        return {"train": held, "validation": after, "test": []}

    def _kept(self) -> list[TextRow]:
        """Return the rows that are short enough, up to those needed, and remember their tokens."""
        rows, seen = self._read(), 0
        kept: list[TextRow] = []
        needed = len(rows) if self.max_rows is None else self.max_rows + (self.validation_size or 0)
        place = (self._tokenizer(), self.is_encoder_decoder, self.max_length, self.task_name)
        self._tokens = {}
        while seen < len(rows) and len(kept) < needed:
            part = rows[seen : seen + CHUNK_ROWS]
            seen += len(part)
            part = self._below(part)
            for tokens in encode(part, *place, self.chat_template, too_long="drop")[0]:
                row = part[tokens.index]
                kept.append(row)
                self._tokens[id(row)] = tokens
        self.dropped_rows["too_long"] = seen - len(kept)
        settings = f"--data.max_length={self.max_length}"
        if self.keep_below is not None:
            settings += f" or --data.keep_below={self.keep_below}"
        if not kept:
            raise InputError(f"no row of {self.task_name} is as short as {settings} asks: raise it")
        left_out = [f"{count:,} {why}" for why, count in self.dropped_rows.items() if count]
        if left_out:
            rank_zero_info(
                f"rows of {self.task_name} that are left out: {', '.join(left_out)} ({settings})"
            )
        return kept

    def _below(self, rows: list[TextRow]) -> list[TextRow]:
        """Return the rows whose text has fewer tokens than `keep_below`."""
        if self.keep_below is None:
            return rows
        texts = [f"{row.prompt} {row.answer}" for row in rows]
        lengths = map(len, self._tokenizer()(texts)["input_ids"])
        return [row for row, length in zip(rows, lengths, strict=True) if length < self.keep_below]

    def encoded(self, split: str) -> list[EncodedRow]:
        """Return the rows of a split as token ids; none is cut."""
        if split not in self._encoded:
            rows = self.rows(split)
            self._encoded[split] = [
                dataclasses.replace(self._tokens[id(row)], index=i) for i, row in enumerate(rows)
            ]
            self.cut_prompts[split] = 0
        return self._encoded[split]

    def attach(
        self,
        tokenizer: PreTrainedTokenizerBase,
        is_encoder_decoder: bool,
        context_length: int | None = None,
    ) -> None:
        """Set what depends on the model; which rows are short enough does."""
        if tokenizer is not self.tokenizer or is_encoder_decoder != self.is_encoder_decoder:
            self._rows = None
        super().attach(tokenizer, is_encoder_decoder, context_length)

    def _read(self) -> list[TextRow]:
        if self._candidates is None:
            rows = list(self.examples())
            self._candidates = [TextRow(p, a) for p, a in rows if a.strip()]
            self.dropped_rows["empty_answer"] = len(rows) - len(self._candidates)
            if not self._candidates:
                raise InputError(
                    f"{self.source} has no row of {self.task_name} with an answer: change --data.path"
                )
        return self._candidates

    def prepare_data(self) -> None:
        """Download published rows, once for all processes of a node."""
        if self.path is None:
            self._read()

    def setup(self, stage: str | None = None) -> None:
        """Read the rows before the tokenizer, which may be a long download away, and encode them."""
        if stage != "test":
            self._read()
            self._attach_to_module()
            super().setup(stage)
            return
        if not self.evals:
            raise InputError(
                f"{self.task_name} has no rows to test, and --data.evals is empty: give a benchmark, such as "
                "--config eval/gsm8k.yaml"
            )
        self._attach_to_module()
        self.prepare_benchmarks("test")

    def _evaluation_rows(self, split: str) -> list[Any]:
        return [] if split == "test" else super()._evaluation_rows(split)

    def describe(self) -> dict[str, Any]:
        """Return where the rows come from and how many there are, for the summary of a run."""
        taken = {"max_rows": self.max_rows, "keep_below": self.keep_below}
        return {**super().describe(), **taken}
