"""A run that several processes were training goes on exactly, on as many or others, and another strategy."""

import csv
import random
import shutil

import pytest

from tests.multiprocess.test_parity import arguments as parity_arguments

STEPS = 14
EVERY = 3  # optimizer steps between two checkpoints


def arguments(tiny_run, model, root, batch_size, *more):
    own = (f"--trainer.max_steps={STEPS}", f"--output.checkpoint_every_n_steps={EVERY}")
    return parity_arguments(tiny_run, model, root, batch_size, *own, *more)


def on(strategy):
    """Return batch size and options of a run on two processes, or of one process for None."""
    if strategy is None:
        return 8, ()
    return 4, (f"--config=strategies/{strategy}.yaml", "--trainer.devices=2")


def losses(root):
    """Return the training loss of each step of the only run below a folder."""
    (folder,) = (root / "tiny").iterdir()
    with (folder / "metrics.csv").open(newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row.get("train/loss")]
    assert [int(row["step"]) for row in rows] == list(range(STEPS)), "each step once"
    return [float(row["train/loss"]) for row in rows]


@pytest.mark.parametrize("before", ["ddp", "fsdp"])
def test_a_killed_run_goes_on(
    before, tiny_run, models_without_dropout, command, torchrun, tmp_path
):
    """On the same processes the losses are the same numbers; elsewhere the same to rounding."""
    model, whole, killed = models_without_dropout / "llama", tmp_path / "whole", tmp_path / "killed"
    size, options = on(before)
    argv = arguments(tiny_run, model, whole, size, *options)
    status, told = torchrun([{"argv": argv, "keep": str(tmp_path / "kept")}])
    assert status == 0, told[-6000:]
    argv = arguments(tiny_run, model, killed, size, *options)
    done = random.SystemRandom().randrange(EVERY, STEPS)  # steps that the killed run completes
    print(f"killed in step {done}")
    die = [1, "training", done + 1]
    status, _ = torchrun([{"argv": argv, "keep": str(tmp_path / "kept"), "die": die}])
    assert status != 0
    checkpoints = (killed / "tiny" / "version_0" / "checkpoints").iterdir()
    last = done // EVERY * EVERY
    # A step's checkpoint is written after it, so the one of the last step may be missing.
    assert [file.name for file in checkpoints] == [f"step={last}.ckpt"]
    jobs = []
    afterwards = {"ddp": ["ddp", "fsdp", None], "fsdp": ["fsdp", None]}[before]
    for after in afterwards:
        root = tmp_path / f"to_{after}"
        shutil.copytree(killed, root)
        size, options = on(after)
        argv = arguments(tiny_run, model, root, size, *options, "--ckpt_path=last")
        if after is None:
            assert command(*argv) == 0
        else:
            jobs.append({"argv": argv, "keep": str(tmp_path / "kept")})
    status, told = torchrun(jobs)
    assert status == 0, told[-6000:]
    for after in afterwards:
        found = losses(tmp_path / f"to_{after}")
        if after == before:
            assert found == losses(whole)
        else:
            assert found == pytest.approx(losses(whole), rel=1e-4)
