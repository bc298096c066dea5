"""Start real processes with torchrun."""

import json
import os
import shutil
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


@pytest.fixture(scope="session")
def models_without_dropout(tmp_path_factory, run_models, tiny_t5, tiny_gpt2):
    """Return a folder with `llama`, `t5` and `gpt2`: dropout is each process's own."""
    folder = tmp_path_factory.mktemp("parity")
    shutil.copytree(run_models, folder, dirs_exist_ok=True)
    tiny_t5(dropout_rate=0.0).save_pretrained(folder / "t5")
    tiny_gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0).save_pretrained(folder / "gpt2")
    return folder
