"""Start real processes with torchrun."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT, WORKER


@pytest.fixture
def torchrun(tmp_path):
    """Return `torchrun(jobs, ...)`, which runs the worker's jobs and returns status and output."""

    def run(jobs, processes=2, timeout=600):
        file = tmp_path / "jobs.json"
        file.write_text(json.dumps(jobs))
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        done = subprocess.run(
            [*launcher, "--nproc_per_node", str(processes), str(WORKER), str(file)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr

    return run


@pytest.fixture(scope="session")
def forks():
    """Return the process that `by_hand` forks from."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment["WANDB_MODE"] = "offline"
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.forks"],
        env=environment,
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    yield process
    process.stdin.close()
    assert process.wait(timeout=60) == 0


@pytest.fixture
def by_hand(forks, tmp_path):
    """Return `by_hand(jobs, ...)`: a worker's jobs, or a part, on two processes that no launcher watches.

    It returns each one's status (None if it had to be killed) and output. `hangs` is the process that is
    killed when the other has ended; `folders` are their working directories; `environment` is added to theirs.
    """

    def run(jobs, timeout=120, hangs=None, folders=(ROOT, ROOT), environment=None):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        processes = []
        for rank in range(2):
            file, log = tmp_path / f"jobs_{rank}.json", tmp_path / f"log_{rank}.txt"
            file.write_text(json.dumps(jobs(rank) if callable(jobs) else jobs))
            own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
            own = {key: str(value) for key, value in own.items()} | {"MASTER_ADDR": "127.0.0.1"}
            processes.append(
                {
                    "jobs": str(file),
                    "log": str(log),
                    "folder": str(folders[rank]),
                    "environment": own | (environment or {}),
                }
            )
        asked = {"processes": processes, "timeout": timeout, "hangs": hangs}
        forks.stdin.write(json.dumps(asked) + "\n")
        forks.stdin.flush()
        statuses = json.loads(forks.stdout.readline())
        return [
            (status, Path(process["log"]).read_text())
            for status, process in zip(statuses, processes, strict=True)
        ]

    return run


@pytest.fixture(scope="session")
def models_without_dropout(tmp_path_factory, run_models, tiny_t5, tiny_gpt2):
    """Return a folder with `llama`, `t5` and `gpt2`: dropout is each process's own."""
    folder = tmp_path_factory.mktemp("parity")
    shutil.copytree(run_models, folder, dirs_exist_ok=True)
    tiny_t5(dropout_rate=0.0).save_pretrained(folder / "t5")
    tiny_gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0).save_pretrained(folder / "gpt2")
    return folder
