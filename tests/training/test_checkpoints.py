"""Checkpoint files: what is in them, that they are whole, which ones are refused, who is told what."""

import errno
import io
import os
import pathlib
import pickle
import shutil

import pytest
import torch
import yaml

from app.tracking.run_folder import RunFolder
from app.training.checkpoint_io import CheckpointFiles, read_checkpoint
from app.training.checkpoint_state import gather_states, random_state, seed_anew, set_random_state
from app.training.resume import find_resume_point
from app.utils.errors import InputError
from tests.support.run_folders import summary

CONTENT = {"state_dict": {}, "loops": {}, "optimizer_states": [], "base": {}, "method": "m"}
OFTEN = ("--trainer.max_steps=5", "--output.checkpoint_every_n_steps=2")


def newest(folder):
    [path] = (folder / "checkpoints").glob("resume-*")
    return path


def plain(value):
    """Return whether a value is made of plain data and tensors."""
    if isinstance(value, dict):
        return all(plain(key) and plain(inner) for key, inner in value.items())
    if isinstance(value, list | tuple):
        return all(map(plain, value))
    return value is None or isinstance(value, str | int | float | bool | torch.Tensor)


def test_contents(fitted):
    folder = fitted(*OFTEN)
    path = newest(folder)
    assert path.name == "resume-step=5.ckpt"
    content = torch.load(path, weights_only=True)
    assert plain(content)
    told = summary(folder)
    assert content["method"] == told["method"] == "lora_one"
    assert content["base"] == {name: told["model"][name] for name in ("name", "fingerprint")}
    assert content["global_step"] == 5
    assert len(content["state_dict"]) == 28
    assert all(".lora_" in name for name in content["state_dict"])
    assert set(content["random"][0]) >= {"python", "numpy", "torch"}
    assert content["GlueDataModule"] == {"epoch": 1, "done": 0, "group_size": 8}
    assert content["callbacks"]["LoraOneInit"]["report"] == told["init"]
    assert content["callbacks"]["ScoreAt[final]"]["scores"] == told["metrics"]["final"]
    assert path.stat().st_size < 150_000


def test_random_states_of_several_processes():
    state = random_state()
    assert plain(state)
    draws = [torch.rand(3), float(torch.randn(()))]
    set_random_state(state)
    assert torch.equal(torch.rand(3), draws[0])
    assert float(torch.randn(())) == draws[1]
    assert gather_states(state) == [state]
    seed_anew(0, 3, 100)
    first = torch.rand(2)
    seed_anew(0, 3, 100)
    assert torch.equal(torch.rand(2), first)
    for other in ((1, 3, 100), (0, 2, 100), (0, 3, 101)):
        seed_anew(*other)
        assert not torch.equal(torch.rand(2), first)


# What a power failure or kill -9 leaves at each point of writing, and what a full disk does there.
POINTS = ("open", "write", "fsync", "replace", "folder")


def fail_at(point, error, monkeypatch):
    """Let one of the calls that write a checkpoint raise."""

    def raising(*args, **options):
        raise error

    if point == "replace":
        monkeypatch.setattr("app.utils.files.os.replace", raising)
    elif point == "folder":
        monkeypatch.setattr("app.utils.files._sync_folder", raising)
    elif point == "fsync":
        monkeypatch.setattr("app.utils.files.os.fsync", raising)
    else:
        original = pathlib.Path.open

        def opened(path, mode="r", *args, **options):
            if mode != "wb":
                return original(path, mode, *args, **options)
            if point == "open":
                raise error
            return Broken(path, mode)

        class Broken(io.FileIO):
            def write(self, content):
                super().write(b"only the beginning")
                raise error

        monkeypatch.setattr(pathlib.Path, "open", opened)


