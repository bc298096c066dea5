"""Files are written whole or not at all."""

import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from app.utils.errors import InputError
from app.utils.files import (
    atomic_folder,
    atomic_write,
    cache_root,
    file_sha256,
    locked,
    read_json,
    write_json,
)
from tests.support.paths import ROOT


def interrupted(path):
    with atomic_write(path) as stream:
        stream.write(b"half")
        raise KeyboardInterrupt


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "data.bin"
    for before in (None, b"old"):
        if before is not None:
            path.write_bytes(before)
        with pytest.raises(KeyboardInterrupt):
            interrupted(path)
        assert (path.read_bytes() if path.exists() else None) == before
        assert list(tmp_path.glob("*.part")) == []
    with atomic_write(path) as stream:
        stream.write(b"whole")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"whole"


def test_json_comes_back(tmp_path):
    path = tmp_path / "data.json"
    assert read_json(path) is None
    write_json(path, {"a": [1, None]})
    assert read_json(path) == json.loads(path.read_text()) == {"a": [1, None]}
    path.write_text("[1]")
    assert read_json(path) is None
    path.write_text("{")
    assert read_json(path) is None


def test_sha256(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    wanted = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert file_sha256(tmp_path / "abc") == wanted


def test_cache_root(monkeypatch):
    monkeypatch.setenv("LORA_ONE_CACHE", "~/somewhere")
    assert cache_root() == Path.home() / "somewhere"
    monkeypatch.delenv("LORA_ONE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_root() == Path("/x/lora-one")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_root() == Path.home() / ".cache" / "lora-one"


def test_a_lock_that_cannot_be_made_names_the_setting(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="LORA_ONE_CACHE"), locked(tmp_path / "file" / "x"):
        pass


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(OSError, match="full"), atomic_folder(tmp_path / "new") as part:
        raise OSError("full")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "new.part").mkdir()
    (tmp_path / "new.part" / "mine").write_text("")
    with atomic_folder(tmp_path / "new") as part:
        (part / "file").write_text("whole")
        assert not (tmp_path / "new").exists()
    names = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")}
    assert names == {"new", "new/file", "new.part", "new.part/mine"}


KILLED = """
import os, signal, sys
from pathlib import Path
from app.utils.files import atomic_folder
with atomic_folder(Path(sys.argv[1])) as part:
    (part / "half").touch()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_leaves_goes_and_what_a_living_one_writes_stays(tmp_path):
    target = tmp_path / "merged"
    killed = subprocess.run([sys.executable, "-c", KILLED, target], cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL
    [half] = tmp_path.glob("merged.*.part")

    def write_twice():
        with atomic_folder(target) as living:
            assert not half.exists()
            with atomic_folder(target) as other:
                assert living.exists()
                (other / "second").touch()

    with pytest.raises(OSError, match="not empty"):
        write_twice()
    names = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    assert names == ["merged", "merged/second"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_files_of_a_folder_obey_the_umask(umask, mode, tmp_path):
    before = os.umask(umask)
    try:
        with atomic_folder(tmp_path / "model") as part:
            (part / "inner").mkdir()
            save_file({"weight": torch.zeros(2)}, part / "inner" / "model.safetensors")
            (part / "config.json").write_text("{}")
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "model").rglob("*") if path.is_file()]
    assert [stat.S_IMODE(path.stat().st_mode) for path in files] == [mode, mode]


def test_new_files_of_a_folder_replace_those_of_their_names(tmp_path):
    folder = tmp_path / "folder"

    def write(text):
        with atomic_folder(folder, update=True) as part:
            (part / "inner").mkdir()
            for name in ("file", "inner/file"):
                (part / name).write_text(text)
            if text == "bad":
                raise OSError("full")

    write("old")
    (folder / "mine").write_text("mine")
    with pytest.raises(OSError, match="full"):
        write("bad")
    write("new")
    files = {
        str(p.relative_to(tmp_path)): p.read_text() for p in tmp_path.rglob("*") if p.is_file()
    }
    assert files == {"folder/file": "new", "folder/inner/file": "new", "folder/mine": "mine"}
    assert list(tmp_path.iterdir()) == [folder]
