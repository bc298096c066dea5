"""Each command imports what it needs, and no more: torch and Lightning alone take seconds."""

import json
import subprocess
import sys

import pytest

from tests.support.paths import ROOT
from tests.support.report_runs import write_run

MODULES = {"torch", "lightning", "transformers", "peft", "datasets", "wandb"}
DRAWING = {"pandas", "matplotlib"}
IMPORTED = """
import contextlib, json, os, sys
with contextlib.suppress(SystemExit), open(os.devnull, "w") as null:
    with contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
        from app.cli.main import main
        main(sys.argv[1:])
print(json.dumps(list(sys.modules)))
"""


def imported(*argv):
    """Return the modules of a process of its own that ran `train.py ARGV`, by their first names."""
    command = [sys.executable, "-c", IMPORTED, *map(str, argv)]
    done = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True)
    return {name.partition(".")[0] for name in json.loads(done.stdout)}


@pytest.mark.parametrize(
    "argv",
    [
        ("--help",),
        ("ftt",),
        ("report", "--help"),
        ("compare", "--help"),
        ("one_step", "--help"),
        ("one_step", "--config=quickstart.yaml", "--ranks=many"),
        ("dashboard", "--help"),
        ("compare", "--config=quickstart.yaml", "--methods=lora", "--learning_rates=much"),
    ],
    ids=" ".join,
)
def test_help_and_wrong_words_import_no_libraries(argv):
    assert not imported(*argv) & (MODULES | DRAWING)


def test_a_report_imports_what_draws_it(tmp_path):
    write_run(tmp_path / "runs" / "version_0")
    modules = imported("report", tmp_path / "runs", "--output", tmp_path / "report")
    assert (tmp_path / "report" / "report.html").is_file()
    assert modules & (MODULES | DRAWING) == DRAWING
