"""The process that runs the tests of a problem; the program under test is in another, in the sandbox.

Started as `python -I -S judge_process.py`, with a job on stdin and its verdict on stdout, both JSON. Imports
the standard library alone.
"""

import builtins
import json
import os
import resource
import select
import signal
import subprocess
import sys
from collections import deque
from typing import Any, NoReturn

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from seccomp import die_with_parent, hide_from_same_user
from wire_format import NotPlainDataError, decode, encode, read_frame, write_frame

del sys.path[0]

MEMORY_BYTES = 2 * 2**30  # of this process, which holds what the program returns
END_S = 5.0  # after which a killed sandbox should be gone


class CandidateError(Exception):
    """Stand for an exception of the program that is none of Python's own."""


class Judge:
    """Start the sandbox by its command line, run the tests against it, and end the process with a verdict."""

    def __init__(self, command: list[str], folder: str | None, verdicts: int) -> None:
        self.verdicts = verdicts
        self.sandbox = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            cwd=folder,
            env={},
            start_new_session=True,
        )
        pipes = self.sandbox.stdin, self.sandbox.stdout, self.sandbox.stderr
        self.requests, self.replies, self.errors = (pipe.fileno() for pipe in pipes if pipe)

    def await_sandbox(self, seconds: float) -> None:
        """Wait until the sandbox has given up its privileges; it has not read the program yet."""
        if not select.select([self.replies], [], [], seconds)[0]:
            self.end("broken", f"the sandbox did not start within {seconds} s")
        try:
            read_frame(self.replies)
        except (EOFError, NotPlainDataError):
            os.killpg(self.sandbox.pid, signal.SIGKILL)
            error = os.read(self.errors, 10_000).decode(errors="replace").strip()
            self.end("broken", error[-1000:] or f"it ended with status {self.sandbox.wait()}")

    def run(self, job: dict[str, Any]) -> NoReturn:
        """Run the program and its tests; see `app.evaluation.sandbox.judge.judge` for the keys of a job."""
        tests: dict[str, Any] = {"__name__": "tests"}
        try:
            exec(compile(job["setup"], "<setup>", "exec"), tests)
            code = compile(job["tests"], "<tests>", "exec")
        except Exception as error:
            self.end("broken", f"the problem itself: {type(error).__name__}: {error}")
        # After so many seconds a verdict is due, whatever program and tests are doing.
        signal.signal(signal.SIGALRM, lambda *_: self.end("failed", "timed out"))
        signal.setitimer(signal.ITIMER_REAL, job["timeout"])
        # Python handles a signal between two of its own steps; this one needs no handler.
        signal.setitimer(signal.ITIMER_PROF, job["timeout"] + 1)
        try:
            self.ask([job["program"], job["entry_point"]])
            tests[job["entry_point"]] = self.call
            exec(code, tests)
            tests["check"](self.call)
        except BaseException as error:
            self.end("failed", error_text(error))
        self.end("passed", "")

    def call(self, *arguments: Any, **named: Any) -> Any:
        """Call the program's function; write its changes of lists, dicts and the like into ours."""
        arguments = (*arguments, *named.values())
        try:
            request = [encode(list(arguments)), list(named)]
        except NotPlainDataError as error:
            self.end("broken", f"the tests pass {error}, which cannot be sent to the sandbox")
        reply = self.ask(request)
        try:
            value = decode(reply["value"])
            changed = decode(reply["arguments"]) if "arguments" in reply else list(arguments)
            for ours, theirs in zip(arguments, changed, strict=True):
                rewrite(ours, theirs)
        except (KeyError, TypeError, ValueError) as error:
            self.end("failed", f"the program's process sent nonsense: {error}")
        return value

    def ask(self, request: list[Any]) -> dict[str, Any]:
        """Return the sandbox's reply to a request; raise what the program raised."""
        try:
            write_frame(self.requests, request)
            reply = read_frame(self.replies)
        except (EOFError, BrokenPipeError):
            self.end("failed", "the program's process ended")
        except NotPlainDataError as error:
            self.end("failed", f"the program's process sent {error}")
        if not isinstance(reply, dict):
            self.end("failed", "the program's process sent nonsense")
        if "not_plain" in reply:
            self.end("failed", f"the program returned {reply['not_plain']}")
        if "raised" in reply:
            raise exception(reply)
        return reply

    def end(self, status: str, reason: str) -> NoReturn:
        """Kill the sandbox, wait until nothing of it is left, write the verdict and end."""
        signal.setitimer(signal.ITIMER_REAL, 0)
        os.killpg(self.sandbox.pid, signal.SIGKILL)
        # The pipe is at its end when the last process that could write to it is gone.
        while select.select([self.replies], [], [], END_S)[0] and os.read(self.replies, 1 << 16):
            pass
        os.write(self.verdicts, json.dumps({"status": status, "reason": reason[:1000]}).encode())
        os._exit(0)


def rewrite(ours: Any, theirs: Any) -> None:
    """Give an object of ours the content of theirs, if it is of a kind that changes."""
    if ours is theirs or type(ours) is not type(theirs):
        return
    if isinstance(ours, list | bytearray | deque):
        ours.clear()
        ours.extend(theirs)
    elif isinstance(ours, dict | set):
        ours.clear()
        ours.update(theirs)


def error_text(error: BaseException) -> str:
    """Return an error's class and text, which may hold what cannot be written: a very long integer."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception as another:
        return f"{type(error).__name__}, whose text is a {type(another).__name__}"


def exception(reply: dict[str, Any]) -> Exception:
    """Return the nearest of Python's own exceptions to the one that the program raised.

    StopIteration is none of them: it would end a loop of the tests, as over `map`, instead of failing them.
    """
    names = [str(name) for name in reply["raised"]] if isinstance(reply["raised"], list) else []
    text = str(reply.get("text"))
    for name in names:
        kind = getattr(builtins, name, None)
        if kind in (Exception, StopIteration):
            break
        if isinstance(kind, type) and issubclass(kind, Exception):
            try:
                return kind(text)
            except TypeError:  # UnicodeDecodeError and its like take more than a text
                break
    return CandidateError(": ".join([*names[:1], text]))


def main() -> None:
    """Read a job, and judge it."""
    die_with_parent()
    hide_from_same_user()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    job = json.loads(sys.stdin.buffer.read())
    verdicts = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)  # what tests print is dropped
    judge = Judge(job["command"], job["folder"], verdicts)
    judge.await_sandbox(job["start_s"])
    judge.run(job)


if __name__ == "__main__":
    main()
