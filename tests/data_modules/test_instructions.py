"""Instructions in Alpaca's form: the real files, refusals, and which tokens are supervised."""

import json
import re

import pytest

from app.utils.errors import InputError
from data_modules.instructions import InstructionDataModule
from tests.support.paths import DATA, needs_data
from tests.support.rows import attached, from_file, texts


@needs_data("code")
@pytest.mark.parametrize(
    ("file", "rows", "empty", "without_input"),
    [("code_alpaca_2k.json", 2017, 2, 1011), ("new_codealpaca.json.gz", 4535, 0, 955)],
)
def test_code_alpaca(file, rows, empty, without_input):
    data = InstructionDataModule(str(DATA / "code" / file))
    examples = list(data.examples())
    paired = [prompt for prompt, _ in examples if prompt.startswith("### Instruction:\n")]
    single = [prompt for prompt, _ in examples if prompt.startswith("Below is an instruction")]
    assert (len(examples), len(single), len(paired)) == (rows, without_input, rows - without_input)
    assert all("\n\n### Input:\n" in prompt for prompt in paired)
    assert all(prompt.endswith("\n\n### Response:\n") for prompt, _ in examples)
    assert sum(not answer.strip() for _, answer in examples) == empty


@needs_data("code")
def test_an_empty_answer_is_dropped_and_counted(tiny_tokenizer):
    path = DATA / "code" / "code_alpaca_2k.json"
    raw = json.loads(path.read_bytes())
    data = attached(InstructionDataModule, tiny_tokenizer, path=str(path), validation_size=17)
    assert len(data.rows("train")) == 2017 - 2 - 17
    assert data.describe()["dropped_rows"]["empty_answer"] == 2
    empty = {row["instruction"] for row in raw if not row["output"].strip()}
    kept = texts(data, "train", "validation")
    assert len(empty) == 2
    headed = [f"### Instruction:\n{text}\n\n" for text in empty]
    assert not any(head in prompt for prompt, _ in kept for head in headed)


@needs_data("math")
def test_arithmetic_of_llm_adapters_has_its_prompt_and_rationale():
    path = DATA / "math" / "llm_adapters_math_data.json"
    rows = list(InstructionDataModule(str(path)).examples())
    assert len(rows) == 2205
    rationales = [answer for _, answer in rows if re.search(r"\n(A|Rationale):", answer)]
    assert len(rationales) == 2205, "not the field `answer`, which is 4.0, 16 or C"
    assert sum(answer.startswith("\n") for answer in rationales) == 2201
    assert all(prompt.startswith("Below is an instruction") for prompt, _ in rows)


def test_refusals_are_left_out_where_asked(tiny_tokenizer, tmp_path):
    outputs = ["Sorry, no.", "As an AI model I cannot.", "A sorry tale", "Yes.", "Fine."]
    rows = [{"instruction": f"i{i}", "output": text} for i, text in enumerate(outputs)]
    data = from_file(InstructionDataModule, tiny_tokenizer, tmp_path, rows, drop_refusals=True)
    kept = [answer for _, answer in texts(data, "train", "validation")]
    assert sorted(kept) == ["Fine.", "Yes."]
    assert data.describe()["dropped_rows"]["refusal"] == 3
    assert len(texts(from_file(InstructionDataModule, tiny_tokenizer, tmp_path, rows))) == 4


def test_what_is_supervised(tiny_tokenizer, tmp_path):
    """The answer and EOS alone, right behind the prompt; no space at the start of a line."""
    rows = [{"instruction": str(i), "output": "Ok\n"} for i in (1, 2)]
    data = from_file(InstructionDataModule, tiny_tokenizer, tmp_path, rows)
    (batch,) = data.train_dataloader()
    labels = batch["labels"][0]
    supervised = batch["input_ids"][0][labels != -100]
    assert tiny_tokenizer.decode(supervised) == "Ok\n<eos>"
    text = tiny_tokenizer.decode(batch["input_ids"][0])
    assert text.endswith("### Response:\nOk\n<eos>")


def test_what_is_left_out_of_a_row_is_told(tmp_path):
    rows = [{"instruction": f"add {i}", "output": "x"} for i in range(3)]
    rows[1]["history"] = [["a", "b"]]
    rows[2]["system"] = "You count."
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(rows))
    with pytest.warns(
        UserWarning, match="2 rows of .*rows.json have a history or system, which is"
    ):
        assert len(list(InstructionDataModule(str(file)).examples())) == 3
    rows[0]["input"] = {"a": 1}
    file.write_text(json.dumps(rows))
    with pytest.raises(InputError, match=r'row 0 of .*rows.json has {"a": 1} as input: expected'):
        list(InstructionDataModule(str(file)).examples())
