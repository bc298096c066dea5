"""Judge a program that a model wrote by the tests of its problem, in a sandbox."""

import json
import signal
import subprocess
import tempfile
from dataclasses import dataclass

from app.evaluation.sandbox.bubblewrap import HERE, SandboxMode, interpreter, sandbox_command
from app.utils.errors import InputError

START_S = 60.0  # a sandbox starts in a twentieth of a second; a busy machine is no verdict
GRACE_S = 30.0  # by which the judge ends itself sooner than it is ended


@dataclass(frozen=True)
class Verdict:
    """Whether a program passed all tests in time; the reason is empty if it did."""

    passed: bool
    reason: str = ""


def judge(
    program: str,
    entry_point: str,
    tests: str,
    setup: str = "",
    timeout: float = 3.0,
    sandbox: SandboxMode = "bubblewrap",
) -> Verdict:
    """Run a program in the sandbox and its tests outside, each in a process of its own.

    Thread-safe; several calls at once run in parallel.

    Args:
        program: Python source, untrusted.
        entry_point: The function that the tests call.
        tests: Python source that defines `check(candidate)`, which raises unless the function is right.
        setup: Python source that the tests need, such as helper functions.
        timeout: Seconds of wall time for loading the program and all tests; starting does not count.
        sandbox: See `app.evaluation.sandbox.bubblewrap`.

    Returns:
        The verdict. A function that returns or changes anything but plain data (see `wire_format`) fails.

    Raises:
        RuntimeError: There is no verdict, because the sandbox does not start or the tests are broken.
        InputError: There is no bubblewrap.
    """
    folder = tempfile.mkdtemp(prefix="lora-one-") if sandbox == "unprotected" else None
    job: dict[str, object] = {"program": program, "entry_point": entry_point, "setup": setup}
    job |= {"tests": tests, "timeout": timeout, "start_s": START_S}
    job |= {"command": sandbox_command(sandbox, timeout), "folder": folder}
    try:
        process = subprocess.run(
            [interpreter(), "-I", "-S", "-B", str(HERE / "judge_process.py")],
            input=json.dumps(job).encode(),
            capture_output=True,
            timeout=START_S + timeout + GRACE_S,
            check=False,
            env={},
            start_new_session=True,
        )
    except subprocess.TimeoutExpired:
        return Verdict(False, "timed out")
    finally:
        if folder is not None:
            # Which a program may have made deeper than a path can say, and closed: unlike shutil.rmtree,
            # chmod and rm follow it by file descriptors.
            for command in (["chmod", "-R", "u+rwx", folder], ["rm", "-rf", folder]):
                subprocess.run(command, check=False, capture_output=True)
    if process.returncode == -signal.SIGPROF:
        return Verdict(False, "timed out")
    if process.returncode < 0:
        return Verdict(False, f"the judge was ended by signal {-process.returncode}")
    if process.returncode > 0 or not process.stdout:
        raise RuntimeError(f"no verdict: {process.stderr.decode(errors='replace')[-2000:]}")
    verdict = json.loads(process.stdout)
    if verdict["status"] == "broken":
        raise RuntimeError(f"sandbox={sandbox}: {verdict['reason']}")
    return Verdict(verdict["status"] == "passed", verdict["reason"])


def check_judge(sandbox: SandboxMode) -> None:
    """Try the sandbox on a program that attempts to leave it.

    Raises:
        InputError: The sandbox does not work on this machine.
    """
    try:
        verdict = judge(PROBE, "probe", PROBE_TESTS, sandbox=sandbox, timeout=30.0)
        reason = verdict.reason  # empty only if everything was denied
    except (RuntimeError, OSError) as error:
        reason = str(error)
    if reason:
        raise InputError(
            f"sandbox={sandbox} does not work on this machine ({reason}). Bubblewrap needs version 0.7 and "
            "user namespaces, which containers and some distributions deny (docs/sandbox.md says how to "
            "allow them); sandbox=unprotected does without, with your rights to your files"
        )


PROBE = """
import os, socket

def fork():
    if os.fork() == 0:
        os._exit(0)

def probe(attempt):
    try:
        {"fork": fork, "socket": socket.socket, "kill": lambda: os.kill(os.getppid(), 0)}[attempt]()
    except PermissionError:
        return "denied"
    return "done"
"""
PROBE_TESTS = """
def check(candidate):
    for attempt in ("fork", "socket", "kill"):
        assert candidate(attempt) == "denied", attempt + " is not denied"
"""
