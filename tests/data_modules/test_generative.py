"""Rows with free answers: which are taken, which validate, and what a run makes of them."""

import json

import pytest
from transformers import AutoTokenizer

from app.utils.errors import InputError
from data_modules.code_feedback import CodeFeedbackDataModule
from data_modules.commonsense import CommonsenseDataModule
from data_modules.generative import GenerativeDataModule
from data_modules.gsm8k import Gsm8kDataModule
from data_modules.instructions import InstructionDataModule
from data_modules.metamath import MetaMathQADataModule
from tests.support import run_folders
from tests.support.paths import DATA, needs_data
from tests.support.rows import from_file, texts, unplug_hub, write_jsonl


def test_the_first_rows_train_and_those_behind_validate(tiny_tokenizer, tmp_path):
    """Five questions of which the second is too long: three train, and the fifth validates."""
    rows = [
        {"query": f"{i}" + "x" * (100 if i == 1 else 0), "response": "#### 1", "type": "GSM_SV"}
        for i in range(6)
    ]
    sizes = {"max_rows": 3, "max_length": 30}
    data = from_file(MetaMathQADataModule, tiny_tokenizer, tmp_path, rows, **sizes)
    assert [prompt[3] for prompt, _ in texts(data)] == ["0", "2", "3"]
    assert [prompt[3] for prompt, _ in texts(data, "validation")] == ["4"]
    dropped = {"not_gsm": 0, "empty_answer": 0, "too_long": 1}
    assert data.describe()["dropped_rows"] == dropped
    assert [row.index for row in data.encoded("train")] == [0, 1, 2]


@pytest.mark.parametrize("chunk", [1, 2, 3, 1024])
def test_reading_ends_where_enough_rows_are_found(chunk, tiny_tokenizer, tmp_path, monkeypatch):
    """Rows 1, 4, 7, ... are too long; 4 rows train, 3 validate, whatever is encoded at once."""
    rows = [
        {"query": f"{i:02}" + "x" * (99 if i % 3 == 1 else 0), "response": "#### 1", "type": "GSM"}
        for i in range(40)
    ]
    monkeypatch.setattr("data_modules.encoding.CHUNK_ROWS", chunk)
    sizes = {"max_rows": 4, "validation_size": 3, "keep_below": 50}
    data = from_file(MetaMathQADataModule, tiny_tokenizer, tmp_path, rows, **sizes)
    assert [prompt[3:5] for prompt, _ in texts(data)] == ["00", "02", "03", "05"]
    assert [prompt[3:5] for prompt, _ in texts(data, "validation")] == ["06", "08", "09"]
    assert data.dropped_rows["too_long"] == {1: 3, 2: 3, 3: 4, 1024: 13}[chunk]
    learnt = [bytes(row.answer_ids) for row in data.encoded("train") + data.encoded("validation")]
    assert len(set(learnt)) == 1
    for row, text in zip(data.encoded("validation"), texts(data, "validation"), strict=True):
        assert tiny_tokenizer.decode(row.prompt_ids) == text[0].rstrip()


def test_rows_are_kept_below_a_length_as_the_authors_count_it(tiny_tokenizer, tmp_path):
    """With one token a character: prompt with its space, a space more, the answer; EOS is not counted."""
    rows = [
        {"query": "q" * i, "response": "abc\nThe answer is: 1", "type": "GSM"} for i in range(30)
    ]
    data = from_file(MetaMathQADataModule, tiny_tokenizer, tmp_path, rows, keep_below=20)
    lengths = [len(f"Q: {'q' * i}\nA:  abc") for i in range(30)]
    kept = texts(data, "train", "validation")
    assert len(kept) == sum(length < 20 for length in lengths) == 9
    assert max(len(f"{prompt} {answer}") for prompt, answer in kept) == 19


@needs_data("gsm8k")
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


def test_where_no_rows_follow_some_are_set_aside(tiny_tokenizer, tmp_path):
    rows = [{"query": str(i), "response": "a", "type": "GSM"} for i in range(10)]
    held = []
    for seed in (0, 1):
        sizes = {"validation_size": 4, "seed": seed}
        data = from_file(MetaMathQADataModule, tiny_tokenizer, tmp_path, rows, **sizes)
        held.append(texts(data, "validation"))
        assert not set(held[seed]) & set(texts(data))
    assert held[0] == held[1], "whatever the seed"
    assert len(held[0]) == 4


@pytest.mark.parametrize(("max_rows", "num_train"), [(3, 3), (6, 4), (7, 3), (None, 4)])
def test_tested_rows_stand_behind_those_that_validate(
    max_rows, num_train, tiny_tokenizer, tmp_path
):
    """Of ten rows; where too few follow those that train, some of these are set aside."""
    rows = [{"query": str(i), "response": "a", "type": "GSM"} for i in range(10)]
    sizes = {"validation_size": 4, "test_size": 2, "max_rows": max_rows}
    data = from_file(MetaMathQADataModule, tiny_tokenizer, tmp_path, rows, **sizes)
    parts = [texts(data, split) for split in ("train", "validation", "test")]
    assert list(map(len, parts)) == [num_train, 4, 2]
    assert len(set().union(*parts)) == num_train + 6, "no row is two of these"
    if max_rows == 3:
        every = from_file(MetaMathQADataModule, tiny_tokenizer, tmp_path, rows, validation_size=0)
        assert [*parts[0], *parts[1], *parts[2]] == texts(every)[:9]


