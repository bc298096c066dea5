"""Commonsense questions of LLM-Adapters: 170,000 of eight sets, answered with the name of an option."""

import pathlib
from collections.abc import Iterator
from typing import Any

from app.utils.errors import InputError
from data_modules.generative import GenerativeDataModule
from data_modules.instructions import FIELDS, instruction_prompt
from data_modules.readers import file_rows


class CommonsenseDataModule(GenerativeDataModule):
    """Train on commonsense_170k in the prompt of its benchmark.

    An answer is a sentence such as "the correct answer is solution2"; its name alone, in the field `answer`,
    is not learnt.

    Args:
        path: commonsense_170k.json, from the folder ft-training_set of AGI-Edgerunners/LLM-Adapters on
            GitHub; required.
        max_length: Most tokens of a row; a longer one is dropped.
        validation_size: Rows that validate; the authors draw 120, too.
        **options: See `GenerativeDataModule`.

    Source: the LoRA-One repository, data.py. Differs: other rows are drawn; theirs are cut to 256 tokens.
    """

    task_name = "commonsense"

    def __init__(
        self,
        path: str | None = None,
        max_length: int = 256,
        validation_size: int = 120,
        **options: Any,
    ) -> None:
        if path is None:
            raise InputError(
                "--data.path is not set: expected commonsense_170k.json, from the folder ft-training_set of "
                "AGI-Edgerunners/LLM-Adapters on GitHub"
            )
        super().__init__(path, max_length, validation_size=validation_size, **options)
        self.file = pathlib.Path(path)

    def examples(self) -> Iterator[tuple[str, str]]:
        """Yield prompt and answer of each row."""
        for _, row in file_rows(self.file, FIELDS, "--data.path"):
            yield instruction_prompt(row["instruction"], row.get("input") or ""), row["output"]