@pytest.mark.parametrize("point", POINTS)
def test_a_kill_at_any_point_of_writing_leaves_the_last_checkpoint(point, tmp_path, monkeypatch):
    class Kill(BaseException):
        pass

    files = CheckpointFiles()
    files.save_checkpoint({**CONTENT, "global_step": 1}, tmp_path / "resume-step=1.ckpt")
    with monkeypatch.context() as patched:
        fail_at(point, Kill(), patched)
        with pytest.raises(Kill):
            files.save_checkpoint({**CONTENT, "global_step": 2}, tmp_path / "resume-step=2.ckpt")
    for path in tmp_path.glob("*.ckpt"):
        assert read_checkpoint(path)["global_step"] == int(path.stem.partition("=")[2])
    assert (tmp_path / "resume-step=1.ckpt").is_file()
    assert (tmp_path / "resume-step=2.ckpt").is_file() == (point == "folder")
    files.save_checkpoint({**CONTENT, "global_step": 3}, tmp_path / "resume-step=3.ckpt")
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.slow
@pytest.mark.parametrize("point", ["open", "write", "fsync", "replace"])
def test_a_full_disk_is_told_and_training_goes_on(point, fitted, fit, monkeypatch):
    whole = fitted(*OFTEN)
    original = CheckpointFiles.save_checkpoint

    def save(files, checkpoint, path, storage_options=None):
        with monkeypatch.context() as patched:
            if checkpoint["global_step"] > 2:
                fail_at(point, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), patched)
            original(files, checkpoint, path)

    monkeypatch.setattr(CheckpointFiles, "save_checkpoint", save)
    with pytest.warns(UserWarning, match="could not be written") as told:
        folder = fit(*OFTEN)
    told = [str(entry.message) for entry in told if "could not be written" in str(entry.message)]
    # the last one is tried again when the final scores are known
    for step, message in zip((4, 5, 5), told, strict=True):
        assert f"the checkpoint of step {step} could not be written to" in message
        assert "No space left on device" in message
        assert "training goes on, and the last complete one is" in message
        assert "resume-step=2.ckpt" in message
    assert newest(folder).name == "resume-step=2.ckpt"
    assert read_checkpoint(newest(folder))["global_step"] == 2
    assert summary(folder)["metrics"]["final"] == summary(whole)["metrics"]["final"]


def test_a_checkpoint_callback_of_the_users_keeps_its_last_file_when_the_disk_is_full(
    tmp_path, monkeypatch
):
    files = CheckpointFiles()
    first, second = tmp_path / "first.ckpt", tmp_path / "second.ckpt"
    files.save_checkpoint(CONTENT, first)
    with monkeypatch.context() as patched:
        fail_at("fsync", OSError(errno.ENOSPC, "full"), patched)
        with pytest.warns(UserWarning, match="could not be written"):
            files.save_checkpoint(CONTENT, second)
    files.remove_checkpoint(first)
    assert first.is_file()
    files.save_checkpoint(CONTENT, second)
    files.remove_checkpoint(first)
    assert not first.exists()


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "checkpoints").write_text("a file is in the way")
    with pytest.warns(UserWarning, match="training goes on, and there is none yet"):
        CheckpointFiles().save_checkpoint(CONTENT, tmp_path / "checkpoints" / "resume-step=1.ckpt")


@pytest.fixture
def finished(fitted, tmp_path):
    """Return a run's folder below the root of `tiny_run`."""
    return shutil.copytree(fitted(*OFTEN), tmp_path / "runs" / "tiny" / "version_0")


def metrics(folder):
    return (folder / "metrics.csv").read_bytes()


