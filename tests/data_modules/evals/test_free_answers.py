"""Answers to a data module's own rows: scores as torchmetrics has them, by hand, and through the commands."""

import json
import random

import pytest
import wandb
from torchmetrics.text import ROUGEScore, SacreBLEUScore, SQuAD

from app.evaluation.answers import answer_tables
from app.evaluation.benchmark import Question
from app.evaluation.metrics import MeanScores
from app.utils.errors import InputError
from data_modules.chat import ChatDataModule
from data_modules.evals.free_answers import FreeAnswers
from data_modules.instructions import InstructionDataModule
from tests.support.paths import DATA, needs_data
from tests.support.rows import from_file
from tests.support.run_folders import summary
from tests.support.wandb_file import read

WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "sat",
    "on",
    "mat,",
    "(tree)",
    "Slept.",
    "It",
    "was",
    "3,000",
    "km",
]


def scored(pairs):
    """Return the benchmark's scores of pairs of an output and the answer of the data."""
    benchmark = FreeAnswers()
    means = MeanScores(benchmark.score_names([]))
    for output, reference in pairs:
        means.update(benchmark.score(Question("", "", reference), [output]))
    return benchmark.combine(means.compute())


def test_scores_are_those_of_torchmetrics():
    drawn = random.Random(0)
    texts = [" ".join(drawn.choices(WORDS, k=drawn.randint(0, 30))) for _ in range(80)]
    pairs = list(zip(texts[:40], texts[40:], strict=True))
    pairs += [(text, text) for text in texts[:5]] + [(f"{text} .", text) for text in texts[5:25]]
    rouge, bleu, squad = (
        ROUGEScore(rouge_keys=("rouge1", "rouge2", "rougeL")),
        SacreBLEUScore(),
        SQuAD(),
    )
    for i, (output, reference) in enumerate(pairs):
        rouge.update(output, reference)
        bleu.update([output], [[reference]])
        answers = {"answer_start": [0], "text": [reference]}
        squad.update({"prediction_text": output, "id": str(i)}, {"answers": answers, "id": str(i)})
    words, by_name = squad.compute(), rouge.compute()
    wanted = {name: by_name[f"{name}_fmeasure"].item() for name in ("rouge1", "rouge2", "rougeL")}
    wanted |= {"exact_match": words["exact_match"].item() / 100, "f1": words["f1"].item() / 100}
    wanted |= {"bleu": bleu.compute().item()}
    assert 0 < wanted["exact_match"] < wanted["f1"] < 1
    assert 0 < wanted["bleu"] < 1
    assert scored(pairs) == pytest.approx(wanted, rel=1e-5)


