"""Refuse what a data source has made wrongly, by row, and stages that have nothing to work on."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from app.utils.errors import InputError
from data_modules.rows import TextRow

SPLITS = ("train", "validation", "test")
_OF_STAGE = {"fit": ("train", "validation"), "validate": ("validation",), "test": ("test",)}


def splits_of(stage: str | None, splits: Sequence[str]) -> list[str]:
    """Return those of a source's splits that a stage needs."""
    return [split for split in _OF_STAGE.get(stage or "", SPLITS) if split in splits]


def all_splits(loaded: Mapping[str, list[TextRow]], source: str) -> dict[str, list[TextRow]]:
    """Return the rows of every split, none where `load` of the class `source` has left it out.

    Raises:
        InputError: `load` returns no rows by split, or a split of another name.
    """
    if not isinstance(loaded, Mapping):
        raise InputError(
            f"{source}.load() returns {_shown(loaded)}: expected a dict with lists of rows under "
            f"{', '.join(SPLITS)}"
        )
    if unknown := sorted(loaded.keys() - set(SPLITS)):
        raise InputError(
            f"{source}.load() returns rows of {unknown[0]!r}: expected {', '.join(SPLITS)}"
        )
    return {split: loaded.get(split, []) for split in SPLITS}


def check_stage(
    stage: str | None, splits: Sequence[str], has_benchmarks: bool, source: str
) -> None:
    """Raise InputError if there is nothing to train on or to score; warn if nothing scores a training.

    Args:
        stage: `fit`, `validate` or `test`; None for all.
        splits: Those of the stage that have rows.
        has_benchmarks: Whether benchmarks are asked.
        source: Name of the data module's class.
    """
    if stage == "fit" and "train" not in splits:
        raise InputError(
            f"{source} has no rows to train on: name a data module that has some, such as Gsm8kDataModule"
        )
    if not splits and not has_benchmarks:
        raise InputError(
            f"{source} has no rows to score: name a benchmark in --data.evals, as --config eval/gsm8k.yaml "
            "does, or train with --data.test_size"
        )
    if stage == "fit" and "validation" not in splits and not has_benchmarks:
        rank_zero_warn(f"{source} has no validation rows: the training is not scored")


def check_rows(rows: Iterable[Any], name: str, label_words: Sequence[str] = ()) -> None:
    """Raise InputError for the first row that is no `TextRow` of texts, or has no class of `label_words`."""
    for number, row in enumerate(rows):
        where = f"row {number} of {name}"
        if not isinstance(row, TextRow):
            raise InputError(
                f"{where} is {_shown(row)}: expected a TextRow(prompt, answer, target) of "
                "data_modules.rows; correct the data module that data.class_path names"
            )
        _check_text(row.prompt, "prompt", where)
        _check_text(row.answer, "answer", where)
        for turn in row.turns:
            _check_text(turn.content, f"message of the {turn.role}", where)
        # A bool or a number of numpy is a class, too.
        if label_words and row.target not in range(len(label_words)):
            raise InputError(
                f"{where} has the class {_shown(row.target)}, but {len(label_words)} label words "
                f"({', '.join(label_words)}): expected a target from 0 to {len(label_words) - 1}; correct the "
                "data, or the label_words of the data module"
            )


def rows_of_examples(examples: Iterable[Any], name: str) -> list[TextRow]:
    """Return a row for each pair of prompt and answer.

    Raises:
        InputError: One is no pair of texts.
    """
    rows = []
    for number, example in enumerate(examples):
        if not isinstance(example, (tuple, list)) or len(example) != 2:
            raise InputError(
                f"row {number} of {name} is {_shown(example)}: expected a pair of prompt and answer; correct "
                "examples() of the data module that data.class_path names"
            )
        rows.append(TextRow(*example))
    check_rows(rows, name)
    return rows


def _check_text(text: Any, part: str, where: str) -> None:
    if not isinstance(text, str):
        raise InputError(
            f"{where} has the {part} {_shown(text)}: expected text; correct the data (--data.path)"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where} has {text[error.start]!r} in its {part}, half of a character: expected Unicode text; "
            "correct the data (--data.path)"
        ) from error


def _shown(value: Any) -> str:
    return f"{str(value)[:60]!r} ({type(value).__name__})"


def warn_of_repeated(rows_of: Mapping[str, Sequence[TextRow]], source: str) -> None:
    """Say how many training rows are there twice, and how many of the other rows are training rows, too."""
    train = set(rows_of["train"])
    if repeated := len(rows_of["train"]) - len(train):
        rank_zero_warn(f"{repeated} of {len(rows_of['train'])} rows of {source} repeat another row")
    for split, rows in rows_of.items():
        if split != "train" and (known := sum(row in train for row in rows)):
            rank_zero_warn(
                f"{known} of {len(rows)} {split} rows of {source} are training rows, too: their scores measure "
                "what was memorized"
            )
