"""Numbers of run folders and checkpoints, and the folder of a run that never began."""

from app.tracking.run_folder import (
    RunFolder,
    checkpoint_files,
    checkpoint_name,
    new_run_folder,
    run_folders,
)


def test_folders_are_numbered_from_the_first_that_is_free(tmp_path):
    for number in (0, 1, 10):
        (tmp_path / f"version_{number}").mkdir()
    (tmp_path / "version_x").mkdir()
    assert new_run_folder(tmp_path).path == tmp_path / "version_2"
    assert [path.name for path in run_folders(tmp_path)] == [f"version_{n}" for n in (0, 1, 2, 10)]


def test_checkpoints_are_ordered_by_step(tmp_path):
    for name in ("step=100.ckpt", "step=20.ckpt", "step=3.ckpt.part", "last.ckpt"):
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
