"""GSM8K, asked directly in the form in which models are fine-tuned on it, the paper's or PEFT's.

Two readings of an output are reported, named as in lm-evaluation-harness: `strict` takes the number
behind the marker that ends a training answer, "####" (in PEFT's form "The answer is:"); `flexible` takes
the last number. A third, `lora_one`, repeats the authors' reading of their own form, with which their
published numbers are to be compared.
"""

import re
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Literal, NamedTuple

from app.evaluation.benchmark import Benchmark, Question
from app.models.decoding import Decoding
from app.utils.errors import InputError
from data_modules.evals.number_answers import number_behind, number_scores
from data_modules.readers import Row, published_rows

HUB_ID = "openai/gsm8k"
MARKER = "####"
STOP = ("Q:", "</s>", "<|im_end|>")  # of gsm8k_cot in lm-evaluation-harness


class Form(NamedTuple):
    """How a question is put, and what its answer ends with."""

    prompt: str
    marker: str
    stop: tuple[str, ...]


FormName = Literal["lora_one", "peft"]
FORMS: dict[FormName, Form] = {
    "lora_one": Form("Q: {question}\nA: ", MARKER, STOP),
    "peft": Form(
        "Question: {question} Think step by step.\nAnswer:",
        "The answer is:",
        ("Question:", *STOP[1:]),
    ),
}
"""The form of the LoRA-One repository, and that of PEFT's method_comparison/MetaMathQA."""


class Gsm8k(Benchmark):
    """Ask the test questions of GSM8K without examples.

    Args:
        path: test.jsonl or test.jsonl.gz of GSM8K; null takes openai/gsm8k from the Hub.
        prompt: Form of the question: `lora_one`, "Q:" and "A:", or `peft`, that of PEFT's method comparison.
        max_new_tokens: Most tokens of an output.
        temperature: 0 is greedy; the first versions of the paper sampled at 0.8.
        top_p: Probability of the tokens that are sampled from; then 0.95.
        validation_size: Questions asked when training is validated; null asks all, 0 none.
        limit: Questions asked in a test; null asks all.
    """

    name = "gsm8k"
    version = "1"

    def __init__(
        self,
        path: str | None = None,
        prompt: FormName = "lora_one",
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float = 1.0,
        validation_size: int | None = 100,
        limit: int | None = None,
    ) -> None:
        self.path = path
        self.form = FORMS[prompt]
        stop = self.form.stop
        self.decoding = Decoding(max_new_tokens, stop, temperature=temperature, top_p=top_p)
        self.validation_size = validation_size
        self.limit = limit

    def load(self) -> list[Question]:
        """Read the questions; a reference has the right number, and what the authors' code takes for it."""
        return [
            Question(
                key,
                self.form.prompt.format(question=row["question"]),
                {"number": gold, "lora_one": lora_one_number(row["answer"])},
            )
            for key, row, gold in gsm8k_rows(self.path, self.name)
        ]

    def score(self, question: Question, outputs: list[str]) -> dict[str, float]:
        """Read every output in two or three ways; of several outputs, return the share that is right."""
        scores = number_scores(outputs, self.form.marker, question.reference["number"])
        if self.form.marker != MARKER:
            return scores
        right = sum(lora_one_number(text) == question.reference["lora_one"] for text in outputs)
        return {**scores, "lora_one": right / len(outputs)}

    def score_names(self, questions: Sequence[Question]) -> list[str]:
        """Return the names of the readings."""
        return ["strict", "flexible", *(["lora_one"] if self.form.marker == MARKER else [])]


def gsm8k_rows(path: str | None, name: str) -> Iterator[tuple[str, Row, Fraction]]:
    """Read the test set of GSM8K, from JSON lines or, without a path, from the Hub, for a named benchmark.

    Yields:
        A key such as gsm8k/17; question and answer; the number behind the answer's last "####".

    Raises:
        InputError: The file is missing, or a row lacks a field or its number.
    """
    setting = f"path of the benchmark {name}"
    rows = published_rows(path, HUB_ID, "main", "test", ("question", "answer"), setting)
    for number, (where, row) in enumerate(rows):
        _, marker, end = row["answer"].rpartition(MARKER)
        gold = number_behind(f"{marker} {end.strip()}", MARKER)
        if gold is None:
            raise InputError(
                f"{where} has an answer without a number behind {MARKER!r}: {row['answer'][-60:]!r}; "
                f"correct it, or change {setting}"
            )
        yield f"gsm8k/{number}", row, gold


def lora_one_number(text: str) -> int:
    """Return what the authors' code reads: the digits behind the first "####", or 0.

    It stops at a thousands comma and sees no minus, in the solutions as in the outputs, so that 16 of the
    1319 solutions are read wrongly; kept as it is, to compare with published numbers.

    Source: eval_gsm8k.py of YuanheZ/LoRA-One.
    """
    match = re.search(r"####\s*(\d+)", text)
    try:
        return int(match[1]) if match else 0
    except ValueError:  # Python converts no more than 4300 digits
        return 0
