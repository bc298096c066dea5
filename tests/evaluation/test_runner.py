"""Benchmarks through the whole command: asked once, kept, gone on with, scored in training and alone."""

import csv
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

import app.evaluation.answers
import app.evaluation.runner
from tests.support.toy_benchmarks import Choosing, Writing

EXAMS = """
trainer: {{accelerator: cpu}}
model: {{name: {model}, adapter: null}}
data:
  class_path: data_modules.benchmark_data.BenchmarkDataModule
  init_args:
    eval_batch_size: 5
    evals:
      - class_path: tests.support.toy_benchmarks.Writing
      - class_path: tests.support.toy_benchmarks.Choosing
output: {{name: toy, root: {root}, wandb: disabled}}
"""


@pytest.fixture
def exams(tmp_path, run_models):
    """Return `exams(model)`, which makes a configuration that asks both toy benchmarks."""

    def make(model="llama"):
        file = tmp_path / "exams.yaml"
        file.write_text(EXAMS.format(model=run_models / model, root=tmp_path / "runs"))
        return file

    return make


def results(folder):
    """Return what a test wrote down, by the benchmark's name."""
    told = json.loads((folder / "benchmarks.json").read_text())
    return {found["name"]: found for found in told.values()}


def answers(folder, name):
    (file,) = (folder / "answers").rglob(f"{name}-*.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


def expected_writing(model_folder, evaluation):
    """Return each question's output by transformers' own `generate`, one at a time."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    kind = AutoModelForSeq2SeqLM if model_folder.name == "t5" else AutoModelForCausalLM
    model = kind.from_pretrained(model_folder).eval()
    found = []
    for question in evaluation.load():
        ids = tokenizer(question.prompt, return_tensors="pt")["input_ids"]
        out = model.generate(
            ids, max_new_tokens=evaluation.decoding.max_new_tokens, do_sample=False
        )
        start = 1 if model_folder.name == "t5" else ids.shape[1]
        found.append(tokenizer.decode(out[0, start:], skip_special_tokens=True))
    return found


@pytest.mark.parametrize("model", ["llama", "gpt2", "t5"])
def test_a_model_alone_is_asked_every_question_once(model, exams, run_models, command, tmp_path):
    assert command("test", "--config", exams(model)) == 0
    folder = tmp_path / "runs" / "toy"
    found, asked = results(folder), answers(folder, "writing")
    evaluation = Writing()
    assert [row["key"] for row in asked] == [q.key for q in evaluation.load()]
    expected = expected_writing(run_models / model, evaluation)
    assert [row["outputs"][0] for row in asked] == expected
    mean = sum("e" in text for text in expected) / len(expected)
    assert found["writing"]["scores"]["has_e"] == pytest.approx(mean)
    assert found["writing"]["questions"] == 23
    assert found["writing"]["answered_before"] == 0
    assert found["choosing"]["questions"] == 17


def test_the_likeliest_choice_is_taken(exams, run_models, command, tmp_path):
    assert command("test", "--config", exams()) == 0
    asked = answers(tmp_path / "runs" / "toy", "choosing")
    tokenizer = AutoTokenizer.from_pretrained(run_models / "llama")
    model = AutoModelForCausalLM.from_pretrained(run_models / "llama").eval().double()
    for row, question in zip(asked, Choosing().load(), strict=True):
        prompt = tokenizer(question.prompt)["input_ids"]
        expected = []
        for choice in Choosing.choices:
            ids = tokenizer(choice)["input_ids"]
            with torch.no_grad():
                logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
            expected.append(float(logits.log_softmax(-1)[range(len(ids)), ids].sum()))
        assert row["log_likelihoods"] == pytest.approx(expected, abs=1e-4)
        assert row["outputs"] == [Choosing.choices[max(range(3), key=expected.__getitem__)]]


def test_an_interrupted_test_repeats_nothing(exams, command, tmp_path, monkeypatch):
    file = exams()
    folder = tmp_path / "runs" / "toy"
    assert command("test", "--config", file) == 0
    whole, scores = answers(folder, "writing"), results(folder)
    for path in (folder / "answers").rglob("*.jsonl"):
        path.unlink()

    counted, add, generate = (
        [],
        app.evaluation.answers.AnswersFile.add,
        app.evaluation.runner.generate,
    )

    def dying(self, rows):
        add(self, rows)
        if len(counted) == 2:
            raise KeyboardInterrupt

    def counting(model, base, tokenizer, prompts, keys, *args, **kwargs):
        counted.append(list(keys))
        return generate(model, base, tokenizer, prompts, keys, *args, **kwargs)

    monkeypatch.setattr(app.evaluation.runner, "generate", counting)
    with monkeypatch.context() as patch:
        patch.setattr(app.evaluation.answers.AnswersFile, "add", dying)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            command("test", "--config", file)
    assert command("test", "--config", file) == 0
    keys = [key for batch in counted for key in batch]
    assert sorted(keys) == sorted(row["key"] for row in whole), "each question is asked once"
    assert answers(folder, "writing") == whole
    again = results(folder)
    assert again["writing"]["answered_before"] == 10
    assert again["writing"]["scores"] == scores["writing"]["scores"]
    counted.clear()
    assert command("test", "--config", file) == 0
    assert not counted, "a finished test asks nothing"


def test_other_settings_are_asked_anew(exams, command, tmp_path):
    file, folder = exams(), tmp_path / "runs" / "toy"
    assert command("test", "--config", file) == 0
    longer = file.with_name("longer.yaml")
    longer.write_text(
        file.read_text().replace("Writing", "Writing\n        init_args: {max_new_tokens: 9}")
    )
    assert command("test", "--config", longer) == 0
    told = json.loads((folder / "benchmarks.json").read_text())
    assert sorted(found["name"] for found in told.values()) == ["choosing", "writing", "writing"]
    assert len(list((folder / "answers").rglob("writing-*.jsonl"))) == 2


def test_samples_of_a_question_do_not_depend_on_its_batch(exams, command, tmp_path):
    file, folder = exams(), tmp_path / "runs" / "toy"
    text = file.read_text().replace("Writing", "Writing\n        init_args: {num_samples: 3}")
    file.write_text(text)
    assert command("test", "--config", file) == 0
    first = answers(folder, "writing")
    for path in (folder / "answers").rglob("*.jsonl"):
        path.unlink()
    file.write_text(text.replace("eval_batch_size: 5", "eval_batch_size: 16"))
    assert command("test", "--config", file) == 0
    assert answers(folder, "writing") == first
    assert len({tuple(row["outputs"]) for row in first}) > 5
    assert all(len(row["outputs"]) == 3 for row in first)


@pytest.fixture
def overlay(tmp_path):
    file = tmp_path / "overlay.yaml"
    file.write_text(
        """
data:
  init_args:
    evals:
      - {class_path: tests.support.toy_benchmarks.Writing, init_args: {validation_size: 8}}
      - {class_path: tests.support.toy_benchmarks.Choosing, init_args: {validation_size: 0}}
"""
    )
    return file


def test_benchmarks_are_asked_while_training(overlay, fit):
    folder = fit(f"--config={overlay}", "--trainer.val_check_interval=1")
    metrics = json.loads((folder / "summary.json").read_text())["metrics"]
    for moment in ("zero_shot", "after_init", "final"):
        assert 0 <= metrics[moment]["writing/has_e"] <= 1
        assert "accuracy" in metrics[moment]
        assert "choosing/accuracy" not in metrics[moment]
        if moment != "final":  # which is the validation of the last step
            (file,) = (folder / "answers" / moment).glob("writing-*.jsonl")
            assert len(file.read_text().splitlines()) == 8
    with (folder / "metrics.csv").open(newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row.get("val/writing/has_e")]
    assert [int(row["step"]) for row in rows] == [0, 1, 2]
    kept = sorted(path.name for path in (folder / "answers").iterdir())
    assert kept == ["after_init", "step_1", "step_2", "step_3", "zero_shot"]


def test_a_finished_run_is_asked_and_keeps_the_scores(exams, fit, command):
    folder = fit()
    assert command("test", "--run", folder, "--config", exams()) == 0
    assert results(folder)["writing"]["questions"] == 23
    assert len(answers(folder, "choosing")) == 17


def test_asking_leaves_training_as_it_was(overlay, fit):
    with_exams = fit(f"--config={overlay}", "--trainer.val_check_interval=1")
    without = fit("--trainer.val_check_interval=1")

    def losses(folder):
        with (folder / "metrics.csv").open(newline="") as stream:
            return [row["train/loss"] for row in csv.DictReader(stream) if row.get("train/loss")]

    assert losses(with_exams) == losses(without)


WRONG = {
    "twice": (("Choosing", "Writing"), "'writing' twice"),
    "broken": (("Writing", "Writing\n        init_args: {broken: true}"), "toy_sandbox is absent"),
    "many": (("Writing", "Writing\n        init_args: {limit: 24}"), "24 questions of writing"),
    "context": (
        ("Writing", "Writing\n        init_args: {max_new_tokens: 1024}"),
        "max_new_tokens=1024 of writing",
    ),
    "samples": (("Writing", "Writing\n        init_args: {max_new_tokens: 0}"), "max_new_tokens=0"),
    "chat": (("eval_batch_size: 5", "chat_template: true"), "has no chat template"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_asked(case, exams, command, capsys):
    (old, new), told = WRONG[case]
    file = exams()
    file.write_text(file.read_text().replace(old, new))
    assert command("test", "--config", file) == 2
    error = capsys.readouterr().err
    assert told in error
    assert len(error.splitlines()) == 1


def test_questions_alone_train_nothing(exams, command, capsys):
    assert command("fit", "--config", exams(), "--trainer.max_steps=1") == 2
    assert "BenchmarkDataModule has no rows to train on: name" in capsys.readouterr().err


@pytest.mark.parametrize("rule", ["cut", "refuse"])
def test_a_question_longer_than_the_context(rule, exams, command, capsys, run_models, tmp_path):
    import shutil

    model = shutil.copytree(run_models / "llama", tmp_path / "short")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 60}))
    file = exams()
    file.write_text(file.read_text().replace(str(run_models / "llama"), str(model)) + f"\n# {rule}")
    status = command("test", "--config", file, f"--data.long_prompts={rule}")
    told = capsys.readouterr()
    if rule == "refuse":
        assert status == 2
        assert "the model's context has room for 54 beside the answer" in told.err
        return
    assert status == 0
    lengths = [len(question.prompt) for question in Writing().load()]
    cut = sum(length > 54 for length in lengths)
    assert 0 < cut < len(lengths)
    assert len(answers(tmp_path / "runs" / "toy", "writing")) == 23


def test_the_digest_of_weights(tiny_llama, monkeypatch):
    """Whole models too: of a large weight some values are read, which a training step changes as all others."""
    model = tiny_llama()
    digest = app.evaluation.runner.trained_weights_digest
    whole = digest(model)
    assert whole == digest(tiny_llama()) != digest(tiny_llama(seed=1))
    model.lm_head.weight.data[-1, -1] += 1
    assert digest(model) != whole
    monkeypatch.setattr(app.evaluation.runner, "HASHED", 100)
    fewer = digest(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()
    optimizer.step()
    assert digest(model) != fewer
    assert digest(model.requires_grad_(False)) == "none"
