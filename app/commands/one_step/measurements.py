"""The file of the scores that have been measured, to which a command that goes on adds."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

from app.commands.one_step.command import Step
from app.utils.errors import InputError

Scores = Mapping[str, float | None]
"""Scores by their names; None where one is not finite."""
Rows = int | str
"""What was scored: VALIDATION, or so many training rows that choose eta."""
VALIDATION = "validation"


class Measurements:
    """Scores by step and rows, a line of JSON each; what an interrupted process has begun to write is dropped.

    Args:
        path: The file, which is made with the first line.

    Raises:
        InputError: A line is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._scores: dict[tuple[Step, Rows], Scores] = {}
        content = path.read_bytes() if path.is_file() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            os.truncate(path, len(whole))
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                values = json.loads(line)
                rows, scores = values.pop("rows"), dict(values.pop("scores"))
                self._scores[Step(**values), rows] = scores
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise InputError(
                    f"line {number} of {path} is no measurement: remove the line, or give another --output"
                ) from error

    def __contains__(self, key: tuple[Step, Rows]) -> bool:
        """Return whether a step has been scored on rows."""
        return key in self._scores

    def __getitem__(self, key: tuple[Step, Rows]) -> Scores:
        """Return the scores of a step on rows."""
        return self._scores[key]

    def add(self, step: Step, rows: Rows, scores: Mapping[str, float]) -> Scores:
        """Write and return the scores of a step."""
        finite = {name: value if math.isfinite(value) else None for name, value in scores.items()}
        line = json.dumps({**step._asdict(), "rows": rows, "scores": finite})
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")
        self._scores[step, rows] = finite
        return finite
