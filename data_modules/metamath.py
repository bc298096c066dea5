"""MetaMathQA: 395,000 questions of GSM8K and MATH, rephrased and answered by a language model."""

from collections.abc import Iterator
from typing import Any, Literal

from data_modules.evals.gsm8k import FORMS, FormName
from data_modules.generative import GenerativeDataModule
from data_modules.readers import published_rows

HUB_ID = "meta-math/MetaMathQA"
REPEATED_ANSWER = "\nThe answer is:"


class MetaMathQADataModule(GenerativeDataModule):
    """Train on MetaMathQA as the LoRA-One paper does, or as PEFT's method comparison does.

    A prompt has the "Q:" and "A:" of GSM8K's benchmark, an answer ends with its "#### NUMBER": what
    follows, the repetition behind "The answer is:", is cut off. Rows of MATH have no "####" and lose
    their last line. In PEFT's form a response stays whole.

    Args:
        path: A list in MetaMathQA-395K.json, or JSON lines (.jsonl), plain or gzipped, with `query`,
            `response` and `type`; null takes meta-math/MetaMathQA from the Hub.
        prompt: Form of the question: `lora_one` or `peft`, as the benchmark `Gsm8k` asks it.
        subset: `gsm` takes the rows whose type has "GSM", `all` those that come from MATH, too.
        max_length: Most tokens of prompt and answer with EOS.
        keep_below: The authors keep rows of fewer than 512 tokens.
        max_rows: Train on the first so many rows; the authors' subset has 100,000, their full set (null)
            about 395,000.
        validation_size: Rows that validate; of the subset the 10,000 behind the training rows, which ask
            some of the same questions in other words.
        **options: See `GenerativeDataModule`.

    Source: the LoRA-One repository, data.py; with LLaMA-2's tokenizer the rows are the same. Differs: tokens
    are the model's own, whichever it is; of the full set the authors validate on the first 1,000 training
    rows, here on rows that are set aside; one space between "A:" and the answer instead of two.
    In PEFT's form rows are measured in characters (1,300), and no space stands before the answer.
    """

    task_name = "metamath"

    def __init__(
        self,
        path: str | None = None,
        prompt: FormName = "lora_one",
        subset: Literal["gsm", "all"] = "gsm",
        max_length: int = 1024,
        keep_below: int | None = 512,
        max_rows: int | None = 100_000,
        validation_size: int = 10_000,
        **options: Any,
    ) -> None:
        super().__init__(path, max_length, keep_below, max_rows, validation_size, **options)
        self.prompt = prompt
        self.subset = subset
        self.source = path or HUB_ID

    def examples(self) -> Iterator[tuple[str, str]]:
        """Yield prompt and answer of each row of the subset."""
        fields = ("query", "response", "type")
        self.dropped_rows["not_gsm"] = 0
        for _, row in published_rows(self.path, HUB_ID, "default", "train", fields, "--data.path"):
            if self.subset == "gsm" and "GSM" not in row["type"]:
                self.dropped_rows["not_gsm"] += 1
                continue
            answer = row["response"]
            if self.prompt == "lora_one":
                answer = answer.partition(REPEATED_ANSWER)[0]
            yield FORMS[self.prompt].prompt.format(question=row["query"]), answer
