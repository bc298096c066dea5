"""What a run reports about itself; the source of summary.json."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from app.utils.files import write_json


@dataclass
class RunRecord:
    """Facts gathered while a run goes on, by whoever knows them.

    Attributes:
        method: Name of the method, as the configuration has it.
        model: Name, fingerprint and sizes of the base model.
        data: What the data module says of itself.
        seed: The run's seed.
        metrics: Scores at `zero_shot`, `after_init` and `final`.
        init: How the initialisation was computed; empty where PEFT's own start is used.
        train: Steps, seconds, samples per second, device and peak memory of the training loop: allocated by
            torch on CUDA, resident in the process on the CPU, of the process that needs most. Host, and when
            it began (of a resumed run: again) and ended, in seconds of the clock.
    """

    method: str = ""
    model: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    init: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Write the record as JSON, whole or not at all."""
        write_json(path, asdict(self))

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
    found = list(dict.fromkeys(name for scores in metrics for name in scores))
    first = [name for name in ("accuracy", "f1", "mcc", "loss") if name in found]
    return first + [name for name in found if name not in first and name.count("/") < 2]
