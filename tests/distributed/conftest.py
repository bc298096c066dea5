"""Start real processes with torchrun."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("worker.py")


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
