"""The scores of rows that a report reads: the same scores, or the reason why there are none."""

import json
import tracemalloc

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import f1_score, matthews_corrcoef

from app.commands.compare import bootstrap
from app.commands.compare.bootstrap import resampled
from app.commands.compare.collect import read_run
from app.commands.compare.row_scores import SCORES, NoRowScoresError, read_row_scores
from tests.support.report_runs import change, write_rows, write_run


@pytest.fixture
def folder(tmp_path):
    write_run(tmp_path / "run")
    write_rows(tmp_path / "run", np.arange(12) % 4 > 0)
    return tmp_path / "run"


def reason(folder, score="accuracy"):
    with pytest.raises(NoRowScoresError) as error:
        read_row_scores(read_run(folder), "test", score)
    return str(error.value)


@pytest.mark.parametrize("classes", [2, 3])
def test_f1_and_matthews_of_draws(classes):
    """Against scikit-learn, also where a class does not occur among the rows, or in a draw of them."""
    generator = np.random.default_rng(0)
    for size in (1, 2, 5, 40):
        target, predicted = generator.integers(classes, size=(2, size))
        target[0] = classes - 1  # as many classes as there are
        table = pd.DataFrame({"target": target, "predicted": predicted})
        draws = [np.arange(size), *generator.integers(size, size=(5, size))]
        weights = np.stack([np.bincount(rows, minlength=size) / size for rows in draws], axis=1)
        wanted = [matthews_corrcoef(target[rows], predicted[rows]) for rows in draws]
        assert SCORES["mcc"](table)(weights) == pytest.approx(wanted)
        average = {"average": "binary" if classes == 2 else "macro", "zero_division": 0.0}
        wanted = [f1_score(target[rows], predicted[rows], **average) for rows in draws]
        assert SCORES["f1"](table)(weights) == pytest.approx(wanted)


def test_many_classes_take_no_more_memory(monkeypatch):
    """A confusion matrix of 80 classes, as one column of each row, would take 300 MB."""
    monkeypatch.setattr(bootstrap, "CHUNK", 100_000)
    target, predicted = np.random.default_rng(0).integers(80, size=(2, 500))
    table = pd.DataFrame({"target": target, "predicted": predicted})
    tracemalloc.start()
    drawn = resampled(len(table), 4 * [SCORES["f1"](table)], draws=1000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert drawn.shape == (1000, 4)
    assert peak < 20e6


def test_every_score_of_rows_is_made_again(folder):
    table = np.genfromtxt(folder / "row_scores" / "test.csv", delimiter=",", names=True)
    scores = {"f1": f1_score, "mcc": matthews_corrcoef}
    more = {
        name: float(score(table["target"], table["predicted"])) for name, score in scores.items()
    }
    run = read_run(folder)
    change(folder, metrics={"test": {**run.scores("test"), **more}})
    run = read_run(folder)
    for name in ("accuracy", "loss", "task_loss", "f1", "mcc"):
        rows = read_row_scores(run, "test", name)
        assert rows.value == pytest.approx(run.scores("test")[name], rel=1e-12), name
        assert list(rows.ids) == list(range(12))


def test_rows_that_are_not_there_or_of_other_scores(folder):
    file = folder / "row_scores" / "test.csv"
    change(folder, metrics={"test": {"accuracy": 0.5}})
    assert reason(folder) == "its rows make accuracy 0.75000, but it reports 0.50000"
    file.write_text("row,loss\n0,a\n")
    assert "test.csv is damaged" in reason(folder)
    assert "test.csv is damaged" in reason(folder, "loss")
    file.write_text("row,target,predicted\n0,,\n")
    assert "test.csv is damaged" in reason(folder, "f1")
    file.unlink()
    command = f"`python train.py test --run {folder}`"
    wanted = f"it has no row_scores/test.csv, as an earlier version scored it: {command}"
    assert reason(folder) == wanted
    summary = json.loads((folder / "summary.json").read_text())
    del summary["metrics"]["test"]
    (folder / "summary.json").write_text(json.dumps(summary))
    for score in ("accuracy", "toy/strict"):
        assert reason(folder, score) == f"it is not tested yet: {command}"


def test_the_questions_of_a_benchmark(folder):
    """Those of the test whose score is reported; a mean over those that have the score."""
    answers = folder / "answers" / "test"
    answers.mkdir(parents=True)
    hard = [{"hard": 1.0}, {"hard": 1.0}, {}, {}, {}]
    lines = [{"key": f"q/{i}", "scores": {"strict": i % 2, **hard[i]}} for i in range(5)]
    (answers / "toy-b.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    entries = {
        "toy-a": {"name": "toy", "scores": {"strict": 0.9}},
        "toy-b": {"name": "toy", "scores": {"strict": 0.4, "hard": 1.0, "worst": 0.1}},
    }
    (folder / "benchmarks.json").write_text(json.dumps(entries))
    scores = {"toy/strict": 0.4, "toy/hard": 1.0, "toy/worst": 0.1, "other/strict": 0.4}
    change(folder, metrics={"test": scores})
    run = read_run(folder)
    rows = read_row_scores(run, "test", "toy/strict")
    assert list(rows.ids) == [f"q/{i}" for i in range(5)]
    assert rows.score(np.eye(5)).tolist() == [i % 2 for i in range(5)]
    rows = read_row_scores(run, "test", "toy/hard")
    assert (rows.ids, rows.score(np.eye(2)).tolist()) == (["q/0", "q/1"], [1, 1])
    assert reason(folder, "toy/worst") == "toy/worst is no mean over questions"
    assert reason(folder, "other/strict") == "benchmarks.json has no other of its other/strict"
    (answers / "toy-b.jsonl").unlink()
    assert "answers/test/toy-b.jsonl cannot be read" in reason(folder, "toy/strict")


def test_the_rows_of_a_task_of_lm_eval(folder):
    """A line of the answers is a task there, so that one line, or two, would be no rows to draw from."""
    answers = folder / "answers" / "test"
    answers.mkdir(parents=True)
    samples = [
        {"doc_id": i, "filter": reading, "acc": float(i > 1), "bleu": ["a", "b"]}
        for i in range(5)
        for reading in ("none", "other")
    ]
    scores = {"arc/acc,none": 0.6, "arc/bleu,none": 0.6, "all/acc,none": 0.6}
    line = {"key": "all", "scores": scores, "samples": {"arc": samples}}
    other = {"key": "other", "scores": {"other/acc,none": 0.1}, "samples": {"other": samples[:1]}}
    (answers / "lm_eval-a.jsonl").write_text(f"{json.dumps(line)}\n{json.dumps(other)}\n")
    entry = {"name": "lm_eval", "scores": scores}
    (folder / "benchmarks.json").write_text(json.dumps({"lm_eval-a": entry}))
    change(folder, metrics={"test": {f"lm_eval/{name}": 0.6 for name in scores}})
    rows = read_row_scores(read_run(folder), "test", "lm_eval/arc/acc,none")
    assert rows.ids == [("arc", i) for i in range(5)]
    assert rows.score(np.eye(5)).tolist() == [0, 0, 1, 1, 1]
    for name in ("lm_eval/arc/bleu,none", "lm_eval/all/acc,none"):
        assert reason(folder, name) == f"{name} is no mean over questions"
