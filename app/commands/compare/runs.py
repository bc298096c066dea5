"""A run of a comparison: what it was, what came of it, its curves; and those that count for nothing."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from app.commands.compare.settings import Settings

Curve = list[tuple[float, float]]


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        folder: Its folder.
        method: `model.method`.
        settings: What makes the method, without the learning rate.
        task: What all comparable runs share.
        learning_rate: Of the optimizer; NaN if it has none.
        seed: The seed.
        validation: Scores of the trained model on the validation rows.
        test: Scores on the reported set; empty if it was never tested.
        told: summary.json.
        curves: metrics.csv: (step, value) lists by name.
    """

    folder: Path
    method: str
    settings: Settings
    task: Settings
    learning_rate: float
    seed: int
    validation: Mapping[str, float]
    test: Mapping[str, float]
    told: Mapping[str, Any]
    curves: Mapping[str, list[tuple[int, float]]] = field(repr=False)

    def before(self, moment: str, score: str) -> float | None:
        """Return a score on the validation rows before training; None where it was not asked.

        Args:
            moment: "zero_shot", of the untouched model, or "after_init".
            score: Its name.
        """
        return self.told["metrics"].get(moment, {}).get(score)

    @property
    def trainable(self) -> int | None:
        """Trainable parameters."""
        return self.told.get("model", {}).get("trainable_parameters")

    @property
    def init_seconds(self) -> float:
        """Seconds of the initialisation's gradient passes and decompositions; 0 without one."""
        return float(self.told.get("init", {}).get("seconds", 0.0))

    @property
    def train_seconds(self) -> float:
        """Seconds of the training loop, without validation."""
        return float(self.told.get("train", {}).get("seconds", math.nan))

    @property
    def step_seconds(self) -> float:
        """Mean seconds of an optimizer step."""
        steps = self.told.get("train", {}).get("steps", 0)
        return self.train_seconds / steps if steps else math.nan

    @property
    def peak_bytes(self) -> int | None:
        """Peak memory of initialisation and training, of the process that needs most."""
        peaks = [
            *self.told.get("init", {}).get("peak_bytes", []),
            self.told.get("train", {}).get("peak_bytes"),
        ]
        return max((peak for peak in peaks if peak), default=None) if peaks[-1] else None

    @property
    def device(self) -> str:
        """What it was trained on."""
        return str(self.told.get("train", {}).get("device", "unknown device"))

    def curve(self, name: str, over: str) -> Curve:
        """Return a curve over optimizer steps made or over seconds of initialisation and training.

        Args:
            name: "loss", or a score on the validation rows.
            over: "steps" or "seconds".
        """
        if name == "loss":
            points = [(step + 1.0, value) for step, value in self.curves.get("train/loss", [])]
        else:
            points = [(step + 1.0, value) for step, value in self.curves.get(f"val/{name}", [])]
            start = self.before("after_init", name)
            points = [(0.0, start), *points] if start is not None else points
            last = self.told.get("train", {}).get("steps")
            if last and name in self.validation and (not points or points[-1][0] < last):
                points.append((float(last), self.validation[name]))
        if over == "steps" or not points:
            return points
        steps, values = zip(*points, strict=True)
        return list(zip(self._seconds_at(steps), values, strict=True))

    def _seconds_at(self, steps: Sequence[float]) -> list[float]:
        """Return the seconds up to numbers of steps, between the clock's readings."""
        clock = [(0.0, 0.0)]
        clock += [(step + 1.0, value) for step, value in self.curves.get("train/seconds", [])]
        last = float(self.told.get("train", {}).get("steps", 0))
        if last > clock[-1][0]:
            clock.append((last, self.train_seconds))
        known, passed = np.array(clock).T
        return [float(at) for at in self.init_seconds + np.interp(steps, known, passed)]


@dataclass(frozen=True)
class ExcludedRun:
    """A run that is in no mean, and why.

    Attributes:
        name: Its folder.
        state: `failed`, `diverged`, `missing`, `unfinished`, `repeated`, `unreadable`, or `withdrawn` if its
            comparison does not want it any more.
        reason: In words.
        method: Its method, where known.
        learning_rate: Its rate, where known.
        seed: Its seed, where known.
        settings: What makes its method, where known.
        task: The settings that runs of its task share, where known.
    """

    name: str
    state: str
    reason: str
    method: str | None = None
    learning_rate: float | None = None
    seed: int | None = None
    settings: Settings | None = None
    task: Settings | None = None


def most_at_once(runs: Sequence[Run]) -> int:
    """Return how many runs at most were training at the same time on one machine, as far as they tell."""
    changes: dict[str, list[tuple[float, int]]] = {}
    for run in runs:
        train = run.told.get("train", {})
        if train.get("began") and train.get("ended"):
            of_host = changes.setdefault(str(train.get("host")), [])
            of_host += [(train["began"], 1), (train["ended"], -1)]
    return max(
        (max(accumulate(change for _, change in sorted(found))) for found in changes.values()),
        default=1,
    )
