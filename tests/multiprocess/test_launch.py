"""The launch recipes: one node, two nodes, Slurm."""

import os
import shutil
import subprocess
import sys

import pytest

from tests.support.parity import assert_equal_on_all, losses, parity_job
from tests.support.paths import ROOT
from tests.support.processes import environment
from tests.support.two_nodes import two_nodes

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

LAUNCH = ROOT / "launch"
STEPS = 4  # of those of the reference, whose learning rate is constant

PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}


def ends(*processes):
    """Wait for processes; return the status and output of each."""
    outputs = [process.communicate(timeout=180)[0] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, outputs, strict=True)]


@pytest.fixture
def run_argv(parity_config, models_without_dropout, tmp_path):
    """Return `run_argv(strategy, *more)`: the first steps of `reference("llama")`, for two processes."""

    def argv(strategy, *more):
        overlay = f"--config={ROOT}/configs/strategies/{strategy}.yaml"
        model = models_without_dropout / "llama"
        steps = f"--trainer.max_steps={STEPS}"
        return parity_job(parity_config, model, tmp_path / strategy, 4, overlay, steps, *more)[
            "argv"
        ]

    return argv


namespaces = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("ip") is None, reason="network namespaces need root and ip"
)


@namespaces
def test_two_nodes_with_ddp(reference, run_argv, finished, tmp_path):
    """Without the recipe, which the next test starts in the same way."""
    argv = run_argv("ddp", "--trainer.devices=1", "--trainer.num_nodes=2")
    with two_nodes() as nodes:
        finished([{"argv": argv, "keep": str(tmp_path / "kept")}], nodes=nodes)
    assert_equal_on_all(tmp_path / "kept", "trained")
    assert losses(tmp_path / "ddp") == pytest.approx(losses(reference("llama"))[:STEPS], rel=1e-4)


@namespaces
def test_two_nodes(reference, run_argv, tmp_path):
    """FSDP2 by the recipe; the other recipes train with DDP."""
    with two_nodes() as nodes:
        own = [
            environment(
                NODES="2",
                NODE_RANK=str(i),
                MASTER_ADDR=nodes[0].address,
                GLOO_SOCKET_IFNAME=node.interface,
            )
            for i, node in enumerate(nodes)
        ]
        script = [str(LAUNCH / "node.sh"), "1", *run_argv("fsdp")]
        started = [
            node.popen(script, env=env, **PIPES) for node, env in zip(nodes, own, strict=True)
        ]
        (status_0, output_0), (status_1, output_1) = ends(*started)
    assert (status_0, status_1) == (0, 0), output_0[-4000:] + output_1[-4000:]
    assert "run folder" in output_0
    assert "run folder" not in output_1
    assert losses(tmp_path / "fsdp") == pytest.approx(losses(reference("llama"))[:STEPS], rel=1e-4)


@pytest.mark.parametrize("launcher", ["torchrun", "lightning"])
def test_one_node(launcher, reference, run_argv, tmp_path):
    argv = [str(LAUNCH / "one_node.sh"), "2", *run_argv("ddp")]
    if launcher == "lightning":
        argv = [sys.executable, str(ROOT / "train.py"), *run_argv("ddp"), "--trainer.devices=2"]
    ((status, output),) = ends(subprocess.Popen(argv, env=environment(), **PIPES))
    assert status == 0, output[-4000:]
    assert output.count("run folder") == 1
    assert losses(tmp_path / "ddp") == pytest.approx(losses(reference("llama"))[:STEPS], rel=1e-4)


SRUN = """#!/usr/bin/env bash
# Starts the tasks of one node here.
echo "$@" > "{folder}/srun.txt"
shift  # --kill-on-bad-exit
for task in 0 1; do
    SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_NODEID=0 "$@" &
    tasks+=($!)
done
for task in "${{tasks[@]}}"; do wait "$task"; done
"""


def test_slurm(reference, run_argv, tmp_path):
    """The job script with a stand-in for srun: two tasks, as Slurm describes them to a program."""
    srun = tmp_path / "bin" / "srun"
    srun.parent.mkdir()
    srun.write_text(SRUN.format(folder=tmp_path))
    srun.chmod(0o755)
    own = environment(
        SLURM_JOB_ID="4711",
        SLURM_JOB_NAME="lora-one",
        SLURM_JOB_NUM_NODES="1",
        SLURM_NNODES="1",
        SLURM_NTASKS="2",
        SLURM_NTASKS_PER_NODE="2",
        SLURM_NODELIST="localhost",
        SLURM_JOB_NODELIST="localhost",
        SLURM_SUBMIT_DIR=str(ROOT),
    )
    own["PATH"] = f"{srun.parent}:{own['PATH']}"
    job = ["bash", str(LAUNCH / "slurm.sbatch"), *run_argv("ddp")]
    ((status, output),) = ends(subprocess.Popen(job, env=own, **PIPES))
    assert status == 0, output[-4000:]
    assert "--ckpt_path last" in (tmp_path / "srun.txt").read_text()
    assert "starting anew" in output
    assert output.count("run folder") == 1
    assert losses(tmp_path / "ddp") == pytest.approx(losses(reference("llama"))[:STEPS], rel=1e-4)
