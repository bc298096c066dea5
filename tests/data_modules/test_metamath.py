"""MetaMathQA: rows as the authors prepare them."""

import json

from data_modules.metamath import MetaMathQADataModule
from tests.support.paths import DATA, needs_data
from tests.support.rows import attached, texts


@needs_data("math")
def test_metamath_rows_are_prepared_as_the_authors_do(tiny_tokenizer):
    path = str(DATA / "math" / "metamathqa_quoted_rows.json")
    data = attached(MetaMathQADataModule, tiny_tokenizer, path=path, keep_below=None, max_rows=4)
    rows = texts(data, "train", "validation")
    raw = json.loads((DATA / "math" / "metamathqa_quoted_rows.json").read_text())
    gsm = [row for row in raw if row["type"].startswith("GSM")]
    assert [prompt for prompt, _ in rows] == [f"Q: {row['query']}\nA: " for row in gsm]
    assert data.describe()["dropped_rows"]["not_gsm"] == 1
    ends = [answer.rpartition("\n")[2] for _, answer in rows]
    assert ends == ["#### 752", "#### 1200", "#### 75", "#### 7", "#### 240"]
    assert not any("The answer is" in answer for _, answer in rows)
    whole = attached(MetaMathQADataModule, tiny_tokenizer, path=path, keep_below=None, subset="all")
    answers = [answer for _, answer in texts(whole, "train", "validation")]
    assert len(answers) == 6
    assert any(answer.endswith("\\boxed{\\sqrt{5}}$ units apart.") for answer in answers)


@needs_data("math")
def test_pefts_form_has_its_prompt_and_the_whole_response(tiny_tokenizer):
    path = DATA / "math" / "metamathqa_quoted_rows.json"
    options = {"prompt": "peft", "subset": "all", "keep_below": None, "max_rows": 5}
    data = attached(MetaMathQADataModule, tiny_tokenizer, path=str(path), **options)
    raw = json.loads(path.read_text())
    assert texts(data, "train", "validation") == [
        (f"Question: {row['query']} Think step by step.\nAnswer:", row["response"]) for row in raw
    ]
