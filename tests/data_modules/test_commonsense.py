"""Commonsense questions: rows in the prompt of their benchmark."""

import collections
import json

import pytest

from app.utils.errors import InputError
from data_modules.commonsense import CommonsenseDataModule
from data_modules.evals.commonsense import Commonsense, first_option
from tests.support.paths import DATA, needs_data


@needs_data("commonsense")
def test_commonsense_rows_have_the_prompt_of_their_benchmark(tmp_path):
    path = DATA / "commonsense" / "commonsense_train_2k.json"
    examples = list(CommonsenseDataModule(str(path)).examples())
    raw = json.loads(path.read_bytes())
    assert [answer for _, answer in examples] == [row["output"] for row in raw]
    names = collections.Counter(
        first_option(("boolq", "ARC-Easy", "ARC-Challenge", "openbookqa")[i % 4], answer)
        for i, (_, answer) in enumerate(examples)
    )
    assert names == collections.Counter(row["answer"] for row in raw)
    (tmp_path / "boolq").mkdir()
    (tmp_path / "boolq" / "test.json").write_text(json.dumps(raw[::4]))
    asked = [question.prompt for question in Commonsense(str(tmp_path), "boolq").load()]
    assert asked == [prompt for prompt, _ in examples[::4]]


def test_commonsense_has_no_other_source_than_its_file():
    with pytest.raises(InputError, match=r"--data.path is not set.*commonsense_170k.json"):
        CommonsenseDataModule()
