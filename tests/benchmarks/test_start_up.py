"""The parts of the start-up benchmark: a process up to a mark, and the table."""

import sys

import pytest
from lightning.pytorch import Callback

from benchmarks.start_up import IMPORTS, LIMITS, MARK, MARKS, OURS, PEERS, RATIOS, measure, table


def python(code):
    return [sys.executable, "-S", "-c", code]


def test_a_process_is_measured_up_to_its_mark_and_no_further(tmp_path):
    code = f"import time; print('{MARK} first step', flush=True); time.sleep(60)"
    wall, cpu = measure(python(code), tmp_path, "first step")
    assert 0 < cpu < wall + 0.1 < 30  # two clocks
    with pytest.raises(RuntimeError, match="ended with 0"):
        measure(python("print('no mark')"), tmp_path, "first step")
    with pytest.raises(RuntimeError, match="ended with 3"):
        measure(python("raise SystemExit(3)"), tmp_path)


def test_marks_are_hooks_of_lightning():
    names = {}
    exec(MARKS, names)
    hooks = {name for name in vars(names["Marks"]) if name.startswith("on_")}
    assert len(hooks) == 2
    assert hooks <= set(dir(Callback))


def test_the_table_has_medians_and_every_name_is_measured():
    measured = {"help": [(1.0, 0.5), (3.0, 0.7), (2.0, 0.6)], "help, old": [(9.0, 8.0)]}
    assert table(measured).splitlines()[2:] == [
        "| help | 2.0 | 1.0 to 3.0 | 0.6 | 3 |",
        "| help, old | 9.0 | 9.0 to 9.0 | 8.0 | 3 |",
    ]
    names = {*OURS, *IMPORTS, *(f"{peer} --help" for peer in PEERS)}
    assert {*LIMITS, *(name for pair in RATIOS for name in pair)} <= names