def test_scores_by_hand():
    """5 of 6 words, 3 of 5 pairs, 2 of 4 triples, 1 of 3 quadruples are right; SQuAD drops articles."""
    found = scored([("the cat sat on a mat", "the cat sat on the mat")])
    assert found["rouge1"] == pytest.approx(5 / 6)
    assert found["rouge2"] == pytest.approx(3 / 5)
    assert found["rougeL"] == pytest.approx(5 / 6)
    assert found["bleu"] == pytest.approx((5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)
    assert (found["exact_match"], found["f1"]) == (1, 1)


def test_bleu_is_of_all_rows_together_and_of_short_outputs_less():
    whole, cut = ("one two three four five", "one two three four five"), ("one", "one two three")
    # 6 tokens of 8, all of whose n-grams are right.
    assert scored([whole, cut])["bleu"] == pytest.approx(2.718281828 ** (1 - 8 / 6), rel=1e-6)
    longer = scored([("one two three four five six", "one two three four five")])["bleu"]
    assert longer == pytest.approx((5 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** 0.25), (
        "and of no more than all"
    )
    assert scored([("", "one")])["bleu"] == 0
    assert scored([("", "one")])["f1"] == 0


ROWS = [{"instruction": f"Say {i}.", "input": "", "output": f"{i} is said."} for i in range(12)]


def test_questions_are_the_held_out_rows(tiny_tokenizer, tmp_path):
    evals = [FreeAnswers(max_new_tokens=5, validation_size=2, limit=3)]
    data = from_file(
        InstructionDataModule, tiny_tokenizer, tmp_path, ROWS, evals=evals, validation_size=4
    )
    held_out = {row.prompt: row.answer for row in data.rows("validation")}
    for split, size in (("validation", 2), ("test", 3)):
        (prepared,) = data.prepare_benchmarks(split)
        asked = [encoded.question for encoded in prepared.questions]
        assert len(asked) == size
        assert all(held_out[question.prompt] == question.reference for question in asked)


def test_fewer_rows_than_are_asked_for_are_all_asked(tiny_tokenizer, tmp_path):
    evals = [FreeAnswers()]
    data = from_file(
        InstructionDataModule, tiny_tokenizer, tmp_path, ROWS, evals=evals, validation_size=4
    )
    assert len(data.prepare_benchmarks("validation")[0].questions) == 4


def test_a_corrected_answer_is_another_question(tiny_tokenizer, tmp_path):
    """Its score is not that of an earlier test of the same prompt."""

    def hashes(rows):
        data = from_file(
            *(InstructionDataModule, tiny_tokenizer, tmp_path, rows),
            **{"evals": [FreeAnswers()], "validation_size": 4},
        )
        return [encoded.prompt_hash for encoded in data.prepare_benchmarks("test")[0].questions]

    first, again = hashes(ROWS), hashes(ROWS)
    corrected = hashes([{**row, "output": "It is said."} for row in ROWS])
    assert first == again
    assert not set(first) & set(corrected)


TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def test_of_a_conversation_the_last_answer_is_asked_for(tiny_tokenizer, tmp_path):
    """With all turns before it, as the chat template writes them when it asks."""
    tiny_tokenizer.chat_template = TEMPLATE
    turns = [("system", "Be brief."), ("user", "a?"), ("assistant", "b"), ("user", "c?")]
    turns += [("assistant", "d"), ("user", "e?")]
    conversation = [{"role": role, "content": text} for role, text in turns]
    last = {"role": "assistant", "content": "ddd e"}
    others = [{"messages": [{"role": "user", "content": f"{i}?"}, last]} for i in range(4)]
    rows = [*others, {"messages": [*conversation, last]}, {"messages": [conversation[1], last]}]
    evals = [FreeAnswers(max_new_tokens=5)]
    data = from_file(ChatDataModule, tiny_tokenizer, tmp_path, rows, evals=evals, validation_size=5)
    (prepared,) = data.prepare_benchmarks("test")
    asked = [conversation, conversation[1:2], *(row["messages"][:1] for row in others)]
    wanted = [
        tiny_tokenizer.apply_chat_template(each, add_generation_prompt=True, return_dict=False)
        for each in asked
    ]
    found = [list(encoded.prompt_ids) for encoded in prepared.questions]
    assert len(found) == 5
    assert all(ids in wanted for ids in found)
    assert wanted[0] in found
    assert {encoded.question.reference for encoded in prepared.questions} == {"ddd e"}
    shown = "\n".join(f"{role}: {text}" for role, text in turns)
    assert shown in {encoded.question.prompt for encoded in prepared.questions}


def test_without_rows_there_is_nothing_to_ask(tiny_tokenizer, tmp_path):
    evals = [FreeAnswers(validation_size=2)]
    data = from_file(
        InstructionDataModule, tiny_tokenizer, tmp_path, ROWS, evals=evals, validation_size=0
    )
    with pytest.raises(InputError, match="has none to validate or to test on: set"):
        data.prepare_benchmarks("validation")


def test_tables_are_in_the_order_of_the_run_and_of_the_last_answers(tmp_path):
    def write(moment, name, output):
        file = tmp_path / moment / f"{name}.jsonl"
        file.parent.mkdir(exist_ok=True)
        row = {"key": "k", "prompt": "p", "reference": "r", "outputs": [output]}
        file.write_text(json.dumps({**row, "scores": {"f1": 0.5, "_count": 3}}) + "\n")

    for moment in ("test", "final", "step_10", "step_9", "zero_shot"):
        write(moment, "free_answers-00000001", moment)
    write("final", "free_answers-00000000", "later")
    without = json.dumps({"key": "k", "scores": {}}) + "\n"
    (tmp_path / "final" / "gsm8k-00000000.jsonl").write_text(without)
    # As a kill leaves it, under settings that are not asked again.
    (tmp_path / "final" / "free_answers-00000002.part0.jsonl").write_text('\n{"key": "k", "sco')
    ((name, (columns, rows)),) = answer_tables(tmp_path).items()
    assert (name, columns) == (
        "free_answers",
        ["moment", "key", "prompt", "reference", "output", "f1"],
    )
    outputs = [(row[0], row[4]) for row in rows]
    moments = ["zero_shot", "step_9", "step_10", "final", "test"]
    assert outputs == [(m, "later" if m == "final" else m) for m in moments]
    assert rows[0][1:4] == ["k", "p", "r"]


@needs_data("code")
@pytest.mark.slow
def test_a_run_keeps_answers_beside_references_and_logs_them(command, run_models, tmp_path):
    """Through `fit`, and through `test --run`, which needs no other data module."""
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(
        f"""
trainer: {{accelerator: cpu, max_steps: 2, limit_val_batches: 1.0}}
model: {{name: {run_models / "llama"}}}
data:
  init_args:
    path: {DATA / "code" / "code_alpaca_2k.json"}
    chat_template: false
    max_length: 400
    max_rows: 40
    validation_size: 8
init: {{init_args: {{num_samples: 4}}}}
output: {{name: free, root: {tmp_path / "runs"}, wandb: offline}}
"""
    )
    base = ("--config", "code_alpaca_smollm2.yaml", "--config", "eval/free_answers.yaml")
    size = ("--data.evals.validation_size=4", "--data.evals.max_new_tokens=6")
    assert command("fit", *base, "--config", overlay, *size) == 0
    (folder,) = (tmp_path / "runs" / "free").iterdir()
    metrics = summary(folder)["metrics"]
    for moment in ("zero_shot", "after_init", "final"):
        assert 0 <= metrics[moment]["free_answers/rougeL"] <= 1
        assert not any("_bleu" in name for name in metrics[moment])
    code = json.loads((DATA / "code" / "code_alpaca_2k.json").read_text())
    references = {row["output"].strip() for row in code}
    (file,) = (folder / "answers" / "final").glob("free_answers-*.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(rows) == 4
    pairs = [(row["outputs"][0].strip(), row["reference"]) for row in rows]
    assert {reference for _, reference in pairs} < references
    final = {k.removeprefix("free_answers/"): v for k, v in metrics["final"].items() if "/" in k}
    assert final == pytest.approx(scored(pairs))

    assert command("test", "--run", folder, "--data.evals.limit=3") == 0
    assert "free_answers/bleu" in summary(folder)["metrics"]["test"]
    wandb.teardown()  # writes what is on its way

    def moments(file):
        """Return the first column of the table of answers of a W&B run."""
        told, name = read(file).summary, "answers/free_answers"
        path = told[name]["path"] if name in told else told[f"{name}/path"]
        (table,) = file.parent.rglob(path)
        return [row[0] for row in json.loads(table.read_text())["data"]]

    training, test = sorted(folder.rglob("*.wandb"), key=lambda file: file.parent.name)
    trained = [each for each in ("zero_shot", "after_init", "final") for _ in range(4)]
    assert moments(training) == trained
    assert moments(test) == [*trained, "test", "test", "test"]
