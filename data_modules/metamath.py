"""MetaMathQA: 395,000 questions of GSM8K and MATH, rephrased and answered by a language model."""

import pathlib
from collections.abc import Iterator
from typing import Any, Literal

from data_modules.evals.gsm8k import PROMPT
from data_modules.evals.rows import hub_rows, json_rows
from data_modules.generative import GenerativeDataModule

HUB_ID = "meta-math/MetaMathQA"
REPEATED_ANSWER = "\nThe answer is:"


class MetaMathQADataModule(GenerativeDataModule):
    """Train on MetaMathQA as the LoRA-One paper does.

    A prompt has the "Q:" and "A:" of GSM8K's benchmark, an answer ends with its "#### NUMBER": what
    follows, the repetition behind "The answer is:", is cut off. Rows of MATH have no "####" and lose
    their last line.

    Args:
        path: A list in MetaMathQA-395K.json, or JSON lines (.jsonl), plain or gzipped, with `query`,
            `response` and `type`; null takes meta-math/MetaMathQA from the Hub.
        subset: `gsm` takes the rows that come from GSM8K, `all` those of MATH, too.
        max_length: Most tokens of a row. The authors keep rows below 512 tokens of prompt and answer.
        max_rows: Train on the first so many rows; the authors' subset has 100,000.
        validation_size: Rows that validate; the authors take the 10,000 behind the training rows.
        **options: See `TextDataModule`.

    Source: the LoRA-One repository, data.py. Differs: EOS counts as a token of the row; of the full set
    the authors validate on the first 1,000 training rows, here rows that are set aside; one space
    between "A:" and the answer instead of two.
    """

    task_name = "metamath"

    def __init__(
        self,
        path: str | None = None,
        subset: Literal["gsm", "all"] = "gsm",
        max_length: int = 511,
        max_rows: int | None = 100_000,
        validation_size: int = 10_000,
        **options: Any,
    ) -> None:
        super().__init__(path, max_length, max_rows, validation_size, **options)
        self.subset = subset
        self.source = path or HUB_ID

    def examples(self) -> Iterator[tuple[str, str]]:
        """Yield prompt and answer of each row of the subset."""
        fields = ("query", "response", "type")
        if self.path is None:
            rows = hub_rows(HUB_ID, "default", "train", fields, "--data.path")
        else:
            rows = json_rows(pathlib.Path(self.path), fields, "--data.path")
        for _, row in rows:
            if self.subset == "all" or "GSM" in row["type"]:
                answer = row["response"].partition(REPEATED_ANSWER)[0]
                yield PROMPT.format(question=row["query"]), answer.rstrip()
