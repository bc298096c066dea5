"""Rows that a user's data module has made wrongly: one line with the row's number and set."""

import json

import pytest

from app.utils.errors import InputError
from data_modules.generative import GenerativeDataModule
from data_modules.instructions import InstructionDataModule
from data_modules.rows import TextRow
from data_modules.text import TextDataModule
from tests.support.tokenizers import WORDS

GOOD = TextRow("classify: a film\nresult: ", "negative")


class Rows(TextDataModule):
    task_name = "mine"
    label_words = WORDS

    def __init__(self, wrong):
        super().__init__()
        self.wrong = wrong

    def load(self):
        return {"train": [GOOD], "validation": [GOOD, GOOD, self.wrong], "test": [GOOD]}


class Pairs(GenerativeDataModule):
    task_name = "pairs"

    def __init__(self, wrong):
        super().__init__()
        self.wrong = wrong

    def examples(self):
        yield "a", "b"
        yield self.wrong


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prompt": "a", "answer": "b"}, "is .*prompt.*(dict): expected a TextRow"),
        (("a", "negative", 0), ".*(tuple): expected a TextRow"),
        (None, "is 'None' (NoneType): expected a TextRow"),
        (TextRow(None, "negative"), "has the prompt 'None' (NoneType): expected text"),
        (TextRow("a", 7), "has the answer '7' (int): expected text"),
        (TextRow(b"a", "negative"), "has the prompt .*(bytes): expected text"),
        (TextRow("a\ud83d", "negative"), r"has '\\ud83d' in its prompt, half of a character"),
        (TextRow("a", "positive", 2), "has the class '2' (int), but 2 label words (negative,"),
        (TextRow("a", "positive", -1), "has the class '-1' (int), but 2 label words"),
        (TextRow("a", "positive", "1"), "has the class '1' (str), but 2 label words"),
    ],
)
def test_a_wrong_row_is_named(wrong, message):
    pattern = message.replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(InputError, match=f"^row 2 of mine validation {pattern}"):
        Rows(wrong).rows("train")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prompt": "a", "answer": "b"}, r"\(dict\): expected a pair of prompt and answer"),
        ("ab", r"is 'ab' \(str\): expected a pair"),
        (("a", "b", 1), r"\(tuple\): expected a pair"),
        (("a", None), r"has the answer 'None' \(NoneType\): expected text"),
    ],
)
def test_a_wrong_example_is_named(wrong, message):
    with pytest.raises(InputError, match=f"^row 1 of pairs .*{message}"):
        Pairs(wrong).read()


def test_rows_that_are_not_by_split():
    rows = Rows(GOOD)
    rows.load = lambda: [GOOD]
    with pytest.raises(InputError, match=r"^Rows.load\(\) returns .*\(list\): expected a dict"):
        rows.rows("train")


def test_half_a_character_in_a_file(tmp_path):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([{"instruction": "a", "output": "\ud83d"}]))
    with pytest.raises(InputError, match=r"row 0 of instructions .* in its answer"):
        InstructionDataModule(str(file)).read()


def test_rows_without_classes_have_any_target():
    rows = Rows(TextRow("a", "b", 5))
    rows.label_words = ()
    assert len(rows.rows("validation")) == 3
