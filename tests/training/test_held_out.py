"""Which rows a finished run may be scored on: none that it may have been trained on."""

import pytest

from app.training.held_out import check_held_out, data_record
from app.utils.errors import InputError
from data_modules.chat import ChatDataModule
from data_modules.evals.free_answers import FreeAnswers
from data_modules.gsm8k import Gsm8kDataModule
from data_modules.table import TableDataModule
from tests.support.matrix import CHAT_TEMPLATE
from tests.support.rows import attached, write_jsonl

SIZES = {"validation_size": 4, "test_size": 3}
FREE = [{"question": f"{i}?", "answer": f"#### {i}"} for i in range(24)]
TABLE = [{"text": f"film {i}", "label": ("bad", "good")[i % 2]} for i in range(24)]
CHAT = [{"prompt": f"{i}?", "completion": f"It is {i}."} for i in range(24)]


@pytest.fixture
def check(tiny_tokenizer, tmp_path):
    """Return `check(kind, rows, trained, scored, stage)`: is a run of some options scored with others?"""

    def described(kind, rows, options):
        path = write_jsonl(tmp_path / "rows.jsonl", *rows)
        return attached(kind, tiny_tokenizer, path=path, **options)

    def check(kind, rows, trained, scored, stage="test"):
        record = data_record(described(kind, rows, {**SIZES, **trained}))
        check_held_out(record, described(kind, rows, {**SIZES, **trained, **scored}), stage)

    return check


@pytest.mark.parametrize(
    ("trained", "scored", "stage"),
    [
        ({}, {"test_size": 5}, "test"),
        ({}, {"validation_size": 2}, "test"),  # leaves more rows to train, and tests others
        ({}, {"validation_size": 3, "test_size": 4}, "test"),
        ({"test_size": 0, "train_size": 6}, {"test_size": 3}, "test"),
        ({"max_rows": 9}, {"max_rows": None}, "test"),
        ({}, {"validation_size": 5}, "validate"),
        ({"test_size": 0}, {"validation_size": 9, "evals": [FreeAnswers()]}, "test"),
    ],
)
def test_rows_that_may_have_trained_are_refused(trained, scored, stage, check):
    with pytest.raises(InputError, match=r"that the run set aside.*leave out the settings"):
        check(Gsm8kDataModule, FREE, trained, scored, stage)


@pytest.mark.parametrize(
    ("kind", "rows", "trained", "scored"),
    [
        (Gsm8kDataModule, FREE, {}, {}),
        (Gsm8kDataModule, FREE, {}, {"evals": [FreeAnswers()]}),
        (Gsm8kDataModule, FREE, {"test_size": 0}, {"validation_size": 9}),  # nothing is scored
        (TableDataModule, TABLE, {}, {"validation_size": 2}),  # test rows are set aside first
        (TableDataModule, TABLE, {}, {"train_size": 5}),
    ],
)
def test_rows_that_did_not_train_are_scored(kind, rows, trained, scored, check):
    check(kind, rows, trained, scored)


@pytest.mark.parametrize("kind", [TableDataModule, ChatDataModule])
def test_a_file_of_other_rows_is_scored(kind, check, tiny_tokenizer, tmp_path):
    tiny_tokenizer.chat_template = CHAT_TEMPLATE
    rows, split = (TABLE, "test") if kind is TableDataModule else (CHAT, "validation")
    other = [
        {key: f"other {value}" if key != "label" else value for key, value in row.items()}
        for row in rows
    ]
    file = write_jsonl(tmp_path / "other.jsonl", *other)
    trained = {f"{split}_size": None if split == "validation" else 0, "test_size": 0}
    check(kind, rows, trained, {f"{split}_file": file}, "test" if split == "test" else "validate")


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_a_file_does_not_hide_the_other_split(stage, check, tmp_path):
    """Rows set aside of those that trained are refused, though the other split has a file of its own."""
    split, other = ("validation", "test") if stage == "validate" else ("test", "validation")
    file = write_jsonl(tmp_path / "other.jsonl", *TABLE)
    trained = {f"{split}_size": 3, f"{other}_size": None, f"{other}_file": file}
    with pytest.raises(InputError, match=f"the {split} rows are not those"):
        check(TableDataModule, TABLE, trained, {f"{split}_size": 9}, stage)


def test_the_published_validation_rows_are_scored(check, tmp_path):
    """They were the run's test rows."""
    file = write_jsonl(tmp_path / "other.jsonl", *TABLE)
    trained = {"validation_file": file, "validation_size": 4, "test_size": None}
    check(TableDataModule, TABLE, trained, {"validation_size": None}, "validate")


def test_other_data_are_scored(tiny_tokenizer, tmp_path):
    files = [
        write_jsonl(tmp_path / f"{name}.jsonl", *FREE[at:]) for name, at in (("a", 0), ("b", 2))
    ]
    first, second = (attached(Gsm8kDataModule, tiny_tokenizer, path=f, **SIZES) for f in files)
    check_held_out(data_record(first), second, "test")


def test_another_spelling_of_the_path_and_runs_of_earlier_versions(tiny_tokenizer, tmp_path):
    """A summary without digests has the numbers of rows."""
    file = write_jsonl(tmp_path / "rows.jsonl", *FREE)
    path, again = file, str(tmp_path / "x" / ".." / "rows.jsonl")
    first = attached(Gsm8kDataModule, tiny_tokenizer, path=path, **SIZES)
    more = attached(Gsm8kDataModule, tiny_tokenizer, path=again, **{**SIZES, "test_size": 5})
    (tmp_path / "x").mkdir()
    for record in (data_record(first), data_record(first).model_copy(update={"digests": {}})):
        check_held_out(record, first, "test")
        with pytest.raises(InputError, match="it had 17 train, 4 validation, 3 test rows"):
            check_held_out(record, more, "test")
