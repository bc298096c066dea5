"""The example of CONTRIBUTING.md, followed in a copy of the project."""

import re
import shutil
import subprocess
import sys

import pytest

from tests.support.paths import ROOT

FOLDERS = ("app", "callbacks", "configs", "data_modules", "tests")


@pytest.mark.slow
def test_a_method_is_added_in_three_files(tmp_path):
    text = (ROOT / "CONTRIBUTING.md").read_text()
    files = re.findall(r"^`([\w/.]+)`:\n\n```\w+\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(files) == 3
    for name in FOLDERS:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    for name in ("pyproject.toml", "train.py"):
        shutil.copy(ROOT / name, tmp_path)
    names = [name for name, _ in files]
    for name, content in files:
        assert not (tmp_path / name).exists()
        (tmp_path / name).write_text(content)
    sources = [name for name in names if name.endswith(".py")]
    [test] = [name for name in names if name.startswith("tests/")]
    for command in (
        ("ruff", "check", *sources),
        ("ruff", "format", "--check", *sources),
        ("pytest", "-q", "-p", "no:cacheprovider", test),
    ):
        done = subprocess.run(
            [sys.executable, "-m", *command], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
