"""The launch recipes: one node, two nodes, Slurm, and settings that raise InputError."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from lightning.pytorch.accelerators import MPSAccelerator

from tests.support.parity import losses, parity_arguments
from tests.support.paths import ROOT
from tests.support.processes import environment
from tests.support.two_nodes import two_nodes

pytestmark = pytest.mark.multiprocess

LAUNCH = ROOT / "launch"
STRATEGIES = ("ddp", "fsdp")


PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}


def ends(*processes):
    """Wait for processes; return the status and output of each."""
    outputs = [process.communicate(timeout=180)[0] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, outputs, strict=True)]


@pytest.fixture
def run_argv(parity_config, models_without_dropout, tmp_path):
    """Return `run_argv(strategy)`: what `reference("llama")` runs, for two processes."""

    def argv(strategy):
        overlay = f"--config={ROOT}/configs/strategies/{strategy}.yaml"
        model = models_without_dropout / "llama"
        return parity_arguments(parity_config, model, tmp_path / strategy, 4, overlay)

    return argv


@pytest.mark.slow
@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("ip") is None, reason="network namespaces need root and ip"
)
def test_two_nodes(reference, run_argv, tmp_path):
    for strategy in STRATEGIES:
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
            script = [str(LAUNCH / "node.sh"), "1", *run_argv(strategy)]
            (status_0, output_0), (status_1, output_1) = ends(
                *(
                    node.popen(script, env=env, **PIPES)
                    for node, env in zip(nodes, own, strict=True)
                )
            )
        assert (status_0, status_1) == (0, 0), output_0[-4000:] + output_1[-4000:]
        assert "run folder" in output_0
        assert "run folder" not in output_1
        assert losses(tmp_path / strategy) == pytest.approx(losses(reference("llama")), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "lightning"])
def test_one_node(launcher, reference, run_argv, tmp_path):
    argv = [str(LAUNCH / "one_node.sh"), "2", *run_argv("ddp")]
    if launcher == "lightning":
        argv = [sys.executable, str(ROOT / "train.py"), *run_argv("ddp"), "--trainer.devices=2"]
    ((status, output),) = ends(subprocess.Popen(argv, env=environment(), **PIPES))
    assert status == 0, output[-4000:]
    assert output.count("run folder") == 1
    assert losses(tmp_path / "ddp") == pytest.approx(losses(reference("llama")), rel=1e-4)


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


@pytest.mark.slow
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
    assert losses(tmp_path / "ddp") == pytest.approx(losses(reference("llama")), rel=1e-4)


TORCHRUN = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "2",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "1",
    "GROUP_RANK": "0",
    "LOCAL_WORLD_SIZE": "2",
    "TORCHELASTIC_RUN_ID": "none",
}
SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NAME": "lora-one",
    "SLURM_NTASKS": "3",
    "SLURM_NTASKS_PER_NODE": "3",
    "SLURM_NODELIST": "localhost",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}


@pytest.mark.parametrize(
    ("options", "variables", "message"),
    [
        (["--trainer.strategy=fsdp"], {}, "--config strategies/fsdp.yaml"),
        (["--trainer.strategy=fsdp_cpu_offload"], {}, "--config strategies/fsdp.yaml"),
        (["--trainer.strategy=fdsp"], {}, "fdsp"),
        ([], {"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "1"}, "MASTER_ADDR"),
        ([], {"WORLD_SIZE": "2", "MASTER_ADDR": "x"}, "MASTER_PORT"),
        ([], TORCHRUN, "started 2 processes (WORLD_SIZE), but trainer.num_nodes=1 times"),
        (["--config=strategies/ddp.yaml", "--trainer.devices=3"], TORCHRUN, "trainer.devices=3"),
        (["--config=strategies/ddp.yaml", "--trainer.devices=2"], SLURM, "--ntasks-per-node=3"),
        (["--trainer.accelerator=tpu"], {}, "torch_xla"),
        (["--trainer.accelerator=gpv"], {}, "gpv"),
        (["--trainer.precision=bf16-true"], {}, "float32 always. Set model.dtype"),
        (["--trainer.precision=16-true"], {}, "bf16-mixed to compute in 16 bits"),
        (
            [
                "--config=strategies/fsdp.yaml",
                "--trainer.strategy.cpu_offload=true",
                "--trainer.strategy.process_group_backend=nccl",
            ],
            {},
            "process_group_backend is nccl",
        ),
    ],
)
def test_what_cannot_be_started(
    options, variables, message, tiny_run, command, monkeypatch, capsys, tmp_path
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    root = tmp_path / "not_begun"
    assert command("fit", "--config", tiny_run, f"--output.root={root}", *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert len(error.splitlines()) == 1
    assert not list(root.glob("tiny/*")), "no run folder for a run that did not begin"


def test_apples_gpu_is_refused(tiny_run, command, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(MPSAccelerator, "is_available", lambda: True)
    monkeypatch.setattr(MPSAccelerator, "parse_devices", lambda devices: [0])
    monkeypatch.setattr(
        MPSAccelerator, "get_parallel_devices", lambda devices: [torch.device("mps", 0)]
    )
    options = ["--trainer.accelerator=mps", f"--output.root={tmp_path / 'not_begun'}"]
    assert command("fit", "--config", tiny_run, *options) == 2
    assert "no float64: set trainer.accelerator cpu" in capsys.readouterr().err
    assert not list((tmp_path / "not_begun").glob("tiny/*"))


def test_one_process_plans_for_all(tiny_run, command, monkeypatch, capsys):
    """torchrun starts every process, whatever the command."""
    for name, value in {**TORCHRUN, "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert command("plan", "--config", tiny_run) == 0
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert command("plan", "--config", tiny_run) == 0
    assert "fits: " in capsys.readouterr().out
