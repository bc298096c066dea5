"""Answers that are written as they come, and read again."""

import json

import pytest

from app.evaluation.answers import AnswersFile
from app.evaluation.benchmark import EncodedQuestion, Question
from app.utils.errors import InputError
from app.utils.files import digest

IDENTITY = {"name": "gsm8k", "version": "1", "weights": "abc"}


def answer(number, prompt="", score=1.0):
    return {
        "key": f"gsm8k/{number}",
        "prompt_hash": digest(prompt),
        "outputs": [f"{number} é\n"],
        "scores": {"strict": score},
    }


def scores_before(file, number, prompt=""):
    question = Question(f"gsm8k/{number}", prompt, None)
    return file.scores_before(EncodedQuestion(question, [1], digest(prompt)))


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines() if line]


def test_answers_are_in_the_order_of_the_questions_and_nothing_else_is_left(tmp_path):
    file = AnswersFile(tmp_path, "gsm8k", IDENTITY)
    file.add([answer(2), answer(0)])
    file.add([answer(1)])
    file.join({f"gsm8k/{i}": i for i in range(3)})
    assert rows(file.path) == [answer(0), answer(1), answer(2)]
    assert list(tmp_path.iterdir()) == [file.path]


def test_an_interrupted_evaluation_finds_its_whole_lines(tmp_path):
    file = AnswersFile(tmp_path, "gsm8k", IDENTITY)
    file.add([answer(0, score=0.25), answer(1)])
    (part,) = tmp_path.iterdir()
    part.write_text(part.read_text()[:-20])  # the last line is cut
    again = AnswersFile(tmp_path, "gsm8k", IDENTITY)
    assert scores_before(again, 0) == {"strict": 0.25}
    assert scores_before(again, 1) is None
    again.add([answer(1), answer(2)])
    again.join({f"gsm8k/{i}": i for i in range(3)})
    assert rows(again.path) == [answer(0, score=0.25), answer(1), answer(2)]


def test_a_larger_test_goes_on_from_a_smaller_one(tmp_path):
    file = AnswersFile(tmp_path, "gsm8k", IDENTITY)
    file.add([answer(5)])
    file.join({"gsm8k/5": 0})
    again = AnswersFile(tmp_path, "gsm8k", IDENTITY)
    assert scores_before(again, 5) == {"strict": 1.0}
    again.add([answer(0)])
    again.join({"gsm8k/0": 0, "gsm8k/5": 5})
    assert [row["key"] for row in rows(again.path)] == ["gsm8k/0", "gsm8k/5"]


def test_only_answers_of_this_model_version_and_prompt_are_taken(tmp_path):
    file = AnswersFile(tmp_path, "gsm8k", IDENTITY)
    file.add([answer(0, "Q: 1+1")])
    file.join({"gsm8k/0": 0})
    again = AnswersFile(tmp_path, "gsm8k", IDENTITY)
    assert scores_before(again, 0, "Q: 1+1") == {"strict": 1.0}
    assert scores_before(again, 0, "Q: 1+2") is None
    for changed in ({"weights": "abd"}, {"version": "2"}):
        other = AnswersFile(tmp_path, "gsm8k", {**IDENTITY, **changed})
        assert scores_before(other, 0, "Q: 1+1") is None
        assert other.path != file.path


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "answers").write_text("a file")
    file = AnswersFile(tmp_path / "answers", "gsm8k", IDENTITY)
    with pytest.raises(InputError, match=r"answers.*output\.root"):
        file.add([answer(0)])
