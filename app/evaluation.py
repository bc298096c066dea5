"""What a benchmark is: questions, how they are asked, and what an output scores."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from app.errors import InputError


@dataclass(frozen=True)
class Question:
    """One question of a benchmark.

    Attributes:
        key: Its name in the field, such as "HumanEval/17" or "anatomy/3"; the same in every run.
        prompt: What the model reads, ending where its output begins.
        reference: What `Evaluation.score` needs to judge an output.
    """

    key: str
    prompt: str
    reference: Any


@dataclass(frozen=True)
class Decoding:
    """How outputs are generated.

    Args:
        max_new_tokens: Most tokens of an output.
        stop: Strings that end an output, which does not hold them.
        num_samples: Outputs of each question.
        temperature: Divides the logits; 0 takes the most likely token (greedy).
        top_p: Sample among the most likely tokens that together have this probability.
        seed: Fixes the samples of each question, whatever batch or process it is in.
    """

    max_new_tokens: int = 512
    stop: Sequence[str] = ()
    num_samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, holds, expected in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("num_samples", self.num_samples >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "0 (greedy) or more"),
            ("top_p", 0 < self.top_p <= 1, "more than 0, at most 1"),
            ("stop", not isinstance(self.stop, str) and all(self.stop), "a list of strings"),
        ):
            if not holds:
                raise InputError(f"decoding.{name}={getattr(self, name)!r}: expected {expected}")
        if self.num_samples > 1 and self.temperature == 0:
            raise InputError(
                f"decoding.num_samples={self.num_samples} with decoding.temperature=0: greedy outputs are all "
                "the same; raise the temperature or ask for one sample"
            )


class Evaluation(ABC):
    """A benchmark; each is one file that owns prompt, decoding, extraction and version.

    A benchmark either lets the model write (`decoding`), or compares the likelihoods of a few
    continuations (`choices`); the likeliest is then the output.

    Attributes:
        name: Its name in scores and files, such as "gsm8k".
        version: Changes whenever prompt, decoding or extraction change what is scored.
        decoding: How outputs are generated; None where `choices` are compared.
        choices: The continuations to compare, such as " A"; empty where outputs are generated.
        validation_size: Questions asked when training is validated; None asks all, 0 none.
        limit: Questions asked in a test; None asks all.
    """

    name: str
    version: str
    decoding: Decoding | None = None
    choices: tuple[str, ...] = ()
    validation_size: int | None = None
    limit: int | None = None

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
