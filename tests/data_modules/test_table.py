"""Labelled texts of one's own: columns, labels and their words, and which rows validate and are tested."""

import warnings

import datasets
import pytest

from app.utils.errors import InputError
from data_modules.table import TableDataModule
from tests.support.rows import Hub, attached, texts

NUMBERS = [f"film {i},{'good' if i % 2 else 'bad'}" for i in range(40)]
PAIRS = "a,b,y\nIs it red?,It is.,1\nIs it blue?,It is red.,0\n"


@pytest.fixture
def table(tmp_path):
    """Return `table(*lines, name="rows.csv")`, which writes a CSV of texts and labels and returns its path."""

    def write(*lines, name="rows.csv"):
        (tmp_path / name).write_text("text,label\n" + "".join(f"{line}\n" for line in lines))
        return str(tmp_path / name)

    return write


def read(path, **options):
    """Return a data module of these rows, none of them set aside."""
    return TableDataModule(path, **{"validation_size": 0, "test_size": 0, **options})


def test_prompt_and_label_words(table):
    data = read(table("fine,1", "dull,0"), label_words={"0": "bad", "1": "good"})
    assert texts(data) == [
        ("classify the text: fine\nresult: ", "good"),
        ("classify the text: dull\nresult: ", "bad"),
    ]
    assert [row.target for row in data.rows("train")] == [1, 0]
    data = read(table("{fine},1", "dull,0"), prompt="{{}} Review: {text} It is")
    assert texts(data)[0] == ("{} Review: {fine} It is", "1")


def test_pairs_of_texts_in_columns_of_other_names(tmp_path):
    (tmp_path / "pairs.csv").write_text(PAIRS)
    columns = {"text": "a", "text_pair": "b", "label": "y"}
    data = read(str(tmp_path / "pairs.csv"), **columns)
    assert texts(data)[0][0] == "classify the texts: Is it red?\nIt is.\nresult: "
    data = read(str(tmp_path / "pairs.csv"), **columns, prompt="{text_pair} answers {text}:")
    assert texts(data)[1] == ("It is red. answers Is it blue?:", "0")


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("no field", "has the fields none: expected {text}; --data.text_pair names the column"),
        ("{sentence}", "has the fields sentence: expected {text}"),
        ("{text} {text_pair}", "has the fields text, text_pair: expected {text}"),
        ("{text", r"--data.prompt='{text' \(expected '}' .*other braces doubled"),
        ("{}", "has the fields none: expected {text}"),
        (
            "{text: a film}",
            r"a field has more than a name\): expected {text}, other braces doubled",
        ),
        ("{text!r}", "a field has more than a name"),
    ],
)
def test_prompts_that_are_refused(prompt, message, table):
    with pytest.raises(InputError, match=message):
        TableDataModule(table("a,1", "b,0"), prompt=prompt)


def test_the_order_of_the_classes(table, tmp_path):
    """Numbers by their size, words by the alphabet, classes of `datasets` in their own order."""
    assert read(table("a,10", "b,9", "c,-2")).label_words == ("-2", "9", "10")
    assert read(table("a,ten", "b,nine", "c,10")).label_words == ("10", "nine", "ten")
    assert read(table("a,01", "b,1", "c,0")).label_words == ("0", "01", "1"), "equal numbers"
    assert read(table("a,--1", "b,1")).label_words == ("--1", "1"), "no number"
    rows = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [2, 0, -1]})
    names = datasets.ClassLabel(names=["worse", "same", "better"])
    rows.cast_column("label", names).save_to_disk(tmp_path / "saved")
    data = read(str(tmp_path / "saved"))
    assert data.label_words == ("worse", "same", "better"), "the class without a row, too"
    assert [(row.answer, row.target) for row in data.rows("train")] == [("better", 2), ("worse", 0)]
    assert data.describe()["dropped_rows"] == {"without_text": 0, "without_label": 1}
    words = {"better": "up", "worse": "down", "same": "level"}
    data = read(str(tmp_path / "saved"), label_words=words)
    assert [(row.answer, row.target) for row in data.rows("train")] == [("up", 0), ("down", 1)]


@pytest.mark.parametrize("words", [{"0": "bad"}, {"0": "bad", "1": " "}])
def test_label_words_that_are_refused(words, table):
    with pytest.raises(InputError, match="expected a word for each of two labels or more"):
        TableDataModule(table("a,1", "b,0"), label_words=words)


def test_one_class_with_words_for_two_is_refused(table):
    with pytest.raises(InputError, match="have the label '1': expected two classes or more"):
        read(table("a,1", "b,1"), label_words={"0": "bad", "1": "good"}).load()


def test_a_label_of_no_class_is_named(table):
    path, other = table("a,good", "b,bad"), table("c,godo", name="other.csv")
    message = (
        "row 0 of .*other.csv has the label 'godo': expected one of bad, good; did you mean good"
    )
    with pytest.raises(InputError, match=f"{message}.*change --data.validation_file"):
        TableDataModule(path, validation_file=other).load()
    with pytest.raises(
        InputError, match=r"has the label 'bad': expected a key of --data.label_words: good, b"
    ):
        read(path, label_words={"good": "yes", "b": "no"}).load()


