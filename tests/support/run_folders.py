"""Read what a run leaves in its folder."""

import csv
import json

import numpy as np
import torch
from safetensors.torch import load_file


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


def table(folder, name="metrics.csv"):
    with (folder / name).open(newline="") as stream:
        return list(csv.DictReader(stream))


def row_scores(file):
    """Return the columns of a table of row scores."""
    rows = table(file.parent, file.name)
    return {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}


def check_rows(file, scores, rows):
    """Assert that the rows of a file are all rows in their order, and that the scores are their means."""
    columns = row_scores(file)
    assert columns["row"].tolist() == list(range(rows))
    means = {"loss": np.average(columns["loss"], weights=columns["tokens"])}
    if "correct" in columns:
        means |= {"accuracy": columns["correct"].mean(), "task_loss": columns["task_loss"].mean()}
        assert (columns["correct"] == (columns["target"] == columns["predicted"])).all()
    for name, mean in means.items():
        assert np.float32(mean) == np.float32(scores[name]), name


def values(folder, name):
    """Return a metric as {step: (epoch, value)}; every step stands once."""
    rows = [row for row in table(folder) if row.get(name)]
    by_step = {int(row["step"]): (row["epoch"], float(row[name])) for row in rows}
    assert len(by_step) == len(rows), f"a step of {name} stands twice: {rows}"
    return by_step


def losses(folder):
    """Return the training loss of each step, as it was logged."""
    return {step: value for step, (_, value) in values(folder, "train/loss").items()}


def weights(folder):
    """Return the tensors of the adapter, or of the model where all weights were trained."""
    [file] = [*folder.glob("adapter/*.safetensors"), *folder.glob("model/*.safetensors")]
    return load_file(file)


def same_weights(left, right):
    left, right = weights(left), weights(right)
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)
