"""Numbers of run folders and checkpoints, the folder of a run that never began, and its lock."""

import subprocess
import sys

import pytest

from app.tracking.run_folder import (
    RunFolder,
    checkpoint_files,
    checkpoint_name,
    new_run_folder,
    run_folders,
)
from app.utils.errors import InputError
from tests.support.paths import ROOT


def test_folders_are_numbered_from_the_first_that_is_free(tmp_path):
    for number in (0, 1, 10):
        (tmp_path / f"version_{number}").mkdir()
    (tmp_path / "version_x").mkdir()
    assert new_run_folder(tmp_path).path == tmp_path / "version_2"
    assert [path.name for path in run_folders(tmp_path)] == [f"version_{n}" for n in (0, 1, 2, 10)]


def test_checkpoints_are_ordered_by_step(tmp_path):
    for name in (
        "resume-step=100.ckpt",
        "resume-step=20.ckpt",
        "resume-step=3.ckpt.part",
        "last.ckpt",
    ):
        (tmp_path / name).touch()
    assert [path.name for path in checkpoint_files(tmp_path)] == [
        checkpoint_name(s) for s in (20, 100)
    ]


def test_only_an_unused_folder_is_removed(tmp_path):
    used, unused = new_run_folder(tmp_path), new_run_folder(tmp_path)
    for folder in (used, unused):
        folder.config.touch()
    used.metrics.touch()
    for folder in (used, unused, RunFolder(tmp_path / "version_7")):
        folder.remove_if_unused()
    assert [path.name for path in run_folders(tmp_path)] == ["version_0"]


HOLD = """
import sys, time
from pathlib import Path
from app.tracking.run_folder import RunFolder
with RunFolder(Path(sys.argv[1])).held():
    print("held", flush=True)
    time.sleep(60)
"""


def test_one_process_holds_a_folder_until_it_ends(tmp_path, monkeypatch):
    monkeypatch.setattr("app.tracking.run_folder.WAIT_FOR_LOCK", 0.0)
    folder = RunFolder(tmp_path)
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(InputError, match="is being trained by another process"), folder.held():
            pass
        other.kill()  # which leaves the file behind
    assert folder.lock.is_file()
    with folder.held():
        pass


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch):
    def no_locks(lock):
        raise NotImplementedError("no flock")

    monkeypatch.setattr("app.tracking.run_folder.FileLock.acquire", no_locks)
    told = "cannot be locked .no flock.: start no other run in it"
    with pytest.warns(UserWarning, match=told), RunFolder(tmp_path).held():
        pass
