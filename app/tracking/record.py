"""The record of a run: summary.json, as a run writes it and as reports read it."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, Self, get_args, get_origin, get_type_hints

from app.utils.errors import InputError
from app.utils.files import write_json


@dataclass
class Section:
    """A section of the record; a field that is None or empty is not written.

    Attributes:
        details: What else the section holds, by key: facts of one method or one kind of data.
    """

    details: dict[str, Any] = field(default_factory=dict, kw_only=True)

    @classmethod
    def from_json(cls, content: object, where: str = "the section") -> Self:
        """Read a section.

        Args:
            content: The JSON object; keys that are no fields become details.
            where: The section's name, for errors.

        Raises:
            InputError: It is no object, or a value has another type.
        """
        if not isinstance(content, dict):
            raise InputError(f"{where} is {content!r}")
        types = get_type_hints(cls)
        own = {key: value for key, value in content.items() if key in types and key != "details"}
        for key, value in own.items():
            _check_type(f"{where}.{key}", value, types[key])
        rest = {key: value for key, value in content.items() if key not in own}
        return cls(**own, details=rest)

    def to_json(self) -> dict[str, Any]:
        """Return the section as a JSON object."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "details"}
        return {k: v for k, v in own.items() if v not in (None, {}, [])} | self.details


@dataclass
class ModelRecord(Section):
    """The base model, and how many of the parameters are trained."""

    name: str | None = None
    fingerprint: str | None = None
    parameters: int | None = None
    trainable_parameters: int | None = None


@dataclass
class DataRecord(Section):
    """What the data module describes: the task's name, and its rows by split."""

    name: str | None = None
    rows: dict[str, int] = field(default_factory=dict)


@dataclass
class InitRecord(Section):
    """How the initialization was computed; empty where PEFT's own is kept.

    Attributes:
        seconds: Of its gradient passes and decompositions.
        peak_bytes: Peak memory of each pass, of the process that needs most.
        captured_energy: Mean and minimum over the layers.
        layers: Singular values, captured energy and errors of each layer.
    """

    seconds: float | None = None
    peak_bytes: list[int] = field(default_factory=list)
    captured_energy: dict[str, float] = field(default_factory=dict)
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass
class TrainRecord(Section):
    """The training loop.

    Attributes:
        steps: Optimizer steps.
        seconds: Of training, without validation.
        samples: Training samples seen.
        samples_per_second: Their rate.
        peak_bytes: Peak memory: allocated by torch on CUDA, resident in the process on the CPU, of the process
            that needs most.
        device: What it was trained on.
        host: The machine.
        began: When training began (of a resumed run: again), in seconds of the clock.
        ended: When it ended.
    """

    steps: int = 0
    seconds: float | None = None
    samples: int | None = None
    samples_per_second: float | None = None
    peak_bytes: int | None = None
    device: str | None = None
    host: str | None = None
    began: float | None = None
    ended: float | None = None


@dataclass
class RunRecord:
    """Facts gathered while a run goes on, each by the part that knows it.

    Attributes:
        method: Name of the method, as the configuration has it.
        model: The base model.
        data: The data.
        seed: The run's seed.
        metrics: Scores at `zero_shot`, `after_init` and `final`, and those of `test`.
        init: The initialization.
        train: The training loop.
    """

    method: str = ""
    model: ModelRecord = field(default_factory=ModelRecord)
    data: DataRecord = field(default_factory=DataRecord)
    seed: int | None = None
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    init: InitRecord = field(default_factory=InitRecord)
    train: TrainRecord = field(default_factory=TrainRecord)

    @classmethod
    def from_json(cls, content: object) -> Self:
        """Read a record; a section that an earlier version did not write is empty.

        Raises:
            InputError: A value has another type than a run writes, or there are no metrics.
        """
        if not isinstance(content, dict) or "metrics" not in content:
            raise InputError("it has no metrics")
        types = get_type_hints(cls)
        own = {key: value for key, value in content.items() if key in types}
        for key, kind in types.items():
            if isinstance(kind, type) and issubclass(kind, Section):
                own[key] = kind.from_json(own.get(key, {}), key)
            elif key in own:
                _check_type(key, own[key], kind)
        return cls(**own)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read summary.json.

        Raises:
            InputError: It cannot be read, or is damaged.
        """
        try:
            return cls.from_json(json.loads(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise InputError(f"{path.name} cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise InputError(f"{path.name} is damaged: {error}") from error

    def to_json(self) -> dict[str, Any]:
        """Return the record as a JSON object."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: v.to_json() if isinstance(v, Section) else v for k, v in values.items()}

    def write(self, path: Path) -> None:
        """Write the record as JSON, whole or not at all."""
        write_json(path, self.to_json())

    def score_table(self) -> str:
        """Return the scores as an aligned text table, a row for each moment."""
        names = main_scores(self.metrics.values())
        widths = [max(12, len(name) + 2) for name in names]
        titles = zip(names, widths, strict=True)
        lines = [" " * 12 + "".join(f"{title:>{width}}" for title, width in titles)]
        for moment, scores in self.metrics.items():
            cells = (
                f"{scores.get(name, float('nan')):{width}.4f}"
                for name, width in zip(names, widths, strict=True)
            )
            lines.append(f"{moment:>12}{''.join(cells)}")
        return "\n".join(lines)


def main_scores(metrics: Iterable[Mapping[str, float]]) -> list[str]:
    """Return the names of the scores to show, those of rows first.

    A score over a part of a benchmark has two slashes and is left to metrics.csv.
    """
    names = list(dict.fromkeys(name for scores in metrics for name in scores))
    first = [name for name in ("accuracy", "f1", "mcc", "loss") if name in names]
    return first + [name for name in names if name not in first and name.count("/") < 2]


def _check_type(where: str, value: object, expected: Any) -> None:
    """Raise InputError unless a JSON value has the type of its field, entries of lists and dicts too."""
    kind, parts = get_origin(expected), get_args(expected)
    if kind is UnionType:  # of one type and None
        if value is not None:
            _check_type(where, value, parts[0])
    elif kind is dict and isinstance(value, dict):
        for key, entry in value.items():
            _check_type(f"{where}.{key}", entry, parts[1])
    elif kind is list and isinstance(value, list):
        for place, entry in enumerate(value):
            _check_type(f"{where} {place}", entry, parts[0])
    elif expected is not Any:
        numbers = (int, float) if expected is float else ()
        if not isinstance(value, numbers or kind or expected):
            raise InputError(f"{where} is {value!r}")
