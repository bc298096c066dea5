"""GSM8K's training questions: 7,473 of grade-school mathematics, answered step by step by people."""

import re
from collections.abc import Iterator
from typing import Any

from data_modules.evals.gsm8k import FORMS, HUB_ID
from data_modules.generative import GenerativeDataModule
from data_modules.readers import published_rows

CALCULATION = re.compile(r"<<[^<>]*>>")


class Gsm8kDataModule(GenerativeDataModule):
    """Train on GSM8K in the form in which its benchmark asks: "Q:", "A:", and "#### NUMBER" at the end.

    Args:
        path: train.jsonl or train.jsonl.gz of GSM8K; null takes openai/gsm8k from the Hub.
        calculations: Keep the marks of calculations such as <<48/2=24>>, as the authors and the examples of
            lm-evaluation-harness do. Cobbe et al. let a calculator write what follows "=", which nothing
            here does.
        max_length: Most tokens of a row; a longer one is dropped.
        validation_size: Rows set aside for validation.
        **options: See `GenerativeDataModule`.

    Source: the LoRA-One repository, data.py. Differs: the authors validate on the test set, here on training
    rows that are set aside.
    """

    task_name = "gsm8k"

    def __init__(
        self,
        path: str | None = None,
        calculations: bool = True,
        max_length: int = 512,
        validation_size: int = 500,
        **options: Any,
    ) -> None:
        super().__init__(path, max_length, validation_size=validation_size, **options)
        self.calculations = calculations
        self.source = path or HUB_ID

    def examples(self) -> Iterator[tuple[str, str]]:
        """Yield prompt and answer of each row."""
        fields = ("question", "answer")
        for _, row in published_rows(self.path, HUB_ID, "main", "train", fields, "--data.path"):
            answer = row["answer"] if self.calculations else CALCULATION.sub("", row["answer"])
            yield FORMS["lora_one"].prompt.format(question=row["question"]), answer
