"""Means of scores over questions, against a table by hand."""

import pytest
import torch

from app.evaluation.metrics import MeanScores


def test_a_score_counts_the_questions_that_have_it():
    metric = MeanScores(["accuracy", "accuracy/anatomy", "accuracy/law", "accuracy/none"])
    for subject, values in {"anatomy": (1, 0, 0), "law": (1,)}.items():
        for value in values:
            metric.update({"accuracy": value, f"accuracy/{subject}": value})
    found = {name: float(value) for name, value in metric.compute().items()}
    assert found == pytest.approx(
        {"accuracy": 2 / 4, "accuracy/anatomy": 1 / 3, "accuracy/law": 1.0}
    )
    assert list(found) == ["accuracy", "accuracy/anatomy", "accuracy/law"]


def test_a_mean_of_many_questions_is_exact():
    metric = MeanScores(["pass@10"])
    values = torch.rand(20_000, dtype=torch.float64)
    for value in values.tolist():
        metric.update({"pass@10": value})
    assert float(metric.compute()["pass@10"]) == pytest.approx(float(values.mean()), rel=1e-6)


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="strict"):
        MeanScores(["flexible"]).update({"strict": 1.0})
