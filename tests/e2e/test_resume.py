"""A run that stops anywhere and goes on is the run that never stopped."""

import os
import random
import signal
import subprocess
import sys
import zlib

import pytest
import torch

import callbacks.lora_one_init
import callbacks.run_report
from app.evaluation.scoring import Scoring
from app.tracking.metrics_table import has_value, rewind_table
from app.training.checkpoint_io import read_checkpoint
from app.training.module import LoraModule
from app.utils.signals import STOPPING
from tests.support.paths import ROOT
from tests.support.run_folders import same_weights, summary, table, values
from tests.support.run_hooks import Killed

LONG = ("--trainer.max_epochs=3", "--trainer.max_steps=-1", "--output.checkpoint_every_n_steps=3")
DROPOUT = ("--model.adapter.lora_dropout=0.3",)


@pytest.fixture
def in_parts(command, tiny_run, tmp_path):
    """Return `run(*options)`, which goes on with the run and returns the status; and the run's folder."""

    def run(*options):
        return command("fit", "--config", tiny_run, *options, "--ckpt_path=last")

    return run, tmp_path / "runs" / "tiny" / "version_0"


MOMENTS = ("zero_shot/loss", "after_init/loss", "final/loss")


def check_same(parts, whole, *names):
    """Check that two runs have the same training losses, further curves, weights and record."""
    for name in ("train/loss", *names):
        assert values(parts, name) == values(whole, name), name
    assert same_weights(parts, whole)
    assert summary(parts)["metrics"] == summary(whole)["metrics"]
    ours, theirs = (run / "row_scores" / "final.csv" for run in (parts, whole))
    assert ours.read_bytes() == theirs.read_bytes()
    for name in ("steps", "samples"):
        assert summary(parts)["train"][name] == summary(whole)["train"][name]


