"""The launch recipes: one node, two nodes, Slurm, and what is refused."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.accelerators import MPSAccelerator

from tests.multiprocess.test_parity import arguments, losses
from tests.support.paths import ROOT
from tests.support.two_nodes import two_nodes

LAUNCH = ROOT / "launch"
STRATEGIES = ("ddp", "fsdp")


def environment(**own):
    """Return this environment with its Python first, and one thread a process."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **own}


def ends(processes, timeout=180):
    told = [process.communicate(timeout=timeout)[0] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, told, strict=True)]


def pipes():
    return {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}


@pytest.fixture
def alone(tiny_run, models_without_dropout, command, tmp_path):
    """Return the losses of the run on one process."""
    root = tmp_path / "alone"
    assert command(*arguments(tiny_run, models_without_dropout / "llama", root, 8)) == 0
    return losses(root)


@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("ip") is None, reason="network namespaces need root and ip"
)
def test_two_nodes(alone, tiny_run, models_without_dropout, tmp_path):
    for strategy in STRATEGIES:
        root = tmp_path / strategy
        argv = arguments(tiny_run, models_without_dropout / "llama", root, 4)
        argv.append(f"--config={ROOT}/configs/strategies/{strategy}.yaml")
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
            told = ends(
                [
                    node.popen([str(LAUNCH / "node.sh"), "1", *argv], env=env, **pipes())
                    for node, env in zip(nodes, own, strict=True)
                ]
            )
        assert [status for status, _ in told] == [0, 0], told[0][1][-4000:] + told[1][1][-4000:]
        assert "run folder" in told[0][1]
        assert "run folder" not in told[1][1]
        assert losses(root) == pytest.approx(alone, rel=1e-4)


@pytest.mark.parametrize("launcher", ["torchrun", "lightning"])
def test_one_node(launcher, alone, tiny_run, models_without_dropout, tmp_path):
    root = tmp_path / launcher
    argv = arguments(tiny_run, models_without_dropout / "llama", root, 4)
    argv.append(f"--config={ROOT}/configs/strategies/ddp.yaml")
    start = [str(LAUNCH / "one_node.sh"), "2"]
    if launcher == "lightning":
        start = [sys.executable, str(ROOT / "train.py")]
        argv.append("--trainer.devices=2")
    ((status, told),) = ends([subprocess.Popen([*start, *argv], env=environment(), **pipes())])
    assert status == 0, told[-4000:]
    assert told.count("run folder") == 1
    assert losses(root) == pytest.approx(alone, rel=1e-4)


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


def test_slurm(alone, tiny_run, models_without_dropout, tmp_path):
    """The job script with a stand-in for srun: two tasks, as Slurm describes them to a program."""
    fake = tmp_path / "bin"
    fake.mkdir()
    (fake / "srun").write_text(SRUN.format(folder=tmp_path))
    (fake / "srun").chmod(0o755)
    root = tmp_path / "slurm"
    argv = arguments(tiny_run, models_without_dropout / "llama", root, 4)
    argv.append(f"--config={ROOT}/configs/strategies/ddp.yaml")
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
    own["PATH"] = f"{fake}:{own['PATH']}"
    job = ["bash", str(LAUNCH / "slurm.sbatch"), *argv]
    ((status, told),) = ends([subprocess.Popen(job, env=own, **pipes())])
    assert status == 0, told[-4000:]
    assert "--ckpt_path last" in (tmp_path / "srun.txt").read_text()
    assert "starting anew" in told
    assert told.count("run folder") == 1
    assert losses(root) == pytest.approx(alone, rel=1e-4)


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
    ("options", "variables", "told"),
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
    options, variables, told, tiny_run, command, monkeypatch, capsys, tmp_path
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    root = tmp_path / "not_begun"
    assert command("fit", "--config", tiny_run, f"--output.root={root}", *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert told in error
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
