"""Benchmarks on two processes: the answers and scores of one, also after a kill."""

import json

import pytest

from tests.support.paths import ROOT

CONFIG = """
trainer: {{accelerator: cpu}}
model: {{name: {model}, adapter: null}}
data:
  class_path: data_modules.benchmark_data.BenchmarkDataModule
  init_args:
    eval_batch_size: {size}
    evals:
      - {{class_path: tests.support.toy_benchmarks.Writing, init_args: {{num_samples: 2}}}}
      - {{class_path: tests.support.toy_benchmarks.Choosing}}
output: {{name: toy, root: {root}, wandb: disabled}}
"""


def arguments(folder, model, size, strategy=None):
    """Write a configuration into a folder and return the command of a test on it."""
    folder.mkdir(exist_ok=True)
    file = folder / "benchmarks.yaml"
    file.write_text(CONFIG.format(model=model, size=size, root=folder / "runs"))
    more = []
    if strategy:
        more = [f"--config={ROOT}/configs/strategies/{strategy}.yaml", "--trainer.devices=2"]
    return ["test", f"--config={file}", *more]


def found(folder):
    """Return scores, counts of questions and answers of the test below a folder."""
    told = json.loads((folder / "runs" / "toy" / "benchmarks.json").read_text())
    by_name = {value["name"]: value for value in told.values()}
    scores = {name: value["scores"] for name, value in by_name.items()}
    outputs = {}
    for path in sorted((folder / "runs" / "toy" / "answers").rglob("*")):
        if path.is_file():
            assert path.suffix == ".jsonl"
            assert ".part" not in path.name
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            assert len({row["key"] for row in rows}) == len(rows)
            outputs |= {row["key"]: row["outputs"] for row in rows}
    before = {name: value["answered_before"] for name, value in by_name.items()}
    return scores, outputs, before


def test_two_processes_find_what_one_finds(models_without_dropout, command, torchrun, tmp_path):
    """23 and 17 questions in batches of 3 a process: nothing divides anything."""
    model = models_without_dropout / "llama"
    assert command(*arguments(tmp_path / "alone", model, 6)) == 0
    scores, outputs, _ = found(tmp_path / "alone")
    kept = str(tmp_path / "kept")
    jobs = [
        {"argv": arguments(tmp_path / name, model, 3, name), "keep": kept}
        for name in ("ddp", "fsdp")
    ]
    status, told = torchrun(jobs)
    assert status == 0, told[-6000:]
    for name in ("ddp", "fsdp"):
        others, texts, _ = found(tmp_path / name)
        assert texts == outputs
        for name, values in scores.items():
            assert others[name] == pytest.approx(values, rel=1e-6)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_killed_test_goes_on(strategy, models_without_dropout, command, torchrun, tmp_path):
    """One of two processes is killed while the questions are asked; one process asks the rest."""
    model = models_without_dropout / "llama"
    assert command(*arguments(tmp_path / "alone", model, 6)) == 0
    scores, outputs, _ = found(tmp_path / "alone")
    folder = tmp_path / strategy
    job = {"argv": arguments(folder, model, 3, strategy), "keep": str(tmp_path / "kept")}
    status, _ = torchrun([{**job, "die": [1, "benchmark", 3]}])
    assert status != 0
    parts = list((folder / "runs" / "toy" / "answers").rglob("*.part*.jsonl"))
    assert parts
    assert command(*arguments(folder, model, 6)) == 0
    others, texts, before = found(folder)
    assert texts == outputs
    assert others == {name: pytest.approx(values, rel=1e-6) for name, values in scores.items()}
    assert 0 < before["writing"] < 23
