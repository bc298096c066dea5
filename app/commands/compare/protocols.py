"""What a comparison uses of a run that the command line has parsed."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol


class Named(Protocol):
    """A benchmark."""

    name: str


class ComparedData(Protocol):
    """What is asked of a data module, whose settings its attributes are."""

    label_words: Sequence[str]
    validation_size: int | None
    task_name: str
    evals: Sequence[Named]

    def rows(self, split: str) -> Sequence[Any]:
        """Return the rows of a split."""


class ResolvedRun(Protocol):
    """A `fit` that is parsed and not run; `resolved` is the configuration, as a run would write it."""

    resolved: dict[str, Any]

    @property
    def data(self) -> ComparedData:
        """The data module."""

    def class_named(self, path: str) -> type[Named]:
        """Return the class that a `class_path` names."""

    def check(self) -> None:
        """Raise an error if a part cannot be made, or training is too short for the adapter."""


Resolver = Callable[[Sequence[str]], ResolvedRun]
"""Resolves the options of a `fit`; the command line hands it over, which knows the parser."""
