"""Start processes without a launcher, forked from one that has imported Lightning already.

Reads lines {"processes": [{"jobs": FILE, "log": FILE, "folder": FOLDER, "environment": {...}, "node": NAME or
null}, ...], "timeout": SECONDS, "hangs": NUMBER or null}; FILE has a worker's jobs, or {"part": NAME,
"options": {...}}, which is a function of parts.py; NAME is of a network namespace. Answers each with the list
of the exit statuses, None for a process that had to be killed. `hangs` is killed as soon as the others have
ended.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from tests.support import parts, worker
from tests.support.two_nodes import enter


def fork(one: dict) -> int:
    """Return the child's number; 0 in the child, whose output goes to its log."""
    child = os.fork()
    if child == 0:
        log = os.open(one["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream, end in ((0, os.open(os.devnull, os.O_RDONLY)), (1, log), (2, log)):
            os.dup2(end, stream)
        os.environ.update(one["environment"])
        if one["node"] is not None:
            enter(one["node"])
        os.chdir(one["folder"])
    return child


def wait(children: list[int], timeout: float, hangs: int | None) -> list[int | None]:
    """Wait for the children to end."""
    statuses: dict[int, int | None] = {}
    late = time.monotonic() + timeout
    while len(statuses) < len(children):
        for child in children:
            if child not in statuses:
                ended, status = os.waitpid(child, os.WNOHANG)
                if ended:
                    statuses[child] = os.waitstatus_to_exitcode(status)
        left = [child for child in children if child not in statuses]
        if time.monotonic() > late or (hangs is not None and left == [children[hangs]]):
            for child in left:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                statuses[child] = None
        time.sleep(0.05)
    return [statuses[child] for child in children]


def serve() -> Path | None:
    """Fork what each line requests; return the jobs in a child, None when there are no more lines."""
    for line in sys.stdin:
        request = json.loads(line)
        children = []
        for one in request["processes"]:
            children.append(fork(one))
            if children[-1] == 0:
                return Path(one["jobs"])
        print(json.dumps(wait(children, request["timeout"], request["hangs"])), flush=True)
    return None


if __name__ == "__main__":
    jobs = serve()
    if jobs is not None:
        work = json.loads(jobs.read_text())
        if isinstance(work, list):
            worker.run(work)
        else:
            name, options = work.values()
            getattr(parts, name)(**options)
