"""Verdicts on honest programs, on programs that are wrong, and on tests that are."""

import re

import pytest

from app.evaluation.sandbox import bubblewrap as sandbox
from app.evaluation.sandbox.judge import Verdict, check_judge, judge
from app.utils.errors import InputError
from tests.support.paths import ROOT

# ### NAME: WHAT THE REASON SAYS, the program, and the lines of its test
HONEST = r"""
### right: passes
def f(x): return x + 1
>>> assert candidate(1) == 2
### wrong: AssertionError: one more
def f(x): return x
>>> assert candidate(1) == 2, 'one more'
### no function: NameError: name 'f' is not defined
g = 1
>>> assert True
### no Python: SyntaxError
def f(:
>>> assert True
### nothing at all: NameError: name 'f' is not defined
>>> assert True
### raises: ZeroDivisionError: division by zero
def f(x): return 1 / x
>>> candidate(0)
### raises as asked: passes
def f(x): return [][x]
>>> try:
>>>     candidate(0)
>>> except LookupError:
>>>     return
>>> assert False
### raises its own: passes
class Mine(KeyError): pass
def f(x): raise Mine(x)
>>> try:
>>>     candidate(0)
>>> except KeyError:
>>>     return
>>> assert False
### cannot be written: AssertionError, whose text is a ValueError
def f(x): return 10**5000
>>> y = candidate(0)
>>> assert y == 1, y
### ends the loop of the tests: CandidateError: Mine: 1
class Mine(StopIteration): pass
def f(x): raise Mine(x)
>>> assert all(map(candidate, [1, 2]))
### takes names: passes
def f(x, *, y=0, z=0): z.append(x - y); return z
>>> z = []
>>> assert candidate(3, z=z, y=1) == [2]
>>> assert z == [2]
### lacks a name: TypeError: f() got an
def f(x): return x
>>> assert candidate(y=1) == 1
### changes a list: passes
def f(x): x.sort()
>>> x = [2, 1]
>>> assert candidate(x) is None
>>> assert x == [1, 2]
### changes inside: passes
def f(x, y): x['k'].append(1); y.clear()
>>> x, y = {'k': []}, {3}
>>> candidate(x, y)
>>> assert (x, y) == ({'k': [1]}, set())
### leaves alone: passes
def f(x): return sorted(x)
>>> x = [2, 1]
>>> assert candidate(x) == [1, 2] and x == [2, 1]
### keeps state: passes
n = 0
def f():
    global n
    n += 1
    return n
>>> assert [candidate() for _ in range(3)] == [1, 2, 3]
### tests know its name: passes
def f(x): return x
>>> assert f(3) == candidate(3)
### tests have helpers: passes
def f(x): return -x
>>> assert candidate(helper(1)) == -2
### helpers are not its own: AssertionError
def helper(x): return 0
def f(x): return 0
>>> assert candidate(helper(1)) == helper(1)
### prints and reads: passes
import sys
def f(x):
    print(x)
    print(x, file=sys.stderr)
    return sys.stdin.read()
>>> assert candidate(1) == ''
### demonstration: passes
def f(x): return x
if __name__ == '__main__': raise SystemExit
>>> assert candidate(1) == 1
### library: passes
import collections, dataclasses, hashlib, re, typing
@dataclasses.dataclass
class D:
    x: 'typing.ClassVar[int]' = 0
def f(x): return collections.Counter(x)
>>> assert candidate('aab') == {'a': 2, 'b': 1}
### temporary file: passes
import tempfile
def f(x):
    with tempfile.TemporaryFile() as t:
        return t.write(x)
>>> assert candidate(b'abc') == 3
"""
_PARTS = re.split(r"^### (.*?): (.*)\n", HONEST, flags=re.MULTILINE)[1:]
CASES = dict(zip(_PARTS[::3], zip(_PARTS[1::3], _PARTS[2::3], strict=True), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_honest_program(case, mode):
    reason, text = CASES[case]
    program = re.sub(r"^>>> .*\n", "", text, flags=re.MULTILINE)
    body = "".join(f"    {line}\n" for line in re.findall(r"^>>> (.*)", text, re.MULTILINE))
    tests, setup = f"def check(candidate):\n{body}", "def helper(x): return 2 * x"
    verdict = judge(program, "f", tests, setup, 20.0, mode)
    assert verdict.passed is (reason == "passes"), verdict
    assert (reason if reason != "passes" else "") in verdict.reason


def test_broken_tests_are_no_verdict(mode):
    with pytest.raises(RuntimeError, match="problem itself: SyntaxError"):
        judge("def f(): pass", "f", "def check(:", sandbox=mode)
    with pytest.raises(RuntimeError, match=r"tests pass a value of type builtins\.object"):
        judge("def f(x): pass", "f", "def check(candidate): candidate(object())", sandbox=mode)


@pytest.mark.slow
def test_tests_that_never_end(mode):
    """The tests' own time counts, also inside one built-in function."""
    for body in ("while True: pass", "sum(__import__('itertools').repeat(0))"):
        verdict = judge(
            "f = int", "f", f"def check(candidate):\n    {body}", timeout=1.0, sandbox=mode
        )
        assert verdict == Verdict(False, "timed out")


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
