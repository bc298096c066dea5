"""Processes and settings that do not fit together are an error of input, before a run begins."""

import pytest
import torch
from lightning.pytorch.accelerators import MPSAccelerator

from app.distributed.rendezvous import first_difference

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
        ([], {"WORLD_SIZE": "two"}, "WORLD_SIZE=two: expected a whole number"),
        ([], {"TORCHELASTIC_RUN_ID": "none"}, "not RANK, LOCAL_RANK, GROUP_RANK, WORLD_SIZE"),
        # A process that takes itself for another than the first trains and writes nothing.
        (
            [],
            {"RANK": "1"},
            "has RANK=1, which names one of several processes, but trainer.num_nodes=1",
        ),
        ([], {"LOCAL_RANK": "1"}, "has LOCAL_RANK=1, which names one of several processes"),
        ([], {"NODE_RANK": "1"}, "has NODE_RANK=1, which names one of several processes"),
        ([], {"SLURM_PROCID": "1"}, "has SLURM_PROCID=1, which names one of several processes"),
        (["--trainer.strategy=ddp", "--trainer.devices=2"], {"LOCAL_RANK": "0"}, "not WORLD_SIZE"),
        ([], {**SLURM, "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}, "(SLURM_NTASKS), but"),
        ([], TORCHRUN, "started 2 processes (WORLD_SIZE), but trainer.num_nodes=1 times"),
        (["--config=strategies/ddp.yaml", "--trainer.devices=3"], TORCHRUN, "trainer.devices=3"),
        (
            ["--config=strategies/ddp.yaml", "--trainer.devices=2"],
            SLURM,
            "started 3 processes (SLURM_NTASKS)",
        ),
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
def test_settings_and_launchers_that_do_not_fit(
    options, variables, message, tiny_run, error_of, monkeypatch, tmp_path
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    root = tmp_path / "not_begun"
    error = error_of("fit", "--config", tiny_run, f"--output.root={root}", *options)
    assert message in error
    assert "\n" not in error
    assert not list(root.glob("tiny/*")), "no run folder for a run that did not begin"


def test_apples_gpu_is_an_error(tiny_run, error_of, monkeypatch, tmp_path):
    monkeypatch.setattr(MPSAccelerator, "is_available", lambda: True)
    monkeypatch.setattr(MPSAccelerator, "parse_devices", lambda devices: [0])
    monkeypatch.setattr(
        MPSAccelerator, "get_parallel_devices", lambda devices: [torch.device("mps", 0)]
    )
    options = ["--trainer.accelerator=mps", f"--output.root={tmp_path / 'not_begun'}"]
    assert "no float64: set trainer.accelerator cpu" in error_of(
        "fit", "--config", tiny_run, *options
    )
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


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"a": 2, "b": {"c": [1, 2]}}, "a is 2, not 1"),
        ({"a": 1, "b": {"c": [1]}}, "b.c is [1], not [1, 2]"),
        ({"a": 1, "b": None}, "b is None, not {'c': [1, 2]}"),
        ({"a": 1}, "b is None, not {'c': [1, 2]}"),
        ({"a": 1, "b": {"c": [1, 2], "d": 0}}, "b.d is 0, not None"),
    ],
)
def test_the_first_difference_of_two_configurations(other, message):
    assert first_difference({"a": 1, "b": {"c": [1, 2]}}, other) == message
