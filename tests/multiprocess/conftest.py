"""Start real processes: forked from one that has imported everything, or with torchrun."""

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.parity import parity_job
from tests.support.paths import ROOT
from tests.support.processes import environment
from tests.support.tiny_run import write_tiny_run


@pytest.fixture(scope="session")
def _forks():
    """Start the process that others are forked from."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.forks"],
        env=environment(PYTHONPATH=str(ROOT), WANDB_MODE="offline"),
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    yield process
    process.stdin.close()
    assert process.wait(timeout=60) == 0


@pytest.fixture(scope="session")
def forked(_forks, tmp_path_factory):
    """Return `forked(jobs, ...)`: a worker's jobs, or a part, on processes that no launcher watches.

    It returns each one's status (None if it had to be killed) and output. `jobs` may be a function of the
    process's number; `hangs` is the process that is killed when the others have ended; `folders` are the
    working directories, `nodes` where they run; `environment` is added to theirs.
    """

    def run(jobs, processes=2, timeout=120, hangs=None, folders=None, environment=None, nodes=()):
        folder = tmp_path_factory.mktemp("forked")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        starts = []
        for rank in range(processes):
            file = folder / f"jobs_{rank}.json"
            file.write_text(json.dumps(jobs(rank) if callable(jobs) else jobs))
            own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
            if nodes:
                own |= {
                    "NODE_RANK": rank,
                    "LOCAL_RANK": 0,
                    "GLOO_SOCKET_IFNAME": nodes[rank].interface,
                }
            own = {key: str(value) for key, value in own.items()}
            own["MASTER_ADDR"] = nodes[0].address if nodes else "127.0.0.1"
            starts.append(
                {
                    "jobs": str(file),
                    "log": str(folder / f"log_{rank}.txt"),
                    "folder": str(folders[rank] if folders else ROOT),
                    "environment": (own if processes > 1 else {}) | (environment or {}),
                    "node": nodes[rank].name if nodes else None,
                }
            )
        request = {"processes": starts, "timeout": timeout, "hangs": hangs}
        _forks.stdin.write(json.dumps(request) + "\n")
        _forks.stdin.flush()
        statuses = json.loads(_forks.stdout.readline())
        outputs = [Path(start["log"]).read_text() for start in starts]
        return list(zip(statuses, outputs, strict=True))

    return run


@pytest.fixture(scope="session")
def finished(forked):
    """Return `finished(jobs, ...)`, which is `forked` and asserts that every process ends with status 0."""

    def run(jobs, **options):
        for status, output in forked(jobs, **options):
            assert status == 0, output[-6000:]

    return run


@pytest.fixture(scope="session")
def models_without_dropout(tmp_path_factory, run_models, tiny_t5, tiny_gpt2):
    """Return a folder with `llama`, `t5` and `gpt2`: dropout is each process's own."""
    folder = tmp_path_factory.mktemp("parity")
    shutil.copytree(run_models, folder, dirs_exist_ok=True)
    tiny_t5(dropout_rate=0.0).save_pretrained(folder / "t5")
    tiny_gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0).save_pretrained(folder / "gpt2")
    return folder


@pytest.fixture(scope="session")
def parity_config(tmp_path_factory, run_models, sst2_folder):
    """Return the configuration file of `parity_job`."""
    folder = tmp_path_factory.mktemp("parity_config")
    return write_tiny_run(folder / "tiny.yaml", run_models / "llama", sst2_folder, folder / "runs")


@pytest.fixture(scope="session")
def reference(finished, parity_config, models_without_dropout, tmp_path_factory):
    """Return `reference(model)`, the root of the run of `parity_job` on one process."""
    roots = {}

    def run(model):
        if model not in roots:
            root = roots[model] = tmp_path_factory.mktemp(f"reference_{model}")
            job = parity_job(parity_config, models_without_dropout / model, root, 8)
            finished([job], processes=1)
        return roots[model]

    return run
