"""The sandbox against hostile programs, and the judge against honest ones."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from app.evaluation.sandbox import bubblewrap as sandbox
from app.evaluation.sandbox.judge import Verdict, check_judge, judge
from app.utils.errors import InputError
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

MODES = ("bubblewrap", "unprotected")
SLACK_S = 15.0  # to start and to clear away, on a machine that does other things too


@pytest.fixture(scope="session")
def bubblewrap():
    """Skip without bubblewrap; where CI is true, fail."""
    try:
        check_judge("bubblewrap")
    except InputError as error:
        if os.environ.get("CI") == "true":
            pytest.fail(str(error))
        pytest.skip(str(error))


@pytest.fixture(params=MODES)
def mode(request):
    if request.param == "bubblewrap":
        request.getfixturevalue("bubblewrap")
    return request.param


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
    known = {}

    def run(mode):
        if mode not in known:
            folder = tmp_path_factory.mktemp(mode)
            with pytest.MonkeyPatch.context() as patch, stage(folder) as places:
                (folder / "temporary").mkdir()
                patch.setattr(tempfile, "tempdir", str(folder / "temporary"))
                with ThreadPoolExecutor(8) as pool:
                    verdicts = list(pool.map(lambda name: attack(name, mode, places), PROGRAMS))
                left = [*places.outside.iterdir(), *(folder / "temporary").iterdir()]
                secret = (places.home / "secret").read_text()
            known[mode] = dict(zip(PROGRAMS, verdicts, strict=True)), left, secret, traces(mark)
        return known[mode]

    return run


def test_there_are_programs_enough():
    assert len(PROGRAMS) >= 25
    assert set(PROGRAMS) >= {*WORKS_IN_ONE_PROCESS, *WORKS_UNPROTECTED}


@pytest.mark.parametrize("name", PROGRAMS)
def test_hostile_program(name, mode, outcomes):
    verdict, seconds = outcomes(mode)[0][name]
    assert verdict.passed is (mode == "unprotected" and name in WORKS_UNPROTECTED), verdict
    assert seconds < hostile.timeout(name) + SLACK_S


def test_nothing_is_left(mode, outcomes):
    _, left, secret, processes = outcomes(mode)
    assert processes == []
    assert secret == "secret"
    written = {path.name for path in left}
    # What the documentation says of the mode without protection: it does not guard files.
    assert written == (set() if mode == "bubblewrap" else {"written", "linked", "climbed"})


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


# program, tests, what the reason must say; None where the verdict is "passed"
HONEST = {
    "right": ("def f(x): return x + 1", "assert candidate(1) == 2", None),
    "wrong": (
        "def f(x): return x",
        "assert candidate(1) == 2, 'one more'",
        "AssertionError: one more",
    ),
    "no function": ("g = 1", "assert True", "NameError: name 'f' is not defined"),
    "no Python": ("def f(:", "assert True", "SyntaxError"),
    "nothing at all": ("", "assert True", "NameError: name 'f' is not defined"),
    "raises": ("def f(x): return 1 / x", "candidate(0)", "ZeroDivisionError: division by zero"),
    "raises as asked": (
        "def f(x): return [][x]",
        "try:\n        candidate(0)\n    except LookupError:\n        return\n    assert False",
        None,
    ),
    "raises its own": (
        "class Mine(KeyError): pass\ndef f(x): raise Mine(x)",
        "try:\n        candidate(0)\n    except KeyError:\n        return\n    assert False",
        None,
    ),
    "cannot be told": (
        "def f(x): return 10**5000",
        "y = candidate(0)\n    assert y == 1, y",
        "AssertionError, whose text is a ValueError",
    ),
    "ends the loop of the tests": (
        "class Mine(StopIteration): pass\ndef f(x): raise Mine(x)",
        "assert all(map(candidate, [1, 2]))",
        "CandidateError: Mine: 1",
    ),
    "takes names": (
        "def f(x, *, y=0, z=0): z.append(x - y); return z",
        "z = []\n    assert candidate(3, z=z, y=1) == [2]\n    assert z == [2]",
        None,
    ),
    "lacks a name": ("def f(x): return x", "assert candidate(y=1) == 1", "TypeError: f() got an"),
    "changes a list": (
        "def f(x): x.sort()",
        "x = [2, 1]\n    assert candidate(x) is None\n    assert x == [1, 2]",
        None,
    ),
    "changes inside": (
        "def f(x, y): x['k'].append(1); y.clear()",
        "x, y = {'k': []}, {3}\n    candidate(x, y)\n    assert (x, y) == ({'k': [1]}, set())",
        None,
    ),
    "leaves alone": (
        "def f(x): return sorted(x)",
        "x = [2, 1]\n    assert candidate(x) == [1, 2] and x == [2, 1]",
        None,
    ),
    "keeps state": (
        "n = 0\ndef f():\n    global n\n    n += 1\n    return n",
        "assert [candidate() for _ in range(3)] == [1, 2, 3]",
        None,
    ),
    "tests know its name": ("def f(x): return x", "assert f(3) == candidate(3)", None),
    "tests have helpers": ("def f(x): return -x", "assert candidate(helper(1)) == -2", None),
    "helpers are not its own": (
        "def helper(x): return 0\ndef f(x): return 0",
        "assert candidate(helper(1)) == helper(1)",
        "AssertionError",
    ),
    "prints and reads": (
        "import sys\ndef f(x):\n    print(x)\n    print(x, file=sys.stderr)\n    return sys.stdin.read()",
        "assert candidate(1) == ''",
        None,
    ),
    "demonstration": (
        "def f(x): return x\nif __name__ == '__main__': raise SystemExit",
        "assert candidate(1) == 1",
        None,
    ),
    "library": (
        "import collections, dataclasses, hashlib, re, typing\n@dataclasses.dataclass\nclass D:\n"
        "    x: 'typing.ClassVar[int]' = 0\ndef f(x): return collections.Counter(x)",
        "assert candidate('aab') == {'a': 2, 'b': 1}",
        None,
    ),
    "temporary file": (
        "import tempfile\ndef f(x):\n    with tempfile.TemporaryFile() as t:\n        return t.write(x)",
        "assert candidate(b'abc') == 3",
        None,
    ),
}


@pytest.mark.parametrize("case", HONEST)
def test_honest_program(case, mode):
    program, body, reason = HONEST[case]
    tests = f"def check(candidate):\n    {body}\n"
    verdict = judge(program, "f", tests, "def helper(x): return 2 * x", 20.0, mode)
    assert verdict.passed is (reason is None), verdict
    assert (reason or "") in verdict.reason


def test_broken_tests_are_no_verdict(mode):
    with pytest.raises(RuntimeError, match="problem itself: SyntaxError"):
        judge("def f(): pass", "f", "def check(:", sandbox=mode)
    with pytest.raises(RuntimeError, match=r"tests pass a value of type builtins\.object"):
        judge("def f(x): pass", "f", "def check(candidate): candidate(object())", sandbox=mode)


def test_tests_that_never_end(mode):
    """The tests' own time counts, also inside one built-in function."""
    for body in ("while True: pass", "sum(__import__('itertools').repeat(0))"):
        verdict = judge(
            "f = int", "f", f"def check(candidate):\n    {body}", timeout=1.0, sandbox=mode
        )
        assert verdict == Verdict(False, "timed out")


