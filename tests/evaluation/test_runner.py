"""Benchmarks through the whole command: asked once, kept, gone on with, scored in training and alone."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

import app.evaluation.answers
import app.evaluation.runner
from tests.support.generation import likelihoods_by_hand, one_at_a_time
from tests.support.run_folders import losses, summary, values
from tests.support.toy_benchmarks import Choosing, Writing, write_config


@pytest.fixture
def benchmarks(tmp_path, run_models):
    """Return `benchmarks(model)`, which makes a configuration that asks both toy benchmarks."""
    return lambda model="llama": write_config(tmp_path, run_models / model)


def results(folder):
    """Return what a test wrote down, by the benchmark's name."""
    results = json.loads((folder / "benchmarks.json").read_text())
    return {result["name"]: result for result in results.values()}


def answers(folder, name):
    (file,) = (folder / "answers").rglob(f"{name}-*.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_a_model_alone_is_asked_every_question_once(
    kind, benchmarks, run_models, command, tmp_path
):
    assert command("test", "--config", benchmarks(kind)) == 0
    folder = tmp_path / "runs" / "toy"
    scored, written = results(folder), answers(folder, "writing")
    model_class = AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM
    model = model_class.from_pretrained(run_models / kind).eval()
    tokenizer = AutoTokenizer.from_pretrained(run_models / kind)
    benchmark = Writing()
    assert [row["key"] for row in written] == [q.key for q in benchmark.load()]
    prompts = [tokenizer(question.prompt)["input_ids"] for question in benchmark.load()]
    expected = [text for text, *_ in one_at_a_time(model, tokenizer, prompts, 6)]
    assert [row["outputs"][0] for row in written] == expected
    mean = sum("e" in text for text in expected) / len(expected)
    assert scored["writing"]["scores"]["has_e"] == pytest.approx(mean)
    assert (scored["writing"]["questions"], scored["choosing"]["questions"]) == (23, 17)
    assert scored["writing"]["answered_before"] == 0
    if kind == "llama":
        prompts = [tokenizer(question.prompt)["input_ids"] for question in Choosing().load()]
        choices = [tokenizer(choice)["input_ids"] for choice in Choosing.choices]
        sums = likelihoods_by_hand(model, prompts, choices)
        for row, likelihoods in zip(answers(folder, "choosing"), sums, strict=True):
            assert row["log_likelihoods"] == pytest.approx(likelihoods.tolist(), abs=1e-4)
            assert row["outputs"] == [Choosing.choices[int(likelihoods.argmax())]]


@pytest.mark.slow
def test_an_interrupted_test_repeats_nothing(benchmarks, command, tmp_path, monkeypatch):
    file = benchmarks()
    folder = tmp_path / "runs" / "toy"
    assert command("test", "--config", file) == 0
    whole, scores = answers(folder, "writing"), results(folder)
    shutil.rmtree(folder / "answers")
    counted = []
    add, generate = app.evaluation.answers.AnswersFile.add, app.evaluation.runner.generate

    def dying(self, rows):
        add(self, rows)
        if len(counted) == 2:
            raise KeyboardInterrupt

    def counting(*args, **kwargs):
        counted.append(list(args[4]))  # the keys
        return generate(*args, **kwargs)

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


def test_other_settings_are_asked_anew(benchmarks, command, tmp_path):
    file, folder = benchmarks(), tmp_path / "runs" / "toy"
    assert command("test", "--config", file) == 0
    longer = file.with_name("longer.yaml")
    longer.write_text(file.read_text().replace("num_samples: 1", "max_new_tokens: 9"))
    assert command("test", "--config", longer) == 0
    saved = json.loads((folder / "benchmarks.json").read_text()).values()
    assert sorted(result["name"] for result in saved) == ["choosing", "writing", "writing"]
    assert len(list((folder / "answers").rglob("writing-*.jsonl"))) == 2


def test_samples_of_a_question_do_not_depend_on_its_batch(benchmarks, command, tmp_path):
    file, folder = benchmarks(), tmp_path / "runs" / "toy"
    text = file.read_text().replace("num_samples: 1", "num_samples: 3")
    file.write_text(text)
    assert command("test", "--config", file) == 0
    first = answers(folder, "writing")
    shutil.rmtree(folder / "answers")
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


def test_benchmarks_are_asked_while_training(overlay, fit, monkeypatch):
    monkeypatch.setattr(Writing, "lower_is_better", ["has_e"])
    folder = fit(f"--config={overlay}", "--trainer.val_check_interval=1")
    assert summary(folder)["lower_is_better"] == ["writing/has_e"]
    metrics = summary(folder)["metrics"]
    for moment in ("zero_shot", "after_init", "final"):
        assert 0 <= metrics[moment]["writing/has_e"] <= 1
        assert "accuracy" in metrics[moment]
        assert "choosing/accuracy" not in metrics[moment]
        if moment != "final":  # which is the validation of the last step
            (file,) = (folder / "answers" / moment).glob("writing-*.jsonl")
            assert len(file.read_text().splitlines()) == 8
    assert list(values(folder, "val/writing/has_e")) == [0, 1, 2]
    kept = sorted(path.name for path in (folder / "answers").iterdir())
    assert kept == ["after_init", "step_1", "step_2", "step_3", "zero_shot"]


@pytest.mark.slow
def test_a_finished_run_is_asked_and_keeps_the_scores(benchmarks, fit, command, monkeypatch):
    folder = fit()
    monkeypatch.setattr(Choosing, "lower_is_better", ["accuracy"])
    assert command("test", "--run", folder, "--config", benchmarks()) == 0
    assert results(folder)["writing"]["questions"] == 23
    assert len(answers(folder, "choosing")) == 17
    assert summary(folder)["lower_is_better"] == ["choosing/accuracy"]


@pytest.mark.slow
def test_asking_leaves_training_as_it_was(overlay, fitted, fit):
    with_benchmarks = fit(f"--config={overlay}", "--trainer.val_check_interval=1")
    without = fitted("--trainer.val_check_interval=1")
    assert losses(with_benchmarks) == losses(without)


WRONG = {
    "samples": (("num_samples: 1", "max_new_tokens: 0"), "max_new_tokens=0"),
    "chat": (("eval_batch_size: 5", "chat_template: true"), "has no chat template"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_asked(case, benchmarks, error_of):
    (old, new), message = WRONG[case]
    file = benchmarks()
    file.write_text(file.read_text().replace(old, new))
    error = error_of("test", "--config", file)
    assert message in error
    assert "\n" not in error


def test_questions_alone_train_nothing(benchmarks, error_of):
    told = error_of("fit", "--config", benchmarks(), "--trainer.max_steps=1")
    assert "BenchmarkDataModule has no rows to train on: name" in told


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
