"""A run that several processes were training goes on exactly, on as many or others, and another strategy."""

import random
import shutil
import signal

import pytest

from tests.support.parity import losses, parity_job, two_processes

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]
STEPS = 9
EVERY = 3  # optimizer steps between two checkpoints


@pytest.mark.parametrize(
    ("before", "afterwards"), [("ddp", ("ddp", "fsdp", "alone")), ("fsdp", ("fsdp", "alone"))]
)
def test_a_killed_run_goes_on(
    before, afterwards, parity_config, models_without_dropout, forked, finished, tmp_path
):
    """On the same processes the losses are the same numbers; elsewhere the same to rounding."""

    def job(where, strategy, *more, **ends):
        batch_size, options = (8, ()) if strategy == "alone" else (4, two_processes(strategy))
        own = (f"--trainer.max_steps={STEPS}", f"--output.checkpoint_every_n_steps={EVERY}")
        model, root = models_without_dropout / "llama", tmp_path / where
        return parity_job(parity_config, model, root, batch_size, *own, *options, *more, **ends)

    done = random.SystemRandom().randrange(EVERY, STEPS)  # steps that the killed run completes
    print(f"killed in step {done}")
    # One start of the processes for both runs: the second one is killed.
    ends = forked([job("whole", before), job("killed", before, die=[1, "training", done + 1])])
    assert [status for status, _ in ends] == [1, -signal.SIGKILL], ends[0][1][-6000:]
    last = done // EVERY * EVERY
    # A step's checkpoint is written after it, so the one of the last step may be missing.
    checkpoints = (tmp_path / "killed" / "tiny" / "version_0" / "checkpoints").iterdir()
    assert [file.name for file in checkpoints] == [f"resume-step={last}.ckpt"]
    for after in afterwards:
        shutil.copytree(tmp_path / "killed", tmp_path / f"to_{after}")
    going_on = {after: job(f"to_{after}", after, "--ckpt_path=last") for after in afterwards}
    finished([going_on.pop("alone")], processes=1)
    finished(list(going_on.values()))
    wanted = losses(tmp_path / "whole")
    assert len(wanted) == STEPS
    for after in afterwards:
        resumed = losses(tmp_path / f"to_{after}")
        assert resumed == (wanted if after == before else pytest.approx(wanted, rel=1e-4)), after
