"""Refuse what a data source's `load` returns, and stages that have nothing to work on."""

from collections.abc import Mapping, Sequence

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from app.utils.errors import InputError
from data_modules.encoding import TextRow

SPLITS = ("train", "validation", "test")


def all_splits(loaded: Mapping[str, list[TextRow]], source: str) -> dict[str, list[TextRow]]:
    """Return the rows of every split, none where `load` of the class `source` has left it out.

    Raises:
        InputError: `load` returns a split of another name.
    """
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
            f"{source} has no rows to score: name a benchmark in --data.evals, as --config eval/gsm8k.yaml does"
        )
    if stage == "fit" and "validation" not in splits and not has_benchmarks:
        rank_zero_warn(f"{source} has no validation rows: the training is not scored")
