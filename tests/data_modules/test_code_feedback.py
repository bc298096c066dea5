"""Code-Feedback: answers up to the end of their first block of code."""

import json

from data_modules.code_feedback import CodeFeedbackDataModule
from data_modules.instructions import instruction_prompt
from tests.support.paths import DATA, needs_data
from tests.support.rows import from_file, texts


@needs_data("code")
def test_code_feedback_ends_with_the_first_block(tiny_tokenizer, tmp_path):
    (real,) = map(json.loads, (DATA / "code" / "codefeedback_quoted_row.jsonl").open())
    rows = [
        real,
        {"query": "two", "answer": "Say ```a``` and ```b``` too."},
        {"query": "none", "answer": "No code."},
        {"query": "open", "answer": "```python\nprint(1)"},
        {"query": "one", "answer": "```python\nprint(1)\n```\nThat is all."},
    ]
    data = from_file(CodeFeedbackDataModule, tiny_tokenizer, tmp_path, rows)
    answers = dict(texts(data, "train", "validation"))
    assert len(answers) == 4
    assert answers[instruction_prompt("open")] == "```python\nprint(1)```"
    assert answers[instruction_prompt("two")] == "Say ```a```"
    assert answers[instruction_prompt("one")] == "```python\nprint(1)\n```"
    assert answers[instruction_prompt(real["query"])].endswith("Age >= 18;\n```")
    assert data.describe()["dropped_rows"]["without_code"] == 1