CASES = {
    "plain": LONG,
    "dropout": LONG + DROPOUT,
    "steps": ("--trainer.max_steps=13", *LONG[2:], *DROPOUT),
    # 5 batches an epoch: windows of 2, 2 and 1
    "accumulation": (*LONG, *DROPOUT, "--trainer.accumulate_grad_batches=2"),
    # the same, and from the third epoch on windows of 3 and 2
    "scheduled_accumulation": (
        *(*LONG, *DROPOUT, "--model.lr_scheduler_type=cosine"),
        "--output.checkpoint_every_n_steps=1",  # so that one is in the middle of an epoch
        "--trainer.callbacks+=GradientAccumulationScheduler",
        "--trainer.callbacks.scheduling={0: 2, 2: 3}",
    ),
    "validation": (*LONG, *DROPOUT, "--trainer.val_check_interval=2"),
    "validation_of_iterations": (
        *("--trainer.max_steps=14", "--output.checkpoint_every_n_steps=3", *DROPOUT),
        *("--trainer.val_check_interval=3", "--trainer.check_val_every_n_epoch=null"),
    ),
    "decay": (*LONG, "--model.lr_scheduler_type=cosine", "--model.warmup_steps=4"),
    "short_epochs": (*LONG, *DROPOUT, "--trainer.limit_train_batches=3", "--trainer.max_epochs=4"),
    "rare_logs": (*LONG, *DROPOUT, "--trainer.log_every_n_steps=3"),
    "workers": (*LONG, *DROPOUT, "--data.num_workers=1"),
    # 7 batches an epoch
    "packing": (
        *(*LONG, *DROPOUT, "--data.packing=true", "--data.max_length=200", "--data.batch_size=2"),
        "--data.length_grouping=false",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_run_killed_at_any_step_has_the_losses_of_one_that_was_not(
    case, fitted, in_parts, killed_at, passes
):
    whole, (run, parts) = fitted(*CASES[case]), in_parts
    passes.clear()
    steps = len(values(whole, "train/loss")) if case != "rare_logs" else 15
    for moment in sorted(random.Random(zlib.crc32(case.encode())).sample(range(4, steps), 2)):
        with killed_at(moment):
            run(*CASES[case])
    assert run(*CASES[case]) == 0
    assert passes == ["callbacks.initialization"]
    assert [path.name for path in parts.parent.iterdir()] == ["version_0"]
    check_same(parts, whole, *MOMENTS, *(["val/loss"] if "val/loss" in table(whole)[0] else []))
    assert [path.name for path in (parts / "checkpoints").iterdir()] == [
        f"resume-step={steps}.ckpt"
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("setting", "short", "long"), [("max_steps", 7, 12), ("max_epochs", 1, 2)])
def test_a_run_that_is_trained_further_is_the_longer_run(
    setting, short, long, fitted, in_parts, passes, monkeypatch
):
    """The shorter run ends in the middle of an epoch, or with one; nothing is initialized again."""
    options = (*DROPOUT, "--trainer.max_steps=-1")
    whole, (run, parts) = fitted(*options, f"--trainer.{setting}={long}"), in_parts
    passes.clear()
    assert run(*options, f"--trainer.{setting}={short}") == 0
    first, [checkpoint] = summary(parts), parts.glob("checkpoints/*.ckpt")
    assert torch.load(checkpoint, weights_only=True)["global_step"] == first["train"]["steps"]
    monkeypatch.setattr(callbacks.lora_one_init, "install", None)
    tested = parts / "row_scores" / "test.csv"
    tested.write_text("row,loss,tokens\n")
    assert run(*options, f"--trainer.{setting}={long}") == 0
    assert not tested.exists(), "scores of an earlier model"
    assert len(passes) == 1
    check_same(parts, whole)
    assert summary(parts)["init"] == first["init"]
    assert summary(parts)["train"]["steps"] > first["train"]["steps"]


def test_rows_that_the_dead_run_logged_are_made_again_once(tmp_path):
    path = tmp_path / "metrics.csv"
    header = "epoch,final/loss,step,train/loss,val/loss\n"
    rows = ("0,,0,1.5,", "0,,1,1.4,", "0,,1,,1.3", "0,,2,1.2,", "0,9.0,4,,", "0,,3,1.")
    for step, due, scored, kept in (
        *((2, True, False, 2), (2, False, False, 3)),
        *((4, False, True, 5), (4, False, False, 4)),
    ):
        path.write_text(header + "\n".join(rows))
        rewind_table(path, step, validation_due=due, scored=scored)
        assert path.read_text().split() == [header.strip(), *rows[:kept]]
    assert has_value(path, 1, "val/loss")
    assert not has_value(path, 0, "val/loss")


# Signals


def at_step(step):
    return lambda module, *_: module.global_step == step


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "status", "accumulate"),
    [("SIGTERM", 143, 1), ("SIGINT", 130, 2), ("SIGUSR1", 128 + signal.SIGUSR1, 1)],
)
def test_a_signal_saves_and_stops(name, status, accumulate, fitted, in_parts, signalled, capfd):
    options = (*DROPOUT, "--trainer.max_steps=8", f"--trainer.accumulate_grad_batches={accumulate}")
    whole, (run, parts) = fitted(*options), in_parts
    before = {number: signal.getsignal(number) for number in STOPPING}

    def once(module, batch, batch_idx):
        return module.global_step == 3 and batch_idx % accumulate == 0

    signalled("training_step", signal.Signals[name], once)
    assert run(*options) == status
    told = capfd.readouterr().err
    assert f"{name}: stopped after step 4; the last checkpoint is" in told
    assert "resume-step=4.ckpt; the same command with `--ckpt_path last` goes on from it" in told
    assert {number: signal.getsignal(number) for number in STOPPING} == before
    assert run(*options) == 0
    check_same(parts, whole)


@pytest.mark.slow
def test_a_signal_during_validation_stops_there(fitted, in_parts, signalled):
    options = (*DROPOUT, "--trainer.max_steps=8", "--trainer.val_check_interval=2")
    whole, (run, parts) = fitted(*options), in_parts
    seen = []

    def at_four(module, batch, batch_idx):
        seen.append(batch_idx)
        return module.global_step == 4 and len(seen) == 4

    signalled("validation_step", signal.SIGTERM, at_four)
    assert run(*options) == 143
    assert seen == [0, 1, 2, 0]
    assert run(*options) == 0
    check_same(parts, whole, "val/loss", "final/loss")


