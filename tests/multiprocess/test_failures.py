"""Processes that die, fail, hang or do not fit together end the run with an error that says which."""

import json
import signal
import subprocess
import sys

import pytest

from tests.multiprocess.test_launch import environment
from tests.support.paths import ROOT, WORKER


def job(tiny_run, root, *more, **ends):
    options = ("--trainer.accelerator=cpu", "--trainer.devices=2", f"--output.root={root}")
    argv = ["fit", f"--config={tiny_run}", "--config=strategies/ddp.yaml", *options, *more]
    return {"argv": argv, "keep": str(root / "kept"), **ends}


@pytest.mark.parametrize(("dead", "moment"), [(1, "gradient"), (0, "checkpoint")])
def test_a_launcher_names_the_process_that_died(dead, moment, tiny_run, torchrun, tmp_path):
    status, told = torchrun([job(tiny_run, tmp_path, die=[dead, moment, 1])], timeout=90)
    assert status != 0
    assert f"rank      : {dead} (local_rank: {dead})" in told
    assert "Signal 9 (SIGKILL)" in told


@pytest.mark.parametrize(("dead", "moment"), [(1, "training"), (0, "gradient")])
def test_the_others_name_the_process_that_died(dead, moment, tiny_run, by_hand, tmp_path):
    ends = by_hand([job(tiny_run, tmp_path, die=[dead, moment, 1])])
    assert ends[dead][0] == -signal.SIGKILL
    status, told = ends[1 - dead]
    assert status == 1, told
    assert f"error: process {dead} of 2 does not answer any more" in told
    assert "--ckpt_path last" in told
    assert "Traceback" not in told


def test_the_others_name_the_process_whose_data_are_missing(
    tiny_run, sst2_folder, by_hand, tmp_path
):
    """Before the model is loaded, and with its own error where it happened."""
    jobs = [job(tiny_run, tmp_path / "runs", f"--data.path={sst2_folder.name}")]
    (others, told), (status, error) = by_hand(jobs, folders=(sst2_folder.parent, tmp_path))
    assert (others, status) == (1, 2), told + error
    assert "error: process 1 of 2 does not answer any more" in told
    assert error.splitlines()[-1].startswith("error: ")
    assert sst2_folder.name in error.splitlines()[-1]
    assert "parameters in float32" not in told


@pytest.mark.parametrize("hangs", [0, 1])
def test_the_others_name_the_process_that_hangs(hangs, tiny_run, by_hand, tmp_path):
    """A stopped process keeps its connections: only the configured timeout tells."""
    timeout = "--trainer.strategy.timeout=0:00:10"
    ends = by_hand([job(tiny_run, tmp_path, timeout, hang=[hangs, "training", 2])], hangs=hangs)
    status, told = ends[1 - hangs]
    assert status == 1, told
    assert f"error: process {hangs} of 2 does not answer any more" in told


def test_the_others_name_the_process_that_cannot_write_at_the_end(tiny_run, by_hand, tmp_path):
    (status, error), (others, told) = by_hand([job(tiny_run, tmp_path, fail=[0, "report", 1])])
    assert (status, others) == (1, 1)
    assert error.splitlines()[-1].endswith("No space left on device")
    assert "error: process 0 of 2 does not answer any more" in told
    assert "Traceback" not in told


def test_an_error_that_only_sounds_like_lost_contact_is_shown(tiny_run, by_hand, tmp_path):
    (others, told), (status, error) = by_hand([job(tiny_run, tmp_path, stall=[1, "training", 2])])
    assert (others, status) == (1, 1)
    assert "Traceback" in error
    assert error.rstrip().endswith("RuntimeError: DataLoader timed out after 5 seconds")
    assert "does not answer" not in error
    assert "error: process 1 of 2 does not answer any more" in told


def test_a_signal_before_the_first_step_is_told_where_it_came(tiny_run, by_hand, tmp_path):
    (others, told), (status, own) = by_hand([job(tiny_run, tmp_path, term=[1, "gradient", 1])])
    assert (status, others) == (143, 1), told + own
    assert "SIGTERM: stopped before the first step" in own
    assert "error: process 1 of 2 does not answer any more" in told


def test_slurms_warning_to_one_process_requeues_the_job_once(tiny_run, by_hand, tmp_path):
    """The other process has got SIGTERM; all end with the status that Slurm wants."""
    asked = tmp_path / "asked.txt"
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {asked}\n')
    scontrol.chmod(0o755)
    slurm = {"SLURM_JOB_ID": "77", "PATH": f"{scontrol.parent}:{environment()['PATH']}"}
    ends = {"usr1": [1, "training", 2], "term": [0, "training", 2]}
    jobs = [job(tiny_run, tmp_path, "--trainer.max_steps=9", **ends)]
    (status, told), (other, _) = by_hand(jobs, environment=slurm)
    assert (status, other) == (0, 0), told
    assert "SIGUSR1: stopped after step 2" in told
    assert asked.read_text() == "requeue 77\n"


def test_processes_with_other_settings_are_refused(tiny_run, by_hand, tmp_path):
    root = tmp_path / "differ"
    ends = by_hand(lambda rank: [job(tiny_run, root, f"--model.adapter.r={4 - rank}")])
    for status, told in ends:
        assert status == 2, told
        assert "process 1 was started with other settings" in told
        assert "model.adapter.r is 3, not 4" in told
        assert "reading" not in told, "before the data are read"
    assert not list(root.glob("tiny/*"))


@pytest.mark.parametrize(
    ("ends", "status", "told"),
    [
        ({"die": [1, "training", 2]}, 1, "error: process 1 of 2 does not answer any more"),
        ({"term": [0, "training", 2], "slow_finish": 7}, 143, "SIGTERM: stopped after step 2"),
    ],
)
def test_lightnings_launcher_lets_the_first_process_finish(ends, status, told, tiny_run, tmp_path):
    """It would kill it within five seconds of another's end with a bad status."""
    file = tmp_path / "jobs.json"
    file.write_text(json.dumps([job(tiny_run, tmp_path, "--trainer.max_steps=9", **ends)]))
    done = subprocess.run(
        [sys.executable, str(WORKER), str(file)],
        env=environment(PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == status, done.stdout + done.stderr
    assert told in done.stderr
