"""Processes that die, fail, hang or do not fit together end the run in bounded time, with one clear line."""

import json
import signal
import subprocess
import sys

import pytest

from tests.support.paths import ROOT
from tests.support.processes import environment

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

PEER_FAILURE = "error: another of the 2 processes has ended, or did not answer within"
RESUME_HINT = "`--ckpt_path last` goes on from the last checkpoint"


def job(tiny_run, root, *more, **ends):
    options = ("--trainer.accelerator=cpu", "--trainer.devices=2", f"--output.root={root}")
    argv = ["fit", f"--config={tiny_run}", "--config=strategies/ddp.yaml", *options, *more]
    return {"argv": argv, "keep": str(root / "kept"), **ends}


def assert_peer_failure(status, output):
    assert status == 1, output
    assert PEER_FAILURE in output
    assert RESUME_HINT in output


def run_worker(folder, jobs, *launcher):
    """Run a worker's jobs under a launcher that imports everything anew; return status and output."""
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs))
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "tests.support.worker", str(file)],
        env=environment(PYTHONPATH=str(ROOT)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    return done.returncode, done.stdout


def test_torchrun_names_the_process_that_died(tiny_run, tmp_path):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    jobs = [job(tiny_run, tmp_path, die=[0, "checkpoint", 1])]
    status, output = run_worker(tmp_path, jobs, *torchrun)
    assert status != 0
    assert "rank      : 0 (local_rank: 0)" in output
    assert "Signal 9 (SIGKILL)" in output


@pytest.mark.parametrize(("dead", "moment"), [(0, "gradient"), (1, "training"), (0, "checkpoint")])
def test_without_a_launcher_the_other_process_ends_too(dead, moment, tiny_run, forked, tmp_path):
    ends = forked([job(tiny_run, tmp_path, die=[dead, moment, 1])])
    assert ends[dead][0] == -signal.SIGKILL
    status, output = ends[1 - dead]
    assert_peer_failure(status, output)
    assert "Traceback" not in output


def test_data_missing_on_one_process_end_both(tiny_run, sst2_folder, forked, tmp_path):
    """Before the model is loaded, and with its own error where it happened."""
    jobs = [job(tiny_run, tmp_path / "runs", f"--data.path={sst2_folder.name}")]
    (other, output), (status, error) = forked(jobs, folders=(sst2_folder.parent, tmp_path))
    assert status == 2, error
    assert_peer_failure(other, output)
    assert error.splitlines()[-1].startswith("error: ")
    assert sst2_folder.name in error.splitlines()[-1]
    assert "parameters in float32" not in output


@pytest.mark.parametrize("hangs", [0, 1])
def test_a_stopped_process_exceeds_the_timeout(hangs, tiny_run, forked, tmp_path):
    """It keeps its connections, so only the configured timeout ends the wait; the traceback says for what."""
    timeout = "--trainer.strategy.timeout=0:00:05"
    ends = forked([job(tiny_run, tmp_path, timeout, hang=[hangs, "training", 2])], hangs=hangs)
    status, output = ends[1 - hangs]
    assert_peer_failure(status, output)
    assert "Timed out waiting 5000ms" in output
    assert "Traceback" in output


@pytest.mark.parametrize(
    ("failing", "ends", "status", "message"),
    [
        (0, {"fail": [0, "report", 2]}, 2, "could not all be saved (No space left on device)"),
        (1, {"stall": [1, "training", 2]}, 1, "RuntimeError: DataLoader timed out after 5 seconds"),
        (1, {"term": [1, "gradient", 1]}, 143, "SIGTERM: stopped before the first step"),
    ],
)
def test_an_error_of_one_process_is_its_own(
    failing, ends, status, message, tiny_run, forked, tmp_path
):
    """A full disk, an error that reads like a peer's timeout, a signal: named where they happened."""
    processes = forked([job(tiny_run, tmp_path, **ends)])
    ended, error = processes[failing]
    assert ended == status, error
    assert message in error
    assert PEER_FAILURE not in error
    other, output = processes[1 - failing]
    assert_peer_failure(other, output)
    assert "Traceback" not in output


def test_slurms_warning_to_one_process_requeues_the_job_once(tiny_run, forked, tmp_path):
    """The other process has got SIGTERM; all end with the status that Slurm wants."""
    calls = tmp_path / "calls.txt"
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {calls}\n')
    scontrol.chmod(0o755)
    slurm = {"SLURM_JOB_ID": "77", "PATH": f"{scontrol.parent}:{environment()['PATH']}"}
    ends = {"usr1": [1, "training", 2], "term": [0, "training", 2]}
    jobs = [job(tiny_run, tmp_path, "--trainer.max_steps=9", **ends)]
    (status, output), (other, _) = forked(jobs, environment=slurm)
    assert (status, other) == (0, 0), output
    assert "SIGUSR1: stopped after step 2" in output
    assert calls.read_text() == "requeue 77\n"


def test_other_settings_are_an_input_error_on_all_processes(tiny_run, forked, tmp_path):
    root = tmp_path / "differ"
    ends = forked(lambda number: [job(tiny_run, root, f"--model.adapter.r={4 - number}")])
    assert "model.adapter.r is 3, not 4" in ends[0][1]
    for number, (status, output) in enumerate(ends):
        assert status == 2, output
        told = "process 1 was started with other settings than process 0: model.adapter.r"
        assert output.count(told) == (number == 0), output
        assert "parameters in float32" not in output, "before the model is read"
    assert not list(root.glob("tiny/*"))


DIVERGES = "--model.optimizer.lr=1e38"
FSDP_ON_CODES = ["--config=models/nf4.yaml", "--config=strategies/fsdp.yaml"]


@pytest.mark.parametrize(
    ("ends", "options", "status", "message"),
    [
        ({"die": [1, "training", 2]}, (), 1, PEER_FAILURE),
        ({"term": [0, "training", 2], "slow_finish": 7}, (), 143, "SIGTERM: stopped after step 2"),
        ({"slow_finish": 7}, (DIVERGES,), 3, "error: the loss is nan"),
    ],
)
def test_lightnings_launcher(ends, options, status, message, tiny_run, tmp_path):
    """Its observer may kill the first process within five seconds after another has died.

    Where all fail together they leave together, however long the first one has to finish.
    """
    jobs = [job(tiny_run, tmp_path, "--trainer.max_steps=9", *options, **ends)]
    ended, output = run_worker(tmp_path, jobs)
    killed = "die" in ends and ended == -signal.SIGKILL
    assert killed or (ended == status and message in output), output


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        ([DIVERGES], 3, "error: the loss is nan"),
        (["--model.adapter.target_modules=[q_prj]"], 2, "which fits no layer of this model"),
        (FSDP_ON_CODES, 2, "are quantised (model.quantization nf4), but this strategy shards them"),
    ],
)
def test_an_error_of_all_has_its_own_status(options, status, message, tiny_run, forked, tmp_path):
    """And is told by the first process alone, but for the loss, where each has rows of its own to name."""
    options = ("--trainer.max_steps=9", *options)
    ends = forked([job(tiny_run, tmp_path, *options, slow_finish=3)])
    assert [ended for ended, _ in ends] == [status, status], ends
    assert message in ends[0][1]
    assert (message in ends[1][1]) == (options[-1] == DIVERGES)