def test_a_signal_before_training_ends_the_run_at_once(
    command, tiny_run, tmp_path, monkeypatch, capfd
):
    def stop(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the pass went on")

    monkeypatch.setattr("callbacks.initialization.one_step_gradients", stop)
    assert command("fit", "--config", tiny_run) == 143
    assert "SIGTERM: stopped before the first step" in capfd.readouterr().err


ENDS = {
    "last step": (LoraModule, "training_step", lambda module, *_: module.global_step == 8),
    "last validation": (LoraModule, "validation_step", lambda module, *_: module.global_step == 9),
    "final scores": (Scoring, "update", lambda scoring, *_: scoring.module.global_step == 9),
    "report": (callbacks.run_report, "save_adapter", lambda *_: True),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "ending"),
    [
        ("last step", "SIGTERM"),
        ("last validation", "SIGTERM"),
        ("last validation", "kill"),
        ("final scores", "SIGTERM"),
        ("final scores", "kill"),
        ("report", "kill"),
    ],
)
def test_what_is_trained_is_kept_when_the_end_is_interrupted(
    moment, ending, fitted, in_parts, monkeypatch
):
    """Scores may take hours: a run that stops in them has them alone left to make."""
    options = (*DROPOUT, "--trainer.max_steps=9")
    if moment == "last validation":
        options += ("--trainer.val_check_interval=2",)
    whole, (run, parts) = fitted(*options), in_parts
    kind, method, when = ENDS[moment]
    original = getattr(kind, method)

    def interrupted(*args, **options):
        if when(*args):
            if ending == "kill":
                raise Killed
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(kind, method, interrupted)
        if ending == "kill":
            with pytest.raises(Killed):
                run(*options)
        else:
            assert run(*options) == 143
    steps = []
    monkeypatch.setattr(LoraModule, "training_step", lambda *_: steps.append(1))
    assert run(*options) == 0
    assert steps == []
    validated = ("val/loss",) if moment == "last validation" else ()
    check_same(parts, whole, "final/loss", *validated)


@pytest.mark.slow
def test_a_second_ctrl_c_leaves_at_once(command, tiny_run, tmp_path, signalled, monkeypatch):
    class Left(BaseException):
        pass

    def leave(status):
        raise Left(status)

    monkeypatch.setattr("app.utils.signals.os._exit", leave)
    signalled("training_step", signal.SIGINT, at_step(2))
    signalled("on_before_optimizer_step", signal.SIGINT, at_step(2))
    options = ("--trainer.max_steps=6", "--output.checkpoint_every_n_steps=1")
    with pytest.raises(Left, match="130"):
        command("fit", "--config", tiny_run, *options)
    [path] = (tmp_path / "runs" / "tiny" / "version_0" / "checkpoints").iterdir()
    assert read_checkpoint(path)["global_step"] == 2


@pytest.mark.slow
@pytest.mark.parametrize(("array", "works"), [(True, True), (False, False)])
def test_slurm_is_asked_to_start_the_run_again(
    array, works, command, tiny_run, tmp_path, signalled, monkeypatch
):
    told = tmp_path / "scontrol.txt"
    program = tmp_path / "bin" / "scontrol"
    program.parent.mkdir()
    program.write_text(
        f"#!/bin/sh\necho $@ > {told}\necho no such job >&2\nexit {0 if works else 1}\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    if array:
        monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "70")
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    signalled("training_step", signal.SIGUSR1, at_step(1))
    if works:
        assert command("fit", "--config", tiny_run) == 0
    else:
        with pytest.warns(UserWarning, match=r"requeue job .* .no such job"):
            assert command("fit", "--config", tiny_run) == 128 + signal.SIGUSR1
    assert told.read_text() == f"requeue {'70_3' if array else '77'}\n"
    assert (
        tmp_path / "runs" / "tiny" / "version_0" / "checkpoints" / "resume-step=2.ckpt"
    ).is_file()


def test_a_run_without_checkpoints_says_so(command, tiny_run, signalled, capfd):
    signalled("training_step", signal.SIGTERM, at_step(1))
    assert command("fit", "--config", tiny_run, "--trainer.enable_checkpointing=false") == 143
    assert "SIGTERM: stopped after step 2; there is no checkpoint" in capfd.readouterr().err


@pytest.mark.slow
def test_the_wandb_run_goes_on(command, tiny_run, tmp_path, signalled):
    options = ("fit", "--config", tiny_run, "--output.wandb=offline", "--ckpt_path=last")
    signalled("training_step", signal.SIGTERM, at_step(0))
    assert command(*options) == 143
    assert command(*options) == 0  # goes on behind step 0
    folder = tmp_path / "runs" / "tiny" / "version_0"
    # offline-run-TIME-ID, or offline-run-TIME-ID-1 where both began within a second
    ids = {path.name.split("-")[3] for path in folder.glob("wandb/offline-run-*")}
    assert len(ids) == 1
    [path] = (folder / "checkpoints").iterdir()
    assert read_checkpoint(path)["wandb_id"] in ids


@pytest.mark.slow
def test_rounds_of_real_kills():
    """Real processes: the benchmark that anyone can run, shortened."""
    command = [sys.executable, "-m", "benchmarks.kill_rounds", "--rounds=1"]
    command += ["--steps=80", "--every=10"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the same, bit for bit; adapter file: the same bytes" in done.stdout
