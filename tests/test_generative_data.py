"""Training data with free answers: the real files with their traps, and the authors' rules."""

import collections
import gzip
import json

import pytest
from conftest import ROOT

from app.errors import InputError
from data_modules.code_feedback import CodeFeedbackDataModule
from data_modules.evals.commonsense import Commonsense
from data_modules.evals.gsm8k import Gsm8k
from data_modules.generative import GenerativeDataModule
from data_modules.gsm8k import Gsm8kDataModule
from data_modules.instructions import InstructionDataModule, instruction_prompt
from data_modules.metamath import MetaMathQADataModule

DATA = ROOT.parent / "shared" / "data"


@pytest.fixture
def attached(tiny_tokenizer):
    """Return `attached(kind, ...)`: a data module with a tokenizer of one token a character."""

    def make(kind, **options):
        data = kind(**{"max_length": 100_000, "validation_size": 1, **options})
        data.attach(tiny_tokenizer, is_encoder_decoder=False, context_length=None)
        return data

    return make


def texts(data, split="train"):
    return [(row.prompt, row.answer) for row in data.rows(split)]


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_every_row_of_gsm8k(attached):
    path = DATA / "gsm8k" / "train.jsonl.gz"
    raw = [json.loads(line) for line in gzip.open(path, "rt", encoding="utf-8")]
    data = attached(Gsm8kDataModule, path=str(path), validation_size=473)
    train, held = texts(data), texts(data, "validation")
    assert (len(train), len(held)) == (7000, 473)
    by_prompt = {f"Q: {row['question']}\nA: ": row["answer"] for row in raw}
    assert len(by_prompt) == 7473
    assert {prompt for prompt, _ in train + held} == set(by_prompt)
    for prompt, answer in train + held:
        assert "<<" not in answer
        assert answer.rpartition("#### ")[2] == by_prompt[prompt].rpartition("#### ")[2]
    marks = attached(Gsm8kDataModule, path=str(path), calculations=True)
    assert dict(texts(marks) + texts(marks, "validation")) == by_prompt


def test_training_and_benchmark_of_gsm8k_have_one_prompt(attached):
    data = attached(Gsm8kDataModule, path=str(DATA / "gsm8k" / "test.jsonl"))
    asked = {question.prompt for question in Gsm8k(str(DATA / "gsm8k" / "test.jsonl")).load()}
    assert {prompt for prompt, _ in texts(data) + texts(data, "validation")} == asked


def test_metamath_rows_are_prepared_as_the_authors_do(attached):
    path = str(DATA / "math" / "metamathqa_quoted_rows.json")
    data = attached(MetaMathQADataModule, path=path, max_rows=4)
    rows = texts(data) + texts(data, "validation")
    raw = json.loads((DATA / "math" / "metamathqa_quoted_rows.json").read_text())
    gsm = [row for row in raw if row["type"].startswith("GSM")]
    assert [prompt for prompt, _ in rows] == [f"Q: {row['query']}\nA: " for row in gsm]
    ends = [answer.rpartition("\n")[2] for _, answer in rows]
    assert ends == ["#### 752", "#### 1200", "#### 75", "#### 7", "#### 240"]
    assert not any("The answer is" in answer for _, answer in rows)
    whole = attached(MetaMathQADataModule, path=path, subset="all")
    answers = [answer for _, answer in texts(whole) + texts(whole, "validation")]
    assert len(answers) == 6
    assert any(answer.endswith("\\boxed{\\sqrt{5}}$ units apart.") for answer in answers)


def test_the_first_rows_train_and_those_behind_validate(attached, tmp_path):
    """Five questions of which the second is too long: three train, and the fifth validates."""
    rows = [
        {"query": f"{i}" + "x" * (100 if i == 1 else 0), "response": "#### 1", "type": "GSM_SV"}
        for i in range(6)
    ]
    path = written(tmp_path / "rows.jsonl", rows)
    data = attached(MetaMathQADataModule, path=path, max_rows=3, max_length=30)
    assert [prompt[3] for prompt, _ in texts(data)] == ["0", "2", "3"]
    assert [prompt[3] for prompt, _ in texts(data, "validation")] == ["4"]
    assert data.describe()["dropped_rows"] == {"empty_answer": 0, "too_long": 1}
    assert [row.index for row in data.encoded("train")] == [0, 1, 2]


def test_where_no_rows_follow_some_are_set_aside(attached, tmp_path):
    rows = [{"query": str(i), "response": "a", "type": "GSM"} for i in range(10)]
    path = written(tmp_path / "rows.jsonl", rows)
    found = [
        attached(MetaMathQADataModule, path=path, validation_size=4, seed=seed) for seed in (0, 1)
    ]
    held = [texts(data, "validation") for data in found]
    assert held[0] == held[1], "whatever the seed"
    assert len(held[0]) == 4
    assert not set(held[0]) & set(texts(found[0]))


def test_code_feedback_ends_with_the_first_block(attached, tmp_path):
    (real,) = map(json.loads, (DATA / "code" / "codefeedback_quoted_row.jsonl").open())
    rows = [
        real,
        {"query": "two", "answer": "Say ```a``` and ```b``` too."},
        {"query": "none", "answer": "No code."},
        {"query": "open", "answer": "```python\nprint(1)"},
        {"query": "one", "answer": "```python\nprint(1)\n```\nThat is all."},
    ]
    data = attached(CodeFeedbackDataModule, path=written(tmp_path / "rows.jsonl", rows))
    found = dict(texts(data) + texts(data, "validation"))
    assert len(found) == 3
    assert found[instruction_prompt("two")] == "Say ```a```"
    assert found[instruction_prompt("one")] == "```python\nprint(1)\n```"
    assert found[instruction_prompt(real["query"])].endswith("Age >= 18;\n```")
    assert data.describe()["dropped_rows"]["without_code"] == 2


