"""docs/support.md: write it from the outcomes of the matrix, and read the outcomes back from it."""

import re
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from filelock import FileLock

from tests.support.matrix import NO_RUN, RUNS, TABLES, Table
from tests.support.paths import ROOT

PAGE = ROOT / "docs" / "support.md"
COMMAND = "python -m pytest -n 2 --dist loadfile tests/e2e/test_support_*.py --write-support"
Outcomes = dict[tuple[str, str, str], dict[str, str]]
"""By table, row and column: what comes of each command."""

INTRODUCTION = f"""\
# What works with what

Every command with each method, model family, data module and benchmark, tried on random models of one layer.
"runs" says that all commands of the table run: `plan` counts the memory, `init` and `fit` write an adapter,
`one_step` scores a step of the weights, `validate` and `test` score the adapter, the merged model computes what
was trained, and `resume` (`fit --ckpt_path last`) makes another step. A command that is named is refused in one
line, with exit status 2, by the message of that number at the end of the page, where RUN is the run's folder,
MODEL the model's and DATA the class of the data. Where `fit` is refused, there is no run for the commands
behind it.

The page is written by its own test, which fails where something else comes out. Without `--write-support` it
runs every command in a table's first column; in the others `fit`, and the rest by turns:

```bash
{COMMAND}
```

"""


def write(outcomes: Outcomes) -> str:
    """Return the page."""
    counts = Counter(what for found in outcomes.values() for what in found.values())
    messages = [what for what in counts if what not in (RUNS, NO_RUN)]
    numbers = {what: number for number, what in enumerate(messages, 1)}
    refused = sum(counts[what] for what in messages)
    page = INTRODUCTION + f"{counts.total()} outcomes: {counts[RUNS]} run, {refused} are refused, "
    page += f"{counts[NO_RUN]} have no run.\n"
    for name, table in TABLES.items():
        page += f"\n## {name}\n\n"
        page += f"Commands: {_listed(table.commands)}.\n\n"
        page += _line("", *table.columns) + _line(*["---"] * (len(table.columns) + 1))
        for row in table.rows:
            cells = (outcomes.get((name, row, column), {}) for column in table.columns)
            page += _line(f"`{row}`", *(_cell(found, numbers) for found in cells))
    page += "\n## Messages\n\n"
    for what, number in numbers.items():
        page += f"{number}. ({counts[what]}) `` {what} ``\n"  # a message may have backquotes
    return page


def read(page: str) -> Outcomes:
    """Return the outcomes that a page states."""
    messages = dict(re.findall(r"^(\d+)\. \(\d+\) `` (.*) ``$", page, re.MULTILINE))
    outcomes: Outcomes = {}
    for name, table in TABLES.items():
        section = page.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
        for line in re.findall(r"^\| `(.*) \|$", section, re.MULTILINE):
            row, *cells = line.split(" | ")
            for column, cell in zip(table.columns, cells, strict=True):
                if cell:
                    key = (name, row.removesuffix("`"), column)
                    outcomes[key] = _outcomes(cell, table, messages)
    return outcomes


def keys() -> list[tuple[str, str, str]]:
    """Return every table, row and column."""
    return [(name, r, c) for name, t in TABLES.items() for r in t.rows for c in t.columns]


def ordered(outcomes: Mapping[tuple[str, str, str], dict[str, str]]) -> Outcomes:
    """Return the outcomes in the order of the tables, without those of rows that are gone."""
    return {key: outcomes[key] for key in keys() if key in outcomes}


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |\n"


def _cell(found: Mapping[str, str], numbers: Mapping[str, int]) -> str:
    """Write the outcomes of a cell; a command that is not named runs, or has no run to read."""
    refused: dict[int, list[str]] = {}
    for command, what in found.items():
        if what in numbers:
            refused.setdefault(numbers[what], []).append(command)
    parts = [f"{_listed(tuple(commands))} [{number}]" for number, commands in refused.items()]
    return "; ".join(parts) or (RUNS if found else "")


def _outcomes(cell: str, table: Table, messages: Mapping[str, str]) -> dict[str, str]:
    found = dict.fromkeys(table.commands, RUNS)
    for names, number in re.findall(r"((?:`[^`]+`(?:, )?)+) \[(\d+)\]", cell):
        for command in re.findall(r"`([^`]+)`", names):
            found[command] = messages[number]
    if found["fit"] != RUNS:
        found |= dict.fromkeys(table.on_the_run, NO_RUN)
    return found


@dataclass(frozen=True)
class Page:
    """The page as it stands, or as it is written anew."""

    writes: bool

    def tried(self, name: str, row: str, column: str) -> tuple[str, ...]:
        """Return every command in the first column; in the others `fit`, and each fifth of the rest by turns.

        So every two of a row, a column and a command meet. Whoever writes the page tries all.
        """
        table = TABLES[name]
        number = table.rows.index(row) + table.columns.index(column)
        if self.writes or column == table.columns[0]:
            return table.commands
        return ("fit", *[name for name in table.commands if name != "fit"][number % 5 :: 5])

    def expect(self, key: tuple[str, str, str], found: dict[str, str]) -> None:
        """Check that the page states these outcomes, or write them into it."""
        if not self.writes:
            stated = read(PAGE.read_text())[key]
            assert {name: stated[name] for name in found} == found
            return
        with FileLock(Path(tempfile.gettempdir()) / "support_page.lock"):
            outcomes = read(PAGE.read_text()) if PAGE.exists() else {}
            PAGE.write_text(write(ordered({**outcomes, key: found})))


@pytest.fixture
def page(request):
    """Return the page, which --write-support writes anew."""
    return Page(request.config.option.write_support)
