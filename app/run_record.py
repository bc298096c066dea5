"""What a run reports about itself; the source of summary.json."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


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
        train: Steps, seconds and samples per second of the training loop.
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
        part = path.with_suffix(".part")
        part.write_text(json.dumps(asdict(self), indent=2) + "\n")
        part.replace(path)

    def score_table(self) -> str:
        """Return the scores as an aligned text table, a row for each moment."""
        names = [name for name in ("accuracy", "f1", "mcc", "loss") if self._has(name)]
        lines = ["".join(f"{title:>12}" for title in ["", *names])]
        for moment, scores in self.metrics.items():
            cells = "".join(f"{scores.get(name, float('nan')):12.4f}" for name in names)
            lines.append(f"{moment:>12}{cells}")
        return "\n".join(lines)

    def _has(self, name: str) -> bool:
        return any(name in scores for scores in self.metrics.values())
