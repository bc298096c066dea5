"""Programs that attack the sandbox, and how one is set upon it.

Each claims to square a number and returns the right square only once its attack has worked: so a
verdict "passed" says that the attack worked. Before each is a line `### NAME (WHERE IT WORKS): WHAT IT TRIES`.
Before all stand `HEADER` and HOME, a folder with the file `secret`; OUTSIDE, an empty folder; PROJECT, the
checkout; VENV, the environment of its packages; and PORT, a local port where somebody listens.
"""

import contextlib
import os
import re
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from app.evaluation.sandbox.judge import Verdict, judge
from tests.support.hostile.escapes import ESCAPES
from tests.support.hostile.exhaustion import EXHAUSTION
from tests.support.hostile.forgeries import FORGERIES
from tests.support.hostile.neighbours import NEIGHBOURS
from tests.support.paths import ROOT

HEADER = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
def works(action):
    try:
        action()
    except OSError:
        return False
    return True
"""
TIMEOUT_S = 20.0
SHORT_TIMEOUT_S = 1.0  # of those that never end, or not soon
TESTS = """
def check(candidate):
    assert candidate(3) == 9
    assert candidate(4) == 16
"""
HEAD = re.compile(r"^### (\w+)(?: \((.*?)\))?: (.*)\n", re.MULTILINE)
_PARTS = HEAD.split(EXHAUSTION + NEIGHBOURS + ESCAPES + FORGERIES)[1:]
PROGRAMS = dict(zip(_PARTS[::4], zip(_PARTS[2::4], _PARTS[3::4], strict=True), strict=True))
"""What a program tries, and its source, by its name."""
_WORKS = {name: works or "" for name, works in zip(_PARTS[::4], _PARTS[1::4], strict=True)}
WORKS_IN_ONE_PROCESS = [name for name, works in _WORKS.items() if "in one process" in works]
"""What passes where program and tests share a process, as in the field; without harm to the machine."""
WORKS_UNPROTECTED = [name for name, works in _WORKS.items() if "unprotected" in works]
"""What works without bubblewrap, where a program has the rights of its user to files."""


@dataclass(frozen=True)
class Stage:
    """Where the programs find something to attack."""

    home: Path
    outside: Path
    port: int

    def header(self) -> str:
        """Return what stands before each program."""
        places = {"PORT": self.port, "HOME": str(self.home), "OUTSIDE": str(self.outside)}
        places |= {"PROJECT": str(ROOT), "VENV": sys.prefix}
        return HEADER + "".join(f"{name} = {value!r}\n" for name, value in places.items())


@contextlib.contextmanager
def stage(folder: Path):
    """Make a home with a secret, an empty folder, and a listener; and a secret in the environment."""
    home, outside = folder / "home", folder / "outside"
    home.mkdir()
    outside.mkdir()
    (home / "secret").write_text("secret")
    before = dict(os.environ)
    os.environ.update(HOME=str(home), HOSTILE_SECRET="secret")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        try:
            yield Stage(home, outside, listener.getsockname()[1])
        finally:
            os.environ.clear()
            os.environ.update(before)


def timeout(name: str) -> float:
    """Return the seconds that a program is given."""
    return SHORT_TIMEOUT_S if f"### {name}" in EXHAUSTION else TIMEOUT_S


def attack(
    name: str, mode: Literal["bubblewrap", "unprotected"], places: Stage
) -> tuple[Verdict, float]:
    """Return the verdict on a program, and the seconds that it took."""
    start = time.perf_counter()
    source = places.header() + PROGRAMS[name][1]
    verdict = judge(source, "square", TESTS, timeout=timeout(name), sandbox=mode)
    return verdict, time.perf_counter() - start


def running(mark: str) -> list[str]:
    """Return the command lines of processes that have `mark` in theirs."""
    lines = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            lines.append(process.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return [line for line in lines if mark in line]


def traces(mark: str) -> list[str]:
    """Return what `running` finds after a moment to end."""
    deadline = time.monotonic() + 5.0
    while (left := running(mark)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left