@pytest.mark.parametrize(
    ("file", "rows", "empty", "without_input"),
    [("code_alpaca_2k.json", 2017, 2, 1011), ("new_codealpaca.json.gz", 4535, 0, 955)],
)
def test_code_alpaca(file, rows, empty, without_input, attached):
    data = attached(InstructionDataModule, path=str(DATA / "code" / file))
    found = texts(data) + texts(data, "validation")
    assert len(found) == rows - empty
    assert data.describe()["dropped_rows"]["empty_answer"] == empty
    assert all(prompt.endswith("\n\n### Response:\n") for prompt, _ in found)
    paired = sum("\n\n### Input:\n" in prompt for prompt, _ in found)
    dropped = sum(not row["output"].strip() and not row["input"] for row in _json(file))
    assert len(found) - paired == without_input - dropped


def _json(file):
    path = DATA / "code" / file
    return json.loads(gzip.open(path).read() if path.suffix == ".gz" else path.read_bytes())


def test_commonsense_rows_have_the_prompt_of_their_benchmark(attached):
    path = str(DATA / "commonsense" / "commonsense_train_2k.json")
    data = attached(InstructionDataModule, path=path)
    found = texts(data) + texts(data, "validation")
    assert len(found) == 2000
    question = Commonsense(str(DATA / "commonsense"), "boolq").load()[0]
    start = question.prompt.partition("### Instruction")[0]
    assert all(
        prompt.startswith(start) and prompt.endswith("### Response:\n") for prompt, _ in found
    )
    first = collections.Counter(answer.split(" ")[0] for _, answer in found)
    assert first == {"the": 2000}


def test_refusals_are_left_out_where_asked(attached, tmp_path):
    outputs = ["Sorry, no.", "As an AI model I cannot.", "A sorry tale", "Yes."]
    rows = [{"instruction": f"i{i}", "output": text} for i, text in enumerate(outputs)]
    path = written(tmp_path / "rows.jsonl", [*rows, {"instruction": "z", "output": "Fine."}])
    data = attached(InstructionDataModule, path=path, drop_refusals=True)
    assert sorted(answer for _, answer in texts(data) + texts(data, "validation")) == [
        "Fine.",
        "Yes.",
    ]
    assert data.describe()["dropped_rows"]["refusal"] == 3
    assert len(texts(attached(InstructionDataModule, path=path))) == 4


def test_what_is_supervised(attached, tiny_tokenizer, tmp_path):
    """The answer and EOS alone, right behind the prompt; no space at the start of a line."""
    path = written(
        tmp_path / "rows.jsonl", [{"instruction": str(i), "output": "Ok\n"} for i in (1, 2)]
    )
    data = attached(InstructionDataModule, path=path)
    (batch,) = data.train_dataloader()
    labels = batch["labels"][0]
    supervised = batch["input_ids"][0][labels != -100]
    assert tiny_tokenizer.decode(supervised) == "Ok\n<eos>"
    text = tiny_tokenizer.decode(batch["input_ids"][0])
    assert text.endswith("### Response:\nOk\n<eos>")
    math = attached(Gsm8kDataModule, path=str(DATA / "gsm8k" / "test.jsonl"), train_size=1)
    (batch,) = math.train_dataloader()
    assert "\nA: " in tiny_tokenizer.decode(batch["input_ids"][0])
    assert "\nA:  " not in tiny_tokenizer.decode(batch["input_ids"][0])


WRONG = {
    "missing": (InstructionDataModule, None, "--data.path"),
    "field": (InstructionDataModule, [{"instruction": "a"}], "instruction, output"),
    "foreign": (MetaMathQADataModule, [{"question": "a"}], "query, response, type"),
    "empty": (InstructionDataModule, [], "no row"),
    "answers": (InstructionDataModule, [{"instruction": "a", "output": " "}], "with an answer"),
    "long": (
        InstructionDataModule,
        [{"instruction": "a" * 999, "output": "b"}],
        "--data.max_length=300",
    ),
    "few": (InstructionDataModule, [{"instruction": "a", "output": "b"}], "validation_size"),
    "no_code": (CodeFeedbackDataModule, [{"query": "a", "answer": "b"}], "code_feedback"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_read(case, attached, tmp_path):
    kind, rows, told = WRONG[case]
    path = str(tmp_path / "rows.jsonl")
    if rows is not None:
        written(tmp_path / "rows.jsonl", rows)
    with pytest.raises(InputError, match=told):
        attached(kind, path=path, max_length=300).rows("train")


@pytest.mark.parametrize("options", [{"max_rows": 0}, {"validation_size": 0}])
def test_sizes_below_one(options):
    with pytest.raises(InputError, match=next(iter(options))):
        Gsm8kDataModule(path="x", **options)


def test_each_source_writes_its_examples():
    assert len(GenerativeDataModule.__subclasses__()) >= 4
    for kind in GenerativeDataModule.__subclasses__():
        assert kind.examples is not GenerativeDataModule.examples
