"""Processes that die, or do not fit together, end the run with an error that says which."""

import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from tests.distributed.conftest import ROOT, WORKER


def job(tiny_run, root, *more):
    options = ("--trainer.accelerator=cpu", "--trainer.devices=2", f"--output.root={root}")
    return ["fit", f"--config={tiny_run}", "--config=strategies/ddp.yaml", *options, *more]


@pytest.mark.parametrize(("dead", "moment"), [(1, "gradient"), (0, "training"), (0, "checkpoint")])
def test_a_launcher_names_the_process_that_died(dead, moment, tiny_run, torchrun, tmp_path):
    argv = job(tiny_run, tmp_path / "dies")
    jobs = [{"argv": argv, "keep": str(tmp_path / "kept"), "die": [dead, moment, 1]}]
    status, told = torchrun(jobs, timeout=90)
    assert status != 0
    assert f"rank      : {dead} (local_rank: {dead})" in told
    assert "Signal 9 (SIGKILL)" in told


def by_hand(jobs_of, tmp_path, timeout=120, hangs=None):
    """Start two processes without a launcher that watches them; return each one's end.

    Args:
        jobs_of: The worker's jobs for a process number.
        tmp_path: Where the jobs are written.
        timeout: Seconds for both together.
        hangs: The process that has to be killed when the other has ended.
    """
    order = (0, 1) if hangs is None else (1 - hangs, hangs)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(2):
        file = tmp_path / f"jobs_{rank}.json"
        file.write_text(json.dumps(jobs_of(rank)))
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
        environment = {key: str(value) for key, value in own.items()}
        environment |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        processes.append(
            subprocess.Popen(
                [sys.executable, str(WORKER), str(file)],
                env={**os.environ, **environment},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    told = ["", ""]
    for rank in order:
        told[rank] = processes[rank].communicate(timeout=timeout)[0]
        if order[0] == rank and hangs is not None:
            processes[1 - rank].kill()
    return [(process.returncode, text) for process, text in zip(processes, told, strict=True)]


@pytest.mark.parametrize(("dead", "moment"), [(1, "training"), (0, "gradient")])
def test_the_others_name_the_process_that_died(dead, moment, tiny_run, tmp_path):
    argv = job(tiny_run, tmp_path / "dies")
    jobs = [{"argv": argv, "keep": str(tmp_path / "kept"), "die": [dead, moment, 1]}]
    ends = by_hand(lambda _: jobs, tmp_path)
    assert ends[dead][0] == -signal.SIGKILL
    status, told = ends[1 - dead]
    assert status == 1
    assert f"error: process {dead} of 2 does not answer any more" in told
    assert "--ckpt_path last" in told


@pytest.mark.parametrize("hangs", [0, 1])
def test_the_others_name_the_process_that_hangs(hangs, tiny_run, tmp_path):
    """A stopped process keeps its connections: only the configured timeout tells."""
    argv = job(tiny_run, tmp_path / "hangs", "--trainer.strategy.timeout=0:00:10")
    jobs = [{"argv": argv, "keep": str(tmp_path / "kept"), "hang": [hangs, "training", 2]}]
    ends = by_hand(lambda _: jobs, tmp_path, hangs=hangs)
    status, told = ends[1 - hangs]
    assert status == 1
    assert f"error: process {hangs} of 2 does not answer any more" in told


def test_processes_with_other_settings_are_refused(tiny_run, tmp_path):
    def jobs(rank):
        argv = job(tiny_run, tmp_path / "differ", f"--model.adapter.r={4 - rank}")
        return [{"argv": argv, "keep": str(tmp_path / "kept")}]

    for status, told in by_hand(jobs, tmp_path):
        assert status == 2
        assert "process 1 was started with other settings" in told
        assert "model.adapter.r is 3, not 4" in told
    assert not list((tmp_path / "differ").glob("tiny/*"))
