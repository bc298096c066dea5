"""The sandboxes against hostile programs."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import pytest

from app.evaluation.sandbox import bubblewrap as sandbox
from tests.support import hostile
from tests.support.hostile import (
    PROGRAMS,
    TESTS,
    WORKS_IN_ONE_PROCESS,
    WORKS_UNPROTECTED,
    attack,
    running,
    stage,
    traces,
)
from tests.support.paths import ROOT

SLACK_S = 15.0  # to start and to clear away, on a machine that does other things too


@pytest.fixture(scope="module")
def mark():
    """Give all sandboxes of this file a word that their command lines alone have; return it."""
    with pytest.MonkeyPatch.context() as patch:
        size = sandbox.TEMPORARY_BYTES + 4096 * (os.getpid() % 4096 + 1)
        patch.setattr(sandbox, "TEMPORARY_BYTES", size)
        sandbox.bubblewrap_options.cache_clear()
        yield str(size)
    sandbox.bubblewrap_options.cache_clear()


@pytest.fixture(scope="module")
def outcomes(mark, tmp_path_factory):
    """Return `outcomes(mode)`: what became of every hostile program, and what was left."""

    @cache
    def run(mode):
        folder = tmp_path_factory.mktemp(mode)
        with pytest.MonkeyPatch.context() as patch, stage(folder) as places:
            (folder / "temporary").mkdir()
            patch.setattr(tempfile, "tempdir", str(folder / "temporary"))
            with ThreadPoolExecutor(8) as pool:
                verdicts = pool.map(lambda name: attack(name, mode, places), PROGRAMS)
                verdicts = dict(zip(PROGRAMS, verdicts, strict=True))
            left = [*places.outside.iterdir(), *(folder / "temporary").iterdir()]
            return verdicts, left, (places.home / "secret").read_text(), traces(mark)

    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_hostile_program(name, mode, outcomes):
    verdict, seconds = outcomes(mode)[0][name]
    assert verdict.passed is (mode == "unprotected" and name in WORKS_UNPROTECTED), verdict
    assert seconds < hostile.timeout(name) + SLACK_S


@pytest.mark.slow
def test_nothing_is_left(mode, outcomes):
    _, left, secret, processes = outcomes(mode)
    assert processes == []
    assert secret == "secret"
    written = {path.name for path in left}
    # What the documentation says of the mode without protection: it does not guard files.
    assert written == (set() if mode == "bubblewrap" else {"written", "linked", "climbed"})


@pytest.mark.slow  # some of them
@pytest.mark.parametrize("name", WORKS_IN_ONE_PROCESS)
def test_attack_is_real(name, tmp_path):
    """In one process, where the exit status is the verdict, the same program passes."""
    with stage(tmp_path) as places:
        program = (
            f"{places.header()}{PROGRAMS[name][1]}{TESTS}\ncheck(square)\nimport os\nos._exit(0)"
        )
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
    assert done.returncode == 0


def test_dies_with_the_caller(mode, mark, tmp_path):
    caller = f"""
from app.evaluation.sandbox import bubblewrap as sandbox
from app.evaluation.sandbox.judge import judge
sandbox.TEMPORARY_BYTES = {mark}
judge("while True: pass", "f", "def check(candidate): pass", timeout=300.0, sandbox={mode!r})
"""
    # Of what is killed, an empty temporary folder stays; here it is cleared away with the test's own.
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    process = subprocess.Popen([sys.executable, "-c", caller], cwd=ROOT, env=environment)
    deadline = time.monotonic() + SLACK_S
    while not any("child.py" in line for line in running(mark)):
        assert time.monotonic() < deadline, "no sandbox has started"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert traces(mark) == []


def test_documentation_has_every_program():
    table = (ROOT / "docs" / "sandbox.md").read_text()
    rows = re.findall(r"^\| (\w+) \| (.*?) \| (.*?) \| (.*?) \|$", table, re.MULTILINE)
    documented = {name: outcomes for name, *outcomes in rows}
    assert len(PROGRAMS) >= 74
    for name, (tries, _) in PROGRAMS.items():
        described, inside, without = documented[name]
        assert described == tries
        assert "WORKS" not in inside
        assert ("WORKS" in without) is (name in WORKS_UNPROTECTED)
