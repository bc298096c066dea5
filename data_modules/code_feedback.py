"""Code-Feedback: 157,000 programming questions with answers that hold code."""

from collections.abc import Iterator
from typing import Any

from data_modules.generative import GenerativeDataModule
from data_modules.instructions import instruction_prompt
from data_modules.readers import published_rows

HUB_ID = "m-a-p/CodeFeedback-Filtered-Instruction"
FENCE = "```"


class CodeFeedbackDataModule(GenerativeDataModule):
    """Train on Code-Feedback as the LoRA-One paper does.

    A row needs a block of code in its answer, which is kept up to the end of the first one; a block that is
    never closed is closed at its end.

    Args:
        path: JSON list or JSON lines, plain or gzipped, with `query` and `answer`; null takes
            m-a-p/CodeFeedback-Filtered-Instruction from the Hub.
        max_length: Most tokens of prompt and answer with EOS.
        keep_below: The authors keep rows of fewer than 1024 tokens.
        max_rows: Train on the first so many rows; the authors' subset has 100,000.
        validation_size: Rows that validate: those behind the training rows.
        **options: See `GenerativeDataModule`.

    Source: the LoRA-One repository, data.py; with LLaMA-2's tokenizer the rows are the same. Differs: tokens
    are the model's own, whichever it is.
    """

    task_name = "code_feedback"

    def __init__(
        self,
        path: str | None = None,
        max_length: int = 1024,
        keep_below: int | None = 1024,
        max_rows: int | None = 100_000,
        validation_size: int = 10_000,
        **options: Any,
    ) -> None:
        super().__init__(path, max_length, keep_below, max_rows, validation_size, **options)
        self.source = path or HUB_ID

    def examples(self) -> Iterator[tuple[str, str]]:
        """Yield prompt and answer of each row with a block of code."""
        fields = ("query", "answer")
        self.dropped_rows["without_code"] = 0
        for _, row in published_rows(self.path, HUB_ID, "default", "train", fields, "--data.path"):
            before, fence, rest = row["answer"].partition(FENCE)
            if not fence:
                self.dropped_rows["without_code"] += 1
                continue
            answer = before + FENCE + rest.partition(FENCE)[0] + FENCE
            yield instruction_prompt(row["query"]), answer
