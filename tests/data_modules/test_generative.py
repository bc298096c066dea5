"""Training data with free answers: the real files with their traps, and the authors' rules."""

import collections
import gzip
import json
import re

import pytest
from transformers import AutoTokenizer

from app.utils.errors import InputError
from data_modules.code_feedback import CodeFeedbackDataModule
from data_modules.commonsense import CommonsenseDataModule
from data_modules.evals.commonsense import Commonsense, first_option
from data_modules.evals.gsm8k import Gsm8k
from data_modules.generative import GenerativeDataModule
from data_modules.gsm8k import Gsm8kDataModule
from data_modules.instructions import InstructionDataModule, instruction_prompt
from data_modules.metamath import MetaMathQADataModule
from tests.support.paths import ROOT

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


def test_every_row_of_gsm8k():
    """As written: thousands commas, minus signs, characters beyond ASCII, marks in most rows."""
    path = DATA / "gsm8k" / "train.jsonl.gz"
    raw = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    rows = list(Gsm8kDataModule(str(path)).examples())
    assert rows == [(f"Q: {row['question']}\nA: ", row["answer"]) for row in raw]
    numbers = [answer.rpartition("#### ")[2] for _, answer in rows]
    assert (len(numbers), sum("," in n for n in numbers)) == (7473, 79)
    assert sum(n.startswith("-") for n in numbers) == 3
    assert sum(not (prompt + answer).isascii() for prompt, answer in rows) == 651
    assert sum("<<" not in answer for _, answer in rows) == 95
    bare = list(Gsm8kDataModule(str(path), calculations=False).examples())
    assert not any("<<" in answer or ">>" in answer for _, answer in bare)
    assert [answer.rpartition("#### ")[2] for _, answer in bare] == numbers
    assert bare[0][1].startswith("Natalia sold 48/2 = 24 clips in May.\n")


def test_training_and_benchmark_of_gsm8k_have_one_prompt():
    path = str(DATA / "gsm8k" / "test.jsonl")
    asked = [question.prompt for question in Gsm8k(path).load()]
    assert [prompt for prompt, _ in Gsm8kDataModule(path).examples()] == asked
    assert len(asked) == 923


def test_metamath_rows_are_prepared_as_the_authors_do(attached):
    path = str(DATA / "math" / "metamathqa_quoted_rows.json")
    data = attached(MetaMathQADataModule, path=path, keep_below=None, max_rows=4)
    rows = texts(data) + texts(data, "validation")
    raw = json.loads((DATA / "math" / "metamathqa_quoted_rows.json").read_text())
    gsm = [row for row in raw if row["type"].startswith("GSM")]
    assert [prompt for prompt, _ in rows] == [f"Q: {row['query']}\nA: " for row in gsm]
    assert data.describe()["dropped_rows"]["not_gsm"] == 1
    ends = [answer.rpartition("\n")[2] for _, answer in rows]
    assert ends == ["#### 752", "#### 1200", "#### 75", "#### 7", "#### 240"]
    assert not any("The answer is" in answer for _, answer in rows)
    whole = attached(MetaMathQADataModule, path=path, keep_below=None, subset="all")
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
    assert data.describe()["dropped_rows"] == {
        "not_gsm": 0,
        "empty_answer": 0,
        "too_long": 1,
    }
    assert [row.index for row in data.encoded("train")] == [0, 1, 2]


@pytest.mark.parametrize("chunk", [1, 2, 3, 1024])
def test_reading_ends_where_enough_rows_are_found(chunk, attached, tmp_path, monkeypatch):
    """Rows 1, 4, 7, ... are too long; 4 rows train, 3 validate, whatever is encoded at once."""
    rows = [
        {"query": f"{i:02}" + "x" * (99 if i % 3 == 1 else 0), "response": "#### 1", "type": "GSM"}
        for i in range(40)
    ]
    monkeypatch.setattr("data_modules.generative.CHUNK_ROWS", chunk)
    path = written(tmp_path / "rows.jsonl", rows)
    data = attached(MetaMathQADataModule, path=path, max_rows=4, validation_size=3, keep_below=50)
    assert [prompt[3:5] for prompt, _ in texts(data)] == ["00", "02", "03", "05"]
    assert [prompt[3:5] for prompt, _ in texts(data, "validation")] == ["06", "08", "09"]
    assert data.dropped_rows["too_long"] == {1: 3, 2: 3, 3: 4, 1024: 13}[chunk]
    learnt = [bytes(row.answer_ids) for row in data.encoded("train") + data.encoded("validation")]
    assert len(set(learnt)) == 1
    for row, text in zip(data.encoded("validation"), texts(data, "validation"), strict=True):
        assert data.tokenizer.decode(row.prompt_ids) == text[0].rstrip()