def test_labels_that_differ_in_capitals_are_told_of(table):
    rows = "a,Good", "b,bad", "c,good", "d,STRASSE", "e,straße", "f,fine"
    message = r"classes of .*rows.csv differ in capitals alone: Good, STRASSE, good, straße; write"
    data = read(table(*rows))
    with pytest.warns(UserWarning, match=message):
        found = data.label_words
    assert found == ("Good", "STRASSE", "bad", "fine", "good", "straße"), "all are kept"
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert read(table("a,Good", "b,bad")).label_words == ("Good", "bad")
        words = {"Good": "yes", "good": "yes indeed", "bad": "no"}
        assert read(table("a,Good", "b,bad", "c,good"), label_words=words).load()["train"]


def test_labels_that_begin_with_one_token_are_told_of(table, tiny_tokenizer):
    data = attached(TableDataModule, tiny_tokenizer, path=table("a,goat", "b,good", "c,goal"))
    with pytest.raises(
        InputError, match=r"'goal' and 'goat' .* begin with the same token .*--data.label_words"
    ):
        data.label_token_ids()


def test_a_tenth_validates_and_is_tested_where_nothing_else_is_given(table):
    data = TableDataModule(table(*NUMBERS))
    with pytest.warns(UserWarning, match="has no test rows: those that validate are tested"):
        rows = data.load()
    assert {split: len(part) for split, part in rows.items()} == {
        "train": 36,
        "validation": 4,
        "test": 4,
    }
    assert rows["test"] == rows["validation"]


def test_of_a_few_rows_none_validates_and_that_is_said(table, caplog):
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        rows = TableDataModule(table(*NUMBERS[:6])).load()
    assert [len(rows[split]) for split in ("train", "validation", "test")] == [6, 0, 0]
    assert "a tenth of 6 training rows is none, so none is set aside (--data.val" in caplog.text


def test_files_and_sizes_of_the_parts(table):
    path = table(*NUMBERS)
    one = table("x,good", name="one.csv")
    two = table("y,bad", "z,good", name="two.csv")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        rows = TableDataModule(path, validation_file=one, test_file=two).load()
        assert [len(rows[split]) for split in ("train", "validation", "test")] == [40, 1, 2]
        rows = TableDataModule(path, validation_size=5, test_size=7).load()
        assert [len(rows[split]) for split in ("train", "validation", "test")] == [28, 5, 7]
        assert len({row.prompt for part in rows.values() for row in part}) == 40
        rows = TableDataModule(path, validation_size=5, validation_file=one).load()
        assert [len(rows[split]) for split in ("train", "validation", "test")] == [35, 5, 1]


def test_rows_that_are_trained_on_and_scored_are_told_of(table):
    path, other = table(*NUMBERS), table(NUMBERS[3], "new,bad", name="other.csv")
    with pytest.warns(UserWarning, match="1 of 2 test rows of .* are training rows, too"):
        TableDataModule(path, test_file=other).load()


def test_splits_of_the_hub(monkeypatch):
    rows = [{"sentence": f"film {i}", "label": i % 2} for i in range(6)]
    Hub(monkeypatch, train=rows, validation=rows[:1], test=rows[1:3])
    data = TableDataModule("someone/films", text="sentence")
    with pytest.warns(UserWarning, match="are training rows, too"):
        data.prepare_data()
    assert [len(data.rows(split)) for split in ("train", "validation", "test")] == [6, 1, 2]
    assert data.describe()["source"] == "someone/films"


def test_a_published_test_set_without_labels_is_none(tmp_path):
    """As GLUE's, whose labels are -1, which is a class like others where classes have no names."""
    rows = datasets.Dataset.from_dict({"text": list("abcdef"), "label": [0, 1, 0, 1, 0, -1]})
    named = rows.cast_column("label", datasets.ClassLabel(names=["bad", "good"]))
    for name, part in (("named", named), ("numbers", rows)):
        parts = {"train": part.select(range(4)), "validation": part.select([4])}
        parts |= {"test": part.select([5])}
        datasets.DatasetDict(parts).save_to_disk(tmp_path / name)
    data = TableDataModule(str(tmp_path / "named"))
    with pytest.warns(UserWarning, match="has no test rows: those that validate are tested"):
        assert data.rows("test") == data.rows("validation") != []
    assert data.describe()["dropped_rows"]["without_label"] == 1
    with pytest.raises(InputError, match=r"\(test\) has the label '-1': expected one of 0, 1"):
        TableDataModule(str(tmp_path / "numbers")).load()


def test_a_test_file_without_labels_is_refused(table):
    path, other = table(*NUMBERS), table("a,", name="none.csv")
    message = r"none.csv has no row with both a text and a label.* change --data.test_file"
    with pytest.raises(InputError, match=message):
        TableDataModule(path, test_file=other).load()