def test_without_bubblewrap(monkeypatch):
    monkeypatch.setenv("PATH", "")
    sandbox.bubblewrap_options.cache_clear()
    with pytest.raises(
        InputError, match=r"no program bwrap: install it.*apt-get install bubblewrap"
    ):
        check_judge("bubblewrap")


def test_where_namespaces_are_denied(monkeypatch, tmp_path):
    (tmp_path / "bwrap").write_text("#!/bin/sh\necho 'bwrap: No permissions' >&2; exit 1\n")
    (tmp_path / "bwrap").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    sandbox.bubblewrap_options.cache_clear()
    try:
        with pytest.raises(
            InputError, match=r"does not work on this machine.*bwrap: No permissions"
        ):
            check_judge("bubblewrap")
    finally:
        sandbox.bubblewrap_options.cache_clear()


def test_where_nothing_is_denied(monkeypatch):
    """A sandbox that lets processes and sockets through is noticed."""
    code = "import sys; sys.path.insert(0, 'app'); import seccomp as s, child as c\n"
    code += "c.give_up_privileges = lambda: None; c.main()"
    limits = '{"RLIMIT_CORE": 0}'
    code = code.replace("'app'", repr(str(ROOT / "app" / "evaluation" / "sandbox")))
    command = [sandbox.interpreter(), "-I", "-c", code, limits]
    monkeypatch.setattr("app.evaluation.sandbox.judge.sandbox_command", lambda *_: command)
    with pytest.raises(InputError, match="fork is not denied"):
        check_judge("unprotected")


def test_documentation_has_every_program():
    table = (ROOT / "docs" / "sandbox.md").read_text()
    rows = re.findall(r"^\| (\w+) \| (.*?) \| (.*?) \| (.*?) \|$", table, re.MULTILINE)
    told = {name: (tries, inside, without) for name, tries, inside, without in rows}
    assert set(PROGRAMS) <= set(told)
    for name, (tries, _) in PROGRAMS.items():
        assert told[name][0] == tries
        assert "WORKS" not in told[name][1]
        assert ("WORKS" in told[name][2]) is (name in WORKS_UNPROTECTED)