WRONG = {
    "field": (InstructionDataModule, [{"instruction": "a"}], "instruction, output"),
    "foreign": (MetaMathQADataModule, [{"question": "a"}], "query, response, type"),
    "empty": (InstructionDataModule, [], "no row"),
    "answers": (InstructionDataModule, [{"instruction": "a", "output": " "}], "with an answer"),
    "long": (InstructionDataModule, [{"instruction": "a" * 999, "output": "b"}], "max_length=300"),
    "few": (InstructionDataModule, [{"instruction": "a", "output": "b"}], "validation_size"),
    "commonsense": (CommonsenseDataModule, [{"instruction": "a"}], "line 1 of .*output"),
    "no_code": (CodeFeedbackDataModule, [{"query": "a", "answer": "b"}], "code_feedback"),
    "gsm8k": (Gsm8kDataModule, [{"question": "a"}], "question, answer"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_read(case, tiny_tokenizer, tmp_path):
    kind, rows, message = WRONG[case]
    with pytest.raises(InputError, match=message):
        from_file(kind, tiny_tokenizer, tmp_path, rows, max_length=300).rows("train")


@pytest.mark.parametrize(
    "kind", [Gsm8kDataModule, MetaMathQADataModule, CodeFeedbackDataModule, InstructionDataModule]
)
def test_a_hub_out_of_reach(kind, monkeypatch, tmp_path):
    unplug_hub(monkeypatch, tmp_path)
    with pytest.raises(InputError, match=r"(?s)cannot load \S+/\S+ .*--data.path"):
        kind().prepare_data()


@pytest.mark.parametrize(
    ("name", "value"),
    [("keep_below", 0), ("max_rows", 0), ("validation_size", -1), ("test_size", -1)],
)
def test_sizes_that_are_too_small(name, value):
    with pytest.raises(InputError, match=f"{name}={value}"):
        Gsm8kDataModule(path="x", **{name: value})


def test_each_source_writes_its_examples():
    """Or its rows, where they are more than a prompt and an answer."""
    base = GenerativeDataModule
    assert len(base.__subclasses__()) >= 4
    for kind in base.__subclasses__():
        assert (kind.examples, kind.candidates) != (base.examples, base.candidates)


@pytest.mark.slow
def test_a_run_scores_the_loss_alone(command, error_of, tiny_run, tmp_path):
    """Rows without classes through the whole command: trained, validated, described; tested where asked."""
    rows = [{"question": f"{i}+{i}?", "answer": f"#### {2 * i}"} for i in range(24)]
    rows.append({"question": "1" * 300, "answer": "#### 1"})
    path = write_jsonl(tmp_path / "train.jsonl", *rows)
    data = f"data_modules.gsm8k.Gsm8kDataModule --data.path {path} --data.max_length 64".split()
    options = [*data, "--data.validation_size", "4", "--data.batch_size", "4"]
    assert command("fit", "--config", tiny_run, "--data", *options) == 0
    folder = tmp_path / "runs" / "tiny" / "version_0"
    summary = run_folders.summary(folder)
    assert summary["data"]["rows"] == {"train": 20, "validation": 4, "test": 0}
    assert summary["data"]["dropped_rows"] == {"empty_answer": 0, "too_long": 1}
    assert set(summary["metrics"]["final"]) == {"loss"}
    assert command("test", "--run", folder) != 0
    assert command("fit", "--config", tiny_run, "--data", *options, "--data.test_size", "3") == 0
    folder = tmp_path / "runs" / "tiny" / "version_1"
    assert command("test", "--run", folder) == 0
    summary = run_folders.summary(folder)
    assert summary["data"]["rows"] == {"train": 17, "validation": 4, "test": 3}
    assert set(summary["metrics"]["test"]) == {"loss"}
    assert command("report", folder) == 0
    for change in (("test", "--data.test_size", "5"), ("validate", "--data.validation_size", "6")):
        told = error_of(change[0], "--run", folder, *change[1:])
        assert "it had 17 train, 4 validation, 3 test rows" in told
        assert change[1] in told


def test_prompts_are_learnt_too_where_that_is_asked_for(tiny_tokenizer, tmp_path):
    """All tokens of a row but the first; the decoder of a sequence-to-sequence model has none of them."""
    rows = [{"instruction": f"Say {i}.", "output": f"It is {i}."} for i in range(6)]
    learnt = []
    for only in (True, False):
        options = {"completion_only_loss": only, "validation_size": 2}
        data = from_file(InstructionDataModule, tiny_tokenizer, tmp_path, rows, **options)
        encoded = data.encoded("train") + data.encoded("validation")
        learnt.append([(*row.prompt_ids, *row.answer_ids) for row in encoded])
        for row, (prompt, answer) in zip(encoded, texts(data, "train", "validation"), strict=True):
            expected = answer if only else (prompt + answer)[1:]
            assert tiny_tokenizer.decode(row.answer_ids) == expected + "<eos>"
    assert learnt[0] == learnt[1]
    data = InstructionDataModule(str(data.path), completion_only_loss=False, validation_size=2)
    data.attach(tiny_tokenizer, is_encoder_decoder=True)
    with pytest.raises(InputError, match=r"completion_only_loss=false.*sequence-to-sequence"):
        data.encoded("train")