def test_rows_are_kept_below_a_length_as_the_authors_count_it(attached, tmp_path):
    """With one token a character: prompt with its space, a space more, the answer; EOS is not counted."""
    rows = [
        {"query": "q" * i, "response": "abc\nThe answer is: 1", "type": "GSM"} for i in range(30)
    ]
    path = written(tmp_path / "rows.jsonl", rows)
    data = attached(MetaMathQADataModule, path=path, keep_below=20)
    lengths = [len(f"Q: {'q' * i}\nA:  abc") for i in range(30)]
    kept = texts(data) + texts(data, "validation")
    assert len(kept) == sum(length < 20 for length in lengths) == 9
    assert max(len(f"{prompt} {answer}") for prompt, answer in kept) == 19


@pytest.mark.smollm2
def test_rows_below_a_length_on_the_real_tokenizer(smollm2_dir):
    """The paper's rule on GSM8K, against a plain loop over the rows."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    path = DATA / "gsm8k" / "test.jsonl"
    raw = [json.loads(line) for line in path.open(encoding="utf-8")]
    data = Gsm8kDataModule(str(path), keep_below=200, max_rows=300, validation_size=100)
    data.attach(tokenizer, is_encoder_decoder=False)
    wanted = []
    for row in raw:
        prompt = f"Q: {row['question']}\nA: "
        if len(tokenizer(prompt + " " + row["answer"])["input_ids"]) < 200:
            wanted.append((prompt, row["answer"]))
    assert len(wanted) > 400
    assert len(wanted) < len(raw)
    assert texts(data) == wanted[:300]
    assert texts(data, "validation") == wanted[300:400]


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
    assert len(found) == 4
    assert found[instruction_prompt("open")] == "```python\nprint(1)```"
    assert found[instruction_prompt("two")] == "Say ```a```"
    assert found[instruction_prompt("one")] == "```python\nprint(1)\n```"
    assert found[instruction_prompt(real["query"])].endswith("Age >= 18;\n```")
    assert data.describe()["dropped_rows"]["without_code"] == 1


@pytest.mark.parametrize(
    ("file", "rows", "empty", "without_input"),
    [("code_alpaca_2k.json", 2017, 2, 1011), ("new_codealpaca.json.gz", 4535, 0, 955)],
)
def test_code_alpaca(file, rows, empty, without_input):
    data = InstructionDataModule(str(DATA / "code" / file))
    found = list(data.examples())
    paired = [prompt for prompt, _ in found if prompt.startswith("### Instruction:\n")]
    single = [prompt for prompt, _ in found if prompt.startswith("Below is an instruction")]
    assert (len(found), len(single), len(paired)) == (rows, without_input, rows - without_input)
    assert all("\n\n### Input:\n" in prompt for prompt in paired)
    assert all(prompt.endswith("\n\n### Response:\n") for prompt, _ in found)
    assert sum(not answer.strip() for _, answer in found) == empty


def test_an_empty_answer_is_dropped_and_counted(attached):
    raw = json.loads((DATA / "code" / "code_alpaca_2k.json").read_bytes())
    data = attached(
        InstructionDataModule, path=str(DATA / "code" / "code_alpaca_2k.json"), validation_size=17
    )
    assert len(data.rows("train")) == 2017 - 2 - 17
    assert data.describe()["dropped_rows"]["empty_answer"] == 2
    empty = {row["instruction"] for row in raw if not row["output"].strip()}
    kept = texts(data) + texts(data, "validation")
    assert len(empty) == 2
    assert not any(
        f"### Instruction:\n{text}\n\n" in prompt for prompt, _ in kept for text in empty
    )


def test_arithmetic_of_llm_adapters_has_its_prompt_and_rationale():
    rows = list(
        InstructionDataModule(str(DATA / "math" / "llm_adapters_math_data.json")).examples()
    )
    assert len(rows) == 2205
    rationales = [answer for _, answer in rows if re.search(r"\n(A|Rationale):", answer)]
    assert len(rationales) == 2205, "not the field `answer`, which is 4.0, 16 or C"
    assert sum(answer.startswith("\n") for answer in rationales) == 2201
    assert all(prompt.startswith("Below is an instruction") for prompt, _ in rows)


def test_commonsense_rows_have_the_prompt_of_their_benchmark(tmp_path):
    found = list(
        CommonsenseDataModule(str(DATA / "commonsense" / "commonsense_train_2k.json")).examples()
    )
    raw = json.loads((DATA / "commonsense" / "commonsense_train_2k.json").read_bytes())
    assert [answer for _, answer in found] == [row["output"] for row in raw]
    names = collections.Counter(
        first_option(("boolq", "ARC-Easy", "ARC-Challenge", "openbookqa")[i % 4], answer)
        for i, (_, answer) in enumerate(found)
    )
    assert names == collections.Counter(row["answer"] for row in raw)
    (tmp_path / "boolq").mkdir()
    (tmp_path / "boolq" / "test.json").write_text(json.dumps(raw[::4]))
    asked = [question.prompt for question in Commonsense(str(tmp_path), "boolq").load()]
    assert asked == [prompt for prompt, _ in found[::4]]


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
    questions = [{"question": f"{i}?", "answer": "#### 1"} for i in range(3)]
    path = written(tmp_path / "math.jsonl", questions)
    (batch,) = attached(Gsm8kDataModule, path=path, train_size=1).train_dataloader()
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
    "commonsense": (
        CommonsenseDataModule,
        [{"instruction": "a"}],
        "line 1 of .*instruction, output",
    ),
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


@pytest.mark.parametrize(
    "kind", [Gsm8kDataModule, MetaMathQADataModule, CodeFeedbackDataModule, InstructionDataModule]
)
def test_a_hub_out_of_reach(kind, attached, monkeypatch):
    def no_network(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr("data_modules.readers.HfApi.dataset_info", no_network)
    monkeypatch.setattr("data_modules.readers.datasets.load_dataset", no_network)
    with pytest.raises(InputError, match=r"cannot load \S+/\S+ .*no network.*--data.path"):
        kind().prepare_data()


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        (
            "rows.jsonl",
            b'{"question": "a", "answer": "b"}\n{"question": "a"}',
            "line 2 of .*answer",
        ),
        ("rows.jsonl", b'{"question": "a", "answer": "b"}\n{"questi', "line 2 of .*no JSON"),
        ("rows.json", b'[{"question": "a", "answer": "b"}, {"question": 7}]', "row 1 of .*answer"),
        ("rows.json", b'{"question": "a", "answer": "b"}', "JSON dict: expected a list"),
        ("rows.json", b"question,answer\na,b\n", "no JSON"),
        ("rows.json.gz", b"[]", "cannot read .*rows.json.gz"),
        ("rows.jsonl", b'{"question": "a", "answer": 5}', "as text"),
    ],
)
def test_a_file_of_another_form(name, content, told, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"(?s){told}.*--data.path"):
        list(Gsm8kDataModule(str(tmp_path / name)).examples())


def test_commonsense_has_no_other_source_than_its_file():
    with pytest.raises(InputError, match=r"--data.path is not set.*commonsense_170k.json"):
        CommonsenseDataModule()


@pytest.mark.parametrize("options", [{"keep_below": 0}, {"max_rows": 0}, {"validation_size": 0}])
def test_sizes_below_one(options):
    with pytest.raises(InputError, match=next(iter(options))):
        Gsm8kDataModule(path="x", **options)


def test_each_source_writes_its_examples():
    assert len(GenerativeDataModule.__subclasses__()) >= 4
    for kind in GenerativeDataModule.__subclasses__():
        assert kind.examples is not GenerativeDataModule.examples


def test_a_run_scores_the_loss_alone(command, tiny_run, tmp_path):
    """Rows without classes through the whole command: trained, validated, described; nothing to test."""
    rows = [{"question": f"{i}+{i}?", "answer": f"#### {2 * i}"} for i in range(20)]
    rows.append({"question": "1" * 300, "answer": "#### 1"})
    path = written(tmp_path / "train.jsonl", rows)
    data = f"data_modules.gsm8k.Gsm8kDataModule --data.path {path} --data.max_length 64".split()
    options = [*data, "--data.validation_size", "4", "--data.batch_size", "4"]
    assert command("fit", "--config", tiny_run, "--data", *options) == 0
    folder = tmp_path / "runs" / "tiny" / "version_0"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["data"]["rows"] == {"train": 16, "validation": 4, "test": 0}
    assert summary["data"]["dropped_rows"] == {"empty_answer": 0, "too_long": 1}
    assert set(summary["metrics"]["final"]) == {"loss"}
    assert command("test", "--run", folder) != 0
