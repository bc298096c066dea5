"""Benchmarks: questions, how they are asked, and what an output scores."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from app.models.decoding import Decoding


@dataclass(frozen=True)
class Question:
    """One question of a benchmark."""

    key: str  # its name in the field, such as "HumanEval/17" or "anatomy/3"; the same in every run
    prompt: str  # what the model reads, ending where its output begins
    reference: Any  # what `Benchmark.score` needs to judge an output


class Benchmark(ABC):
    """A benchmark; each is one file that owns prompt, decoding, extraction and version.

    A benchmark either lets the model write (`decoding`), or compares the likelihoods of a few
    continuations (`choices`); the likeliest is then the output.
    """

    name: str  # in scores and files, such as "gsm8k"
    version: str  # changes whenever prompt, decoding or extraction change what is scored
    decoding: Decoding | None = None  # how outputs are generated; None where `choices` are compared
    choices: tuple[str, ...] = ()  # the continuations to compare, such as " A"
    validation_size: int | None = None  # questions asked in validation; None asks all, 0 none
    limit: int | None = None  # questions asked in a test; None asks all

    @abstractmethod
    def load(self) -> list[Question]:
        """Read all questions, in the order of their file.

        Raises:
            InputError: The file is missing or has another form; names the file, the row and the setting.
        """

    @abstractmethod
    def score(self, question: Question, outputs: list[str]) -> dict[str, float]:
        """Judge the outputs of one question.

        Args:
            question: The question.
            outputs: `decoding.num_samples` texts, or the one likeliest of `choices`.

        Returns:
            Values in [0, 1] by name, such as {"strict": 1.0, "flexible": 1.0}; a score of the benchmark is
            the mean over the questions that have it, so {"accuracy": 1.0, "accuracy/anatomy": 1.0}
            makes a score over all and one over a subject.
        """

    @abstractmethod
    def score_names(self, questions: Sequence[Question]) -> list[str]:
        """Return every name that `score` gives to any of these questions, the most important first."""

    def combine(self, scores: dict[str, float]) -> dict[str, float]:
        """Return the benchmark's scores, from the means over questions: those means, unless it has more."""
        return scores

    def check(self) -> None:  # noqa: B027
        """Raise InputError if the benchmark cannot run here, before anything expensive."""


@dataclass(frozen=True)
class EncodedQuestion:
    """A question as the model reads it."""

    question: Question
    prompt_ids: Sequence[int]
    prompt_hash: str

    def __len__(self) -> int:
        return len(self.prompt_ids)


@dataclass(frozen=True)
class PreparedBenchmark:
    """A benchmark made ready for a model."""

    benchmark: Benchmark
    questions: Sequence[EncodedQuestion]  # those to ask
    choice_ids: Sequence[
        Sequence[int]
    ]  # of the benchmark's `choices`; empty where the model writes


BENCHMARK = "benchmark"  # key of a batch of questions: the number of their benchmark