def test_a_damaged_file_is_refused(finished, error_of, tiny_run):
    path = newest(finished)
    whole, before = path.read_bytes(), metrics(finished)
    for damage in (whole[: len(whole) // 2], whole[:-1], b"PK\x03\x04 and no more"):
        path.write_bytes(damage)
        with pytest.raises(InputError, match="which cannot be read as a checkpoint"):
            read_checkpoint(path)
    path.write_bytes(b"")
    told = error_of("fit", "--config", tiny_run, "--ckpt_path", path)
    assert "which is empty: it is damaged" in told
    assert metrics(finished) == before
    assert [folder.name for folder in finished.parent.iterdir()] == ["version_0"]


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "x.ckpt"
    path.write_bytes(pickle.dumps({"state_dict": print}))  # more than plain data
    with pytest.raises(InputError, match="which cannot be read as a checkpoint"):
        read_checkpoint(path)
    weights_only = {key: value for key, value in CONTENT.items() if key != "optimizer_states"}
    for content, told in (
        ([1, 2], "lacks state_dict, loops, optimizer_states, base, method"),
        (weights_only, r"lacks optimizer_states: .*not save_weights_only"),
    ):
        torch.save(content, path)
        with pytest.raises(InputError, match=told):
            read_checkpoint(path)
    with pytest.raises(InputError, match="is a folder: expected `last` or a checkpoint file"):
        find_resume_point(str(tmp_path), tmp_path, "m")


def test_other_settings_or_rows_are_refused_before_weights_are_loaded(
    finished, error_of, tiny_run, sst2_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr("app.training.model_building.load_model", None)
    before, checkpoint = metrics(finished), newest(finished)
    resumed = ("fit", "--config", tiny_run, *OFTEN, "--ckpt_path", checkpoint)
    told = error_of(*resumed, "--model.adapter.lora_alpha=64")
    assert "model.adapter.lora_alpha 16.0 (now 64.0)" in told
    # Known from the run's folder, too, if an earlier version has not written it into the checkpoint.
    content = torch.load(checkpoint, weights_only=True)
    assert yaml.safe_load(content.pop("settings"))["model"]["adapter"]["r"] == 4
    torch.save(content, checkpoint)
    told = error_of(*resumed, "--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=0.1")
    assert "model.optimizer PreconditionedAdamW (now torch.optim.SGD)" in told
    told = error_of(*resumed, "--data.batch_size=4")
    assert "an optimizer step of the checkpoint's run has 8 rows, this one 4" in told
    shutil.copytree(sst2_folder, tmp_path / "data")
    file = tmp_path / "data" / "SST-2" / "train.tsv"
    file.write_text(file.read_text().replace("great", "poor"))
    told = error_of(*resumed, f"--data.path={tmp_path / 'data'}")
    assert "the training rows are not those of the run" in told
    assert metrics(finished) == before


def test_what_a_checkpoint_overrules_is_told_each_time(finished, fit):
    slower = "--model.optimizer.lr=1e-3"
    for steps in (6, 7):
        with pytest.warns(UserWarning, match=r"model.optimizer.lr 0.01 \(now 0.001\)"):
            assert fit(f"--trainer.max_steps={steps}", slower, "--ckpt_path=last") == finished
    [state] = torch.load(newest(finished), weights_only=True)["optimizer_states"]
    assert [group["lr"] for group in state["param_groups"]] == [0.01]


@pytest.mark.slow
def test_another_method_base_or_adapter_is_refused_before_the_gradient_pass(
    finished, command, error_of, tiny_run, run_models, tmp_path, passes
):
    path, before = newest(finished), metrics(finished)
    passes.clear()

    resumed = ("fit", "--config", tiny_run, "--ckpt_path", path)
    told = error_of(*resumed, "--config", "methods/lora.yaml")
    assert "belongs to the method 'lora_one', but model.method is 'lora'" in told
    told = error_of(*resumed, f"--model.name={run_models / 'gpt2'}")
    assert f"belongs to the base model {run_models / 'llama'}" in told
    assert f"but model.name is {run_models / 'gpt2'}" in told
    assert told.count("sha256:") == 2
    told = error_of(*resumed, "--model.adapter.r=8", "--model.adapter.lora_dropout=0.1")
    assert "model.adapter.lora_dropout 0.0 (now 0.1), model.adapter.r 4 (now 8)" in told
    # One of an earlier version does not know its settings.
    content = torch.load(path, weights_only=True)
    del content["settings"]
    torch.save(content, tmp_path / "earlier.ckpt")
    told = error_of(*resumed[:-1], tmp_path / "earlier.ckpt", "--model.adapter.r=8")
    assert "has one of shape [4, 16] for" in told
    assert "trains one of shape [8, 16]" in told
    assert metrics(finished) == before
    assert passes == []
    # The same weights elsewhere are the same base.
    moved = tmp_path / "moved"
    shutil.copytree(run_models / "llama", moved)
    options = (f"--model.name={moved}", "--trainer.max_steps=6")
    assert command(*resumed, *options) == 0


def test_last_goes_back_behind_a_damaged_file(finished, command, tiny_run):
    path = newest(finished)
    (path.parent / "resume-step=9.ckpt").write_bytes(path.read_bytes()[:-100])
    with pytest.warns(
        UserWarning, match="resume-step=9.ckpt.*damaged.*Going back to the checkpoint before"
    ):
        found = find_resume_point("last", finished.parent, "lora_one")
    assert found.checkpoint == path
    assert found.folder.path == finished


@pytest.mark.slow
def test_last_without_a_checkpoint_starts_anew(fit, caplog):
    with caplog.at_level("INFO"):
        folder = fit("--ckpt_path=last", "--trainer.enable_checkpointing=false")
    assert "there is no checkpoint below" in caplog.text
    assert "starting anew" in caplog.text
    assert not (folder / "checkpoints").exists()
    caplog.clear()
    assert fit("--ckpt_path=last").name == "version_1"
    assert f"there is no checkpoint in {folder}" in caplog.text
    assert fit("--ckpt_path=last").name == "version_1"


def test_a_finished_run_stays_as_it_is(finished, fit, caplog):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    with caplog.at_level("INFO"):
        assert fit(*OFTEN, "--ckpt_path=last") == finished
    [told] = [entry.message for entry in caplog.records if "finished at step" in entry.message]
    assert "was finished at step 5 already, and stays as it is" in told
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


def test_a_run_is_trained_by_one_process_at_a_time(finished, error_of, fit, tiny_run, monkeypatch):
    """Neither two that go on, nor one that goes on and the one that began it."""
    monkeypatch.setattr("app.tracking.run_folder.WAIT_FOR_LOCK", 0.0)
    told = f"{finished} is being trained by another process: wait until that has ended"
    before = metrics(finished)
    with RunFolder(finished).held():
        options = ("--trainer.max_steps=8", "--ckpt_path=last")
        assert told in error_of("fit", "--config", tiny_run, *options)
    assert metrics(finished) == before
    tried = []

    def hold(module):
        folder = RunFolder(finished.with_name("version_1"))
        with pytest.raises(InputError, match="is being trained"), folder.held():
            pass
        tried.append(folder)

    monkeypatch.setattr("app.training.module.LoraModule.on_train_start", hold)
    fit()
    assert len(tried) == 1


def test_a_checkpoint_elsewhere_starts_a_folder_of_its_own(finished, fit, tmp_path):
    copied = tmp_path / "copied.ckpt"
    shutil.copy(newest(finished), copied)
    before = metrics(finished)
    folder = fit("--trainer.max_steps=7", f"--ckpt_path={copied}")
    assert folder.name == "version_1"
    assert metrics(finished) == before
    assert newest(folder).name == "resume-step=7.ckpt"


def test_checkpoints_of_the_users_own_are_never_deleted(fit, tmp_path):
    """Whatever their names; one below a folder that a metric's slash has made belongs to the run, too."""
    own = tmp_path / "own.yaml"
    own.write_text(
        "trainer:\n  val_check_interval: 2\n  callbacks:\n"
        + "".join(
            "  - class_path: lightning.pytorch.callbacks.ModelCheckpoint\n    init_args:\n"
            f"      {{filename: '{name}', save_top_k: -1, every_n_train_steps: 2, monitor: {metric}}}\n"
            for name, metric in (("{step}", "null"), ("{step}-{val/loss:.1f}", "val/loss"))
        )
    )
    options = ("--config", own, "--output.checkpoint_every_n_steps=1")
    folder = fit(*options, "--trainer.max_steps=5")
    saved = folder / "checkpoints"
    names = {path.name for path in saved.iterdir() if path.is_file()}
    assert names == {"step=2.ckpt", "step=4.ckpt", "resume-step=5.ckpt"}
    [slashed] = saved.glob("step=2-val/loss=*.ckpt")
    assert find_resume_point("last", folder.parent, "lora_one").checkpoint == newest(folder)
    assert fit(*options, "--trainer.max_steps=3", f"--ckpt_path={slashed}") == folder
    assert newest(folder).name == "resume-step=3.ckpt"
    assert (saved / "step=4.ckpt").is_file()


@pytest.mark.slow
def test_the_users_own_checkpoints_are_kept_too(fit, tmp_path):
    """One that is saved when a validation ends resumes as well; one between two steps is told."""
    own = tmp_path / "own.yaml"
    own.write_text(
        "trainer:\n  callbacks:\n  - class_path: lightning.pytorch.callbacks.ModelCheckpoint\n    init_args:\n"
        f"      {{dirpath: {tmp_path / 'best'}, monitor: val/loss, filename: best}}\n"
    )
    options = ("--trainer.max_epochs=2", "--trainer.max_steps=-1")
    folder = fit("--config", own, *options)
    assert newest(folder).name == "resume-step=10.ckpt"
    [best] = (tmp_path / "best").iterdir()
    assert read_checkpoint(best)["global_step"] in (5, 10)
    told = summary(folder)
    again = fit("--config", own, *options, f"--ckpt_path={best}")
    assert again.name == "version_1"
    assert summary(again)["metrics"] == told["metrics"]
    between = ("--trainer.val_check_interval=3", "--trainer.accumulate_grad_batches=2")
    with pytest.warns(UserWarning, match="between two optimizer steps"):
        fit("--config", own, *between)
