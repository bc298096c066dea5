"""The record of a run: summary.json, as a run writes it and as reports read it."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from app.utils.errors import InputError
from app.utils.files import write_json


class Section(BaseModel):
    """A section of the record; what else its writer gives, such as `gamma`, is kept in `model_extra`."""

    model_config = ConfigDict(extra="allow", strict=True)


class ModelRecord(Section):
    """The base model, and how many of the parameters are trained."""

    name: str | None = None
    fingerprint: str | None = None
    parameters: int | None = None
    trainable_parameters: int | None = None


class DataRecord(Section):
    """What the data module describes: the task's name, and its rows by split."""

    name: str | None = None
    rows: dict[str, int] = {}
    digests: dict[str, str] = {}  # of each split's rows
    evals: list[dict[str, Any]] = []  # name and version of each benchmark that the run asks

    @property
    def has_test(self) -> bool:
        """Whether a test has something to score, so far as the record says."""
        return self.rows.get("test") != 0 or bool(self.evals)


class InitRecord(Section):
    """How the initialization was computed; empty where PEFT's own is kept."""

    seconds: float | None = None  # of its gradient passes and decompositions
    peak_bytes: list[int] = []  # of each pass, of the process that needs most
    captured_energy: dict[str, float] = {}  # mean and minimum over the layers
    layers: dict[str, dict[str, Any]] = {}  # singular values, captured energy, errors of each


class TrainRecord(Section):
    """The training loop."""

    steps: int = 0  # of the optimizer
    seconds: float | None = None  # without validation
    samples: int | None = None
    samples_per_second: float | None = None
    tokens: int | None = None  # of the input, without padding
    tokens_per_second: float | None = None
    # Allocated by torch on CUDA, resident in the process on the CPU, of the process that needs most.
    peak_bytes: int | None = None
    device: str | None = None
    host: str | None = None
    began: float | None = None  # of a resumed run: again; in seconds of the clock
    ended: float | None = None


class RunRecord(Section):
    """Facts gathered while a run goes on, each by the part that knows it."""

    method: str = ""  # as the configuration names it
    model: ModelRecord = Field(default_factory=ModelRecord)
    data: DataRecord = Field(default_factory=DataRecord)
    seed: int | None = None
    metrics: dict[str, dict[str, float]] = {}  # at `zero_shot`, `after_init`, `final`, `test`
    lower_is_better: list[str] = []  # names of benchmarks' scores of which less is better
    init: InitRecord = Field(default_factory=InitRecord)
    train: TrainRecord = Field(default_factory=TrainRecord)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read summary.json; what an earlier version did not write keeps its default.

        Raises:
            InputError: It cannot be read, or is damaged; names the first wrong value.
        """
        try:
            record = cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise InputError(f"{path.name} cannot be read: {error.strerror}") from error
        except ValidationError as error:
            wrong = error.errors()[0]
            where = ".".join(map(str, wrong["loc"])) or "it"
            raise InputError(f"{path.name} is damaged: {where} is {wrong['input']!r}") from error
        if "metrics" not in record.model_fields_set:
            raise InputError(f"{path.name} is damaged: it has no metrics")
        return record

    def to_json(self) -> dict[str, Any]:
        """Return the record as a JSON object, whose sections have what was set."""
        return {
            name: value.model_dump(exclude_unset=True) if isinstance(value, Section) else value
            for name, value in self
        }

    def write(self, path: Path) -> None:
        """Write the record as JSON, whole or not at all."""
        write_json(path, self.to_json())

    def score_table(self) -> str:
        """Return the scores as an aligned text table, a row for each moment; say so if there are none."""
        names = main_scores(self.metrics.values())
        if not names:
            return "no scores: there are no validation rows"
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
    first = [name for name in ("accuracy", "f1", "mcc", "loss", "task_loss") if name in names]
    return first + [name for name in names if name not in first and name.count("/") < 2]
