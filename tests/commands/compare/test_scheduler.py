"""Who works on which cell: kills, restarts, several workers at once, with real processes and a quick stub."""

import multiprocessing
import os
import signal
import time

import pytest

from app.commands.compare.cells import Cell, Variant, grid, state_of
from app.commands.compare.scheduler import GridRun, failure_message
from app.utils.signals import Stopped, StopSignals

# Stands in for training and test: says when it begins and ends, refuses company, writes its summary last.
PROGRAM = """
set -e
cell=$1 stage=$2 journal=$3 seconds=$4
mkdir "$cell/busy" || exit 9
echo "begin $stage $(basename "$cell") $$" >> "$journal"
sleep "$seconds"
mkdir -p "$cell/version_0"
test=; [ "$stage" = fit ] || test=', "test": {}'
echo '{"metrics": {"final": {}'"$test"'}}' > "$cell/version_0/part"
rmdir "$cell/busy"
echo "end $stage $(basename "$cell") $$" >> "$journal"
mv "$cell/version_0/part" "$cell/version_0/summary.json"
"""
CELLS = grid([Variant("lora"), Variant("lora_one")], [1e-4, 1e-3], [0])
PATIENCE = 60.0


class Workers:
    """Starts processes that work on the same grid."""

    def __init__(self, folder):
        self.folder = folder
        self.journal = folder / "journal"
        self.program = folder / "program.sh"
        self.program.write_text(PROGRAM)
        self.started = []

    def start(self, cells=CELLS, jobs=1, seconds=0.3):
        def command(cell, found):
            stage = "test" if found.state == "trained" else "fit"
            place = self.folder / "cells" / cell.name
            return ["bash", str(self.program), str(place), stage, str(self.journal), str(seconds)]

        def work():
            with StopSignals():
                try:
                    GridRun(cells, self.folder, command, jobs).work()
                except Stopped as stopped:
                    os._exit(stopped.status)
            os._exit(0)

        process = multiprocessing.get_context("fork").Process(target=work)
        process.start()
        self.started.append(process)
        return process

    def finish(self, *arguments, **options):
        """Start a process and wait for it; return its exit status."""
        process = self.start(*arguments, **options)
        process.join(PATIENCE)
        return process.exitcode

    def lines(self, *words):
        """Return the journal's lines that begin with some words."""
        text = self.journal.read_text() if self.journal.is_file() else ""
        return [
            line.split() for line in text.splitlines() if line.split()[: len(words)] == [*words]
        ]

    def until(self, found):
        start = time.monotonic()
        while not found():
            assert time.monotonic() - start < PATIENCE
            time.sleep(0.01)

    def count(self, *words):
        """Return how often each cell is in the journal after some words."""
        names = [line[len(words)] for line in self.lines(*words)]
        return {name: names.count(name) for name in names}

    def states(self, cells=CELLS):
        return [state_of(self.folder / "cells" / cell.name).state for cell in cells]


@pytest.fixture
def workers(tmp_path):
    made = Workers(tmp_path)
    yield made
    for process in made.started:
        process.kill()
        process.join()


@pytest.mark.slow
def test_killed_and_started_twice_at_once(workers):
    first = workers.start()
    # The first cell is finished and the second one trains.
    workers.until(lambda: len(workers.lines("begin", "fit")) == 2)
    first.kill()
    first.join()
    assert first.exitcode == -signal.SIGKILL
    both = [workers.start(), workers.start()]
    for process in both:
        process.join(PATIENCE)
        assert process.exitcode == 0
    assert workers.states() == ["finished"] * 4
    # The training that outlived its command was neither disturbed nor repeated: `busy` lets nobody in.
    once = {cell.name: 1 for cell in CELLS}
    for stage in ("fit", "test"):
        assert workers.count("begin", stage) == once
        assert workers.count("end", stage) == once


@pytest.mark.slow
def test_killed_with_the_training(workers):
    first = workers.start(seconds=0.5)
    workers.until(lambda: len(workers.lines("begin", "fit")) == 2)
    first.kill()
    first.join()
    *_, name, pid = workers.lines("begin", "fit")[1]
    os.kill(int(pid), signal.SIGKILL)
    workers.until(lambda: not os.path.exists(f"/proc/{pid}"))
    (workers.folder / "cells" / name / "busy").rmdir()
    assert workers.finish(seconds=0.1) == 0
    assert workers.states() == ["finished"] * 4
    assert workers.count("begin", "fit") == {cell.name: 1 + (cell.name == name) for cell in CELLS}
    assert workers.count("end", "fit") == {cell.name: 1 for cell in CELLS}


def test_a_signal_is_handed_on_and_is_no_failure(workers):
    first = workers.start(jobs=2, seconds=30)
    workers.until(lambda: len(workers.lines("begin", "fit")) == 2)
    pids = [int(line[-1]) for line in workers.lines("begin", "fit")]
    os.kill(first.pid, signal.SIGTERM)
    first.join(PATIENCE)
    assert first.exitcode == 143
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert workers.states() == ["missing"] * 4


def test_jobs_at_once(workers):
    workers.finish(jobs=2)
    running = most = 0
    for what, *_ in workers.lines():
        running += 1 if what == "begin" else -1
        most = max(most, running)
    assert most == 2
    assert workers.states() == ["finished"] * 4


def test_each_failure_is_kept_and_tried_again(workers):
    cells = CELLS[:2]
    (workers.folder / "cells" / cells[0].name / "busy").mkdir(parents=True)  # lets the program fail
    workers.finish(cells, seconds=0)
    assert workers.states(cells) == ["failed", "finished"]
    found = state_of(workers.folder / "cells" / cells[0].name)
    assert "File exists" in found.message
    (workers.folder / "cells" / cells[0].name / "busy").rmdir()
    workers.finish(cells, seconds=0)
    assert workers.states(cells) == ["finished", "finished"]


@pytest.mark.slow
def test_a_failure_is_tried_once_by_several_at_once(workers):
    """A cell that another command has tried in the meantime is left."""
    cell = CELLS[0]
    (workers.folder / "cells" / cell.name / "busy").mkdir(parents=True)  # lets the program fail
    both = [workers.start([*CELLS[1:2], cell], seconds=1), workers.start([cell], seconds=1)]
    for process in both:
        process.join(PATIENCE)
    assert workers.states([cell]) == ["failed"]
    log = (workers.folder / "cells" / cell.name / "cell.log").read_text()
    assert log.count("$ bash") == 1


def test_what_a_failure_says():
    assert failure_message(["x", "error: set a.b", "bye"], 2) == "set a.b"
    assert (
        failure_message(["Traceback", "MemoryError: no", ""], 1) == "exit status 1: MemoryError: no"
    )
    assert failure_message([], 3) == "exit status 3: it said nothing"
    assert failure_message([], -9) == "ended by SIGKILL, as the kernel does where memory runs out"


def test_a_cell_has_one_name():
    assert Cell("lora", 0.0001, 3).name == Cell("lora", 1e-04, 3).name == "lora-lr1e-4-seed3"
    assert Cell("lora", 1e-4, 3, 8).name == "lora-r8-lr1e-4-seed3"
