"""The image's recipe: what it copies is there and enough to run, and its user is not root."""

import json
import re
import shutil
import subprocess
import sys

import pathspec
import pytest

from tests.support.paths import ROOT


@pytest.fixture(scope="module")
def recipe():
    """Return the Dockerfile as (instruction, rest) of each step."""
    text = re.sub(r"\\\n\s*", " ", (ROOT / "Dockerfile").read_text())
    steps = [line.split(maxsplit=1) for line in text.splitlines() if line and line[0] != "#"]
    return [(name, rest) for name, rest in steps]


def test_each_step_is_an_instruction_and_the_last_user_is_not_root(recipe):
    known = {"ARG", "FROM", "RUN", "WORKDIR", "COPY", "USER", "ENV", "ENTRYPOINT", "CMD"}
    names = [name for name, _ in recipe]
    assert set(names) <= known
    [user] = [rest for name, rest in recipe if name == "USER"]
    assert f"useradd --create-home --uid 1000 {user}" in dict(recipe)["RUN"]
    assert names.index("USER") > max(i for i, name in enumerate(names) if name in ("RUN", "COPY"))
    for name in ("ENTRYPOINT", "CMD"):
        assert all(isinstance(part, str) for part in json.loads(dict(recipe)[name]))


def test_packages_are_those_of_the_requirements_at_tried_versions(recipe):
    [copied] = [rest.split()[:-1] for name, rest in recipe if name == "COPY" and rest != ". ."]
    [install] = [rest for name, rest in recipe if name == "RUN" and "pip install" in rest]
    assert set(re.findall(r"-[rc] (\S+)", install)) == set(copied)
    assert all((ROOT / file).is_file() for file in copied)


@pytest.mark.slow
def test_the_files_that_are_copied_are_enough(tmp_path):
    ignored = pathspec.GitIgnoreSpec.from_lines((ROOT / ".dockerignore").read_text().splitlines())
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True)
    for file in files.stdout.splitlines():
        if not ignored.match_file(file) and (ROOT / file).is_file():
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / file, tmp_path / file)
    assert not (tmp_path / "tests").exists()
    assert (tmp_path / "app" / "tracking" / "model_card.md.j2").is_file()
    command = [sys.executable, "train.py", "fit", "--config", "quickstart.yaml", "--print_config"]
    printed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert ".LoraOneInit\n" in printed.stdout
