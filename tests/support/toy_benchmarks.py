"""Benchmarks small enough for tiny models, for the tests of whatever asks benchmarks."""

import random
from collections.abc import Sequence
from pathlib import Path

from app.evaluation.benchmark import Benchmark, Question
from app.models.decoding import Decoding
from app.utils.errors import InputError

CONFIG = """
trainer: {{accelerator: cpu}}
model: {{name: {model}, adapter: null}}
data:
  class_path: data_modules.benchmark_data.BenchmarkDataModule
  init_args:
    eval_batch_size: {size}
    evals:
      - class_path: tests.support.toy_benchmarks.Writing
        init_args: {{num_samples: {samples}}}
      - class_path: tests.support.toy_benchmarks.Choosing
output: {{name: toy, root: {root}, wandb: disabled}}
"""
FILMS = ("good", "bad", "awful", "fine", "great and long and longer still")


def write_config(folder: Path, model: Path, size: int = 5, samples: int = 1) -> Path:
    """Write a configuration that asks both in batches of a size; return the file."""
    file = folder / "benchmarks.yaml"
    options = {"model": model, "size": size, "samples": samples}
    file.write_text(CONFIG.format(root=folder / "runs", **options))
    return file


def questions(size: int) -> list[Question]:
    """Return questions of many lengths, whose reference is the length of their prompt."""
    drawn = random.Random(0)
    prompts = [
        f"film {i} is {' '.join(drawn.choices(FILMS, k=drawn.randint(1, 12)))}:"
        for i in range(size)
    ]
    return [Question(f"toy/{i}", prompt, len(prompt)) for i, prompt in enumerate(prompts)]


class Writing(Benchmark):
    """Scores whether outputs hold a letter; several of a question are drawn at temperature 1."""

    name = "writing"
    version = "1"

    def __init__(
        self,
        size: int = 23,
        max_new_tokens: int = 6,
        num_samples: int = 1,
        validation_size: int | None = None,
        limit: int | None = None,
        broken: bool = False,
    ) -> None:
        self.size = size
        temperature = 1.0 if num_samples > 1 else 0.0
        self.decoding = Decoding(max_new_tokens, (), num_samples, temperature, 0.9)
        self.validation_size, self.limit, self.broken = validation_size, limit, broken

    def check(self) -> None:
        if self.broken:
            raise InputError("toy_sandbox is absent: install it")

    def load(self) -> list[Question]:
        return questions(self.size)

    def score(self, question: Question, outputs: list[str]) -> dict[str, float]:
        has = sum("e" in text for text in outputs) / len(outputs)
        parity = question.reference % 2
        return {"has_e": has, f"has_e/{'odd' if parity else 'even'}": has}

    def score_names(self, questions: Sequence[Question]) -> list[str]:
        return ["has_e", "has_e/odd", "has_e/even"]


class Choosing(Benchmark):
    """Asks for one of three words."""

    name = "choosing"
    version = "1"
    choices = (" negative", " positive", " no")

    def __init__(
        self, size: int = 17, validation_size: int | None = None, limit: int | None = None
    ) -> None:
        self.size, self.validation_size, self.limit = size, validation_size, limit

    def load(self) -> list[Question]:
        return questions(self.size)

    def score(self, question: Question, outputs: list[str]) -> dict[str, float]:
        (chosen,) = outputs
        return {"accuracy": float(chosen == self.choices[question.reference % 3])}

    def score_names(self, questions: Sequence[Question]) -> list[str]:
        return ["accuracy"]
