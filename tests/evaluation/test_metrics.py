"""Accuracy, F1 and Matthews correlation against scikit-learn; losses and means of scores by hand."""

import warnings

import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, log_loss, matthews_corrcoef
from torch.nn.functional import cross_entropy

from app.evaluation.metrics import LabelScores, MeanScores
from app.models.loss import SupervisedLogits

VOCABULARY = 11
TOKENS = (7, 2, 5)


def batch(predicted, generator, answer_tokens):
    """Make logits whose highest label word at each answer's start is the one `predicted`."""
    lengths = torch.tensor(answer_tokens)
    logits = torch.randn(int(lengths.sum()), VOCABULARY, generator=generator)
    first = lengths.cumsum(0) - lengths
    words = torch.tensor(TOKENS)
    logits[first[:, None], words] -= 10
    logits[first, words[predicted]] += 5
    # What is no label word does not count, however high it is.
    logits[first, 0] += 100
    labels = torch.randint(VOCABULARY, (len(logits),), generator=generator)
    rows = torch.arange(len(lengths)).repeat_interleave(lengths)
    return SupervisedLogits(logits, labels, first, rows)


def scores_of(predicted, target, classes, batch_size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    keeper = LabelScores(TOKENS[:classes])
    losses = []
    for start in range(0, len(target), batch_size):
        part = slice(start, start + batch_size)
        lengths = torch.randint(1, 4, (len(target[part]),), generator=generator).tolist()
        output = batch(predicted[part], generator, lengths)
        losses.append(cross_entropy(output.logits, output.labels, reduction="none"))
        keeper.update(output, target[part], torch.arange(len(target))[part])
    return {name: float(value) for name, value in keeper.compute().items()}, torch.cat(losses)


def expected_scores(predicted, target, classes):
    average = "binary" if classes == 2 else "macro"
    return {
        "accuracy": accuracy_score(target, predicted),
        "f1": f1_score(target, predicted, average=average, zero_division=0.0),
        "mcc": matthews_corrcoef(target, predicted),
    }


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_random_predictions(classes, batch_size):
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        target = torch.randint(classes, (40,), generator=generator)
        guess = torch.randint(classes, (40,), generator=generator)
        predicted = torch.where(torch.rand(40, generator=generator) < 0.6, target, guess)
        scores, losses = scores_of(predicted, target, classes, batch_size, seed)
        expected = expected_scores(predicted, target, classes)
        for name, value in expected.items():
            assert scores[name] == pytest.approx(value, abs=1e-6)
        assert scores["loss"] == pytest.approx(float(losses.double().mean()), rel=1e-5)
        assert scores_of(target, target, classes, batch_size)[0]["mcc"] == pytest.approx(1)
        if classes == 2:
            opposite, _ = scores_of(1 - target, target, classes, batch_size)
            assert opposite["mcc"] == pytest.approx(-1)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("one_class", ["predicted", "target", "both"])
@pytest.mark.parametrize("value", [0, 1])
def test_one_class_only(classes, one_class, value):
    mixed = torch.arange(30) % classes
    constant = torch.full((30,), value)
    predicted = mixed if one_class == "target" else constant
    target = mixed if one_class == "predicted" else constant
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores, _ = scores_of(predicted, target, classes, 8)
    with warnings.catch_warnings(action="ignore"):  # scikit-learn speaks of a single label
        expected = expected_scores(predicted, target, classes)
    assert expected["mcc"] == 0
    for name, number in expected.items():
        assert scores[name] == pytest.approx(number, abs=1e-6)


def test_large_counts():
    """The products in the correlation pass 2^63."""
    keeper = LabelScores(TOKENS[:2])
    keeper.metrics["mcc"].update(torch.tensor([0]), torch.tensor([0]))
    keeper.metrics["mcc"].confmat += torch.tensor([[399_999, 100_000], [50_000, 450_000]])
    counts = [400_000, 100_000, 50_000, 450_000]
    expected = matthews_corrcoef([0, 0, 1, 1], [0, 1, 0, 1], sample_weight=counts)
    assert float(keeper.metrics["mcc"].compute()) == pytest.approx(expected, abs=1e-6)


def test_a_loss_that_is_not_a_number_shows():
    keeper, generator = LabelScores(TOKENS[:2]), torch.Generator().manual_seed(0)
    keeper.update(batch(torch.tensor([0]), generator, [1]), torch.tensor([0]), torch.tensor([2]))
    output = batch(torch.tensor([0, 1]), generator, [1, 1])
    output.logits[1] = torch.nan
    keeper.update(output, torch.tensor([0, 1]), torch.tensor([1, 0]))
    assert torch.isnan(keeper.compute()["loss"])


def test_rows_without_classes_have_a_loss_alone():
    keeper = LabelScores([])
    generator = torch.Generator().manual_seed(0)
    output = batch(torch.tensor([1, 0]), generator, [2, 1])
    keeper.update(output, torch.tensor([0, 0]), torch.tensor([1, 0]))
    losses = cross_entropy(output.logits, output.labels, reduction="none").double()
    assert keeper.compute() == {"loss": pytest.approx(float(losses.mean()), rel=1e-6)}
    first, second = float(losses[:2].mean()), float(losses[2])
    assert keeper.rows == {"row": [0, 1], "loss": [second, first], "tokens": [1, 2]}


@pytest.mark.parametrize("classes", [2, 3])
def test_the_rows_hold_what_the_scores_are_made_of(classes):
    """In the order of their numbers, without padding rows; the task loss is scikit-learn's."""
    generator = torch.Generator().manual_seed(0)
    target = torch.arange(23) % classes
    order = torch.randperm(23, generator=generator)
    keeper, label_logits = LabelScores(TOKENS[:classes]), torch.zeros(23, classes)
    for index in order.split(5):
        padded = torch.cat([torch.tensor([-1]), index])
        guess = torch.randint(classes, (len(padded),), generator=generator)
        output = batch(guess, generator, [0] + [2] * len(index))
        label_logits[index] = output.logits[output.first[1:]][:, TOKENS[:classes]]
        keeper.update(output, torch.where(padded < 0, -1, target[padded]), padded)
    scores, rows = keeper.compute(), keeper.rows
    assert rows["row"] == list(range(23))
    assert rows["target"] == target.tolist()
    assert rows["predicted"] == label_logits.argmax(dim=1).tolist()
    assert rows["correct"] == [int(a == b) for a, b in zip(rows["predicted"], target, strict=True)]
    probabilities = label_logits.double().softmax(dim=1)
    for name, column in (("accuracy", "correct"), ("loss", "loss"), ("task_loss", "task_loss")):
        assert float(scores[name]) == float(torch.tensor(rows[column]).double().mean().float())
    assert float(scores["task_loss"]) == pytest.approx(log_loss(target, probabilities), rel=1e-6)
    each = [
        log_loss([t], p[None], labels=range(classes))
        for t, p in zip(target, probabilities, strict=True)
    ]
    assert rows["task_loss"] == pytest.approx(each, rel=1e-12)


def test_a_score_counts_the_questions_that_have_it():
    metric = MeanScores(["accuracy", "accuracy/anatomy", "accuracy/law", "accuracy/none"])
    for subject, values in {"anatomy": (1, 0, 0), "law": (1,)}.items():
        for value in values:
            metric.update({"accuracy": value, f"accuracy/{subject}": value})
    means = metric.compute()
    by_hand = {"accuracy": 2 / 4, "accuracy/anatomy": 1 / 3, "accuracy/law": 1.0}
    assert means == pytest.approx(by_hand)
    assert list(means) == list(by_hand)


def test_a_mean_of_many_questions_is_exact():
    metric = MeanScores(["pass@10"])
    values = torch.rand(20_000, dtype=torch.float64)
    for value in values.tolist():
        metric.update({"pass@10": value})
    assert metric.compute()["pass@10"] == pytest.approx(float(values.mean()), rel=1e-6)


def test_an_unknown_name_is_refused():
    with pytest.raises(KeyError, match="strict"):
        MeanScores(["flexible"]).update({"strict": 1.0})
