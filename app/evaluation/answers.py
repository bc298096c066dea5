"""Keep the answers of a benchmark in a file that an interrupted test goes on with."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import torch.distributed as dist

from app.distributed.collectives import from_first_process
from app.distributed.processes import global_rank, is_first_process, world_size
from app.evaluation.benchmark import EncodedQuestion
from app.utils.errors import InputError
from app.utils.files import atomic_write, digest

Answer = dict[str, Any]
"""`key` and `prompt_hash` of a question, its `outputs`, their `tokens` and `finished`, and its `scores`."""

MOMENTS = ("zero_shot", "after_init", "step_", "final", "test")  # in the order of a run


class AnswersFile:
    """Answers as JSON lines, written as they come.

    While questions are being asked, every process has a file of its own (`NAME.part0.jsonl`); a line that
    a kill has cut is not an answer. At the end the first process joins them to `NAME.jsonl`, whole or
    not at all. The name holds a hash of all that an answer depends on beside its prompt, so that no
    answer of another model or of other settings is ever taken for one of this benchmark.

    Args:
        folder: Where the files are; shared by the processes, or else some questions are asked again
            when an interrupted test goes on.
        identity: All that the answers depend on: JSON data.
    """

    def __init__(self, folder: Path, name: str, identity: Mapping[str, Any]) -> None:
        self.folder = folder
        self.stem = f"{name}-{digest(json.dumps(identity, sort_keys=True))[:8]}"
        self.path = folder / f"{self.stem}.jsonl"
        self._stream: TextIO | None = None
        self._before = from_first_process(
            lambda: {key: (row["prompt_hash"], row["scores"]) for key, row in self._read().items()}
        )

    def _parts(self) -> list[Path]:
        return sorted(self.folder.glob(f"{self.stem}.part*.jsonl"))

    def _read(self) -> dict[str, Answer]:
        answers: dict[str, Answer] = {}
        for path in filter(Path.is_file, [self.path, *self._parts()]):
            for line in path.read_text(encoding="utf-8").split("\n"):
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:
                    continue  # the last line of a process that was killed
                answers[row["key"]] = row
        return answers

    def scores_before(self, encoded: EncodedQuestion) -> dict[str, float] | None:
        """Return the scores of a question that was answered before this process began, or None."""
        prompt_hash, scores = self._before.get(encoded.question.key, ("", None))
        return scores if prompt_hash == encoded.prompt_hash else None

    def add(self, answers: list[Answer]) -> None:
        """Write answers at the end of this process's file, synced to disk.

        Raises:
            InputError: The file cannot be written.
        """
        try:
            if self._stream is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                path = self.folder / f"{self.stem}.part{global_rank()}.jsonl"
                self._stream = path.open("a", encoding="utf-8")
                self._stream.write("\n")  # ends a line that a kill has cut
            self._stream.writelines(json.dumps(answer) + "\n" for answer in answers)
            self._stream.flush()
            os.fsync(self._stream.fileno())
        except OSError as error:
            raise InputError(
                f"the answers cannot be written to {str(self.folder)!r} ({error.strerror}): free some space or "
                "set output.root; the same command then goes on where it stopped"
            ) from error

    def join(self, order: Mapping[str, int]) -> None:
        """Join all processes' answers to one file, by the place of each question's key.

        Answers to questions that are not asked now stay, behind.
        """
        if self._stream is not None:
            self._stream.close()
            self._stream = None
        if world_size() > 1:
            dist.barrier()
        if is_first_process():
            rows = sorted(self._read().values(), key=lambda row: order.get(row["key"], len(order)))
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_write(self.path) as stream:  # synced before the parts are gone
                stream.writelines(f"{json.dumps(row)}\n".encode() for row in rows)
            for part in self._parts():
                part.unlink()


def answer_tables(folder: Path) -> dict[str, tuple[list[str], list[list[Any]]]]:
    """Return a table of the answers that have a reference beside them, by the benchmark's name.

    Of a benchmark that was asked twice at a moment, in other ways, the later answers are taken.

    Args:
        folder: Where a folder of each moment is.

    Returns:
        The names of the columns, and the rows: moment, key, prompt, reference, output, scores.
    """
    tables: dict[str, tuple[list[str], list[list[Any]]]] = {}
    # Whole files, NAME-HASH.jsonl: a kill may have left parts of others.
    paths = sorted(folder.glob("*/*-????????.jsonl"), key=lambda path: path.stat().st_mtime)
    last = {(path.parent.name, path.name.rpartition("-")[0]): path for path in paths}
    for (moment, name), path in sorted(last.items(), key=lambda item: _place(item[0][0])):
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if "reference" not in row:
                break
            texts = [row["key"], row["prompt"], row["reference"], row["outputs"][0]]
            scores = {key: value for key, value in row["scores"].items() if not key.startswith("_")}
            columns = ["moment", "key", "prompt", "reference", "output", *scores]
            _, rows = tables.setdefault(name, (columns, []))
            rows.append([moment, *texts, *scores.values()])
    return tables


def _place(moment: str) -> tuple[int, int]:
    """Return the place of a moment in the order of a run: zero_shot, ..., step_5, step_10, final, test."""
    name, _, step = moment.rpartition("_")
    known = f"{name}_" if step.isdigit() else moment
    number = MOMENTS.index(known) if known in MOMENTS else len(MOMENTS)
    return number, int(step) if step.isdigit() else 0
