"""Benchmarks: questions, how they are asked, and what an output scores."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from app.evaluation.server import Server
from app.models.decoding import Decoding
from app.models.protocols import ScoredModel


@dataclass(frozen=True)
class Question:
    """One question of a benchmark."""

    key: str  # its name in the field, such as "HumanEval/17" or "anatomy/3"; the same in every run
    prompt: str  # what the model reads, ending where its output begins
    reference: Any  # what `Benchmark.score` needs to judge an output
    turns: tuple[Any, ...] = ()  # of a conversation, whose last one the model writes


class Benchmark(ABC):
    """A benchmark; each is one file that owns prompt, decoding, extraction and version.

    A benchmark lets the model write (`decoding`), or compares the likelihoods of a few continuations
    (`choices`), of which the likeliest is the output, or runs the model itself (`runs_model`).
    """

    name: str  # in scores and files, such as "gsm8k"
    version: str  # changes whenever prompt, decoding or extraction change what is scored
    decoding: Decoding | None = None  # how outputs are generated; None where `choices` are compared
    choices: tuple[str, ...] = ()  # the continuations to compare, such as " A"
    runs_model: bool = False  # whether `run` answers each question: a task of another harness
    lower_is_better: Collection[str] = ()  # names of scores of which less is better, after `load`
    asks_rows: bool = False  # whether it asks the data module's own rows, which `take_rows` gets
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
            outputs: `decoding.num_samples` texts, or the one likeliest of `choices`, or what `run` returned.

        Returns:
            Values in [0, 1] by name, such as {"strict": 1.0, "flexible": 1.0}; a score of the benchmark is
            the mean over the questions that have it, so {"accuracy": 1.0, "accuracy/anatomy": 1.0}
            makes a score over all and one over a subject. A name that begins with "_" is for `combine` alone,
            and its value any number.
        """

    @abstractmethod
    def score_names(self, questions: Sequence[Question]) -> list[str]:
        """Return every name that `score` gives to any of these questions, the most important first."""

    def run(
        self, model: ScoredModel, question: Question, size: int | None, chat_template: bool
    ) -> dict[str, Any]:
        """Run the model on the first `size` rows of the task that a question stands for; see `runs_model`.

        Returns:
            What the answer holds: `outputs` and more, as JSON data, the same on every process.
        """
        raise NotImplementedError(f"{type(self).__name__} has runs_model, so it writes this")

    def take_rows(self, rows: Sequence[Any]) -> None:
        """Set the data module's rows, before `load` makes questions of them; see `asks_rows`."""
        raise NotImplementedError(f"{type(self).__name__} has asks_rows, so it writes this")

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
    size: int | None = None  # rows that `run` asks of each task
    server: Server | None = None  # generates the outputs instead of the model
    served: str | None = None  # the model's name there
    chat_template: bool = False  # whether `run` puts prompts into the model's chat template


BENCHMARK = "benchmark"  # key of a batch of questions: the number of their benchmark
