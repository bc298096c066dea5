"""Benchmarks on two processes: the answers and scores of one process, also after a kill."""

import json
import signal

import pytest

from tests.support.parity import two_processes
from tests.support.toy_benchmarks import write_config

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]


def arguments(folder, model, size, strategy=None):
    """Write a configuration into a folder and return the command of a test on it."""
    folder.mkdir(exist_ok=True)
    file = write_config(folder, model, size, samples=2)
    return ["test", f"--config={file}", *(two_processes(strategy) if strategy else ())]


def results(folder):
    """Return scores, answers and the numbers of questions answered before, of the test below a folder."""
    saved = json.loads((folder / "runs" / "toy" / "benchmarks.json").read_text())
    by_name = {value["name"]: value for value in saved.values()}
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


def assert_same_results(folder, alone):
    scores, outputs, before = results(folder)
    wanted_scores, wanted_outputs, _ = results(alone)
    assert outputs == wanted_outputs
    assert scores == {
        name: pytest.approx(values, rel=1e-6) for name, values in wanted_scores.items()
    }
    return before


def test_two_processes_answer_as_one_does_also_after_a_kill(
    models_without_dropout, forked, finished, tmp_path
):
    """23 and 17 questions in batches of 3 a process: nothing divides anything.

    One of two processes is killed while the questions are asked; one process asks the rest.
    """
    model = models_without_dropout / "llama"

    def job(name, size, strategy=None, **ends):
        argv = arguments(tmp_path / name, model, size, strategy)
        return {"argv": argv, "keep": str(tmp_path / "kept"), **ends}

    killed = {strategy: f"killed_{strategy}" for strategy in ("ddp", "fsdp")}
    finished([job("alone", 6)], processes=1)
    finished([job(strategy, 3, strategy) for strategy in killed])
    for strategy, name in killed.items():
        assert_same_results(tmp_path / strategy, tmp_path / "alone")
        ends = forked([job(name, 3, strategy, die=[1, "benchmark", 3])])
        assert [status for status, _ in ends] == [1, -signal.SIGKILL]
        assert list((tmp_path / name / "runs" / "toy" / "answers").rglob("*.part*.jsonl"))
    finished([job(name, 6) for name in killed.values()], processes=1)
    for name in killed.values():
        before = assert_same_results(tmp_path / name, tmp_path / "alone")
        assert 0 < before["writing"] < 23
