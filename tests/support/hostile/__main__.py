"""Print the table of docs/sandbox.md: `python -m tests.support.hostile` in the checkout."""

import re
import tempfile
from pathlib import Path

from tests.support.hostile import PROGRAMS, attack, stage


def outcome(name, mode, places):
    verdict, seconds = attack(name, mode, places)
    if verdict.passed:
        return "WORKS"
    why = re.sub(
        r"\[Errno \d+\] |: '[^']*/[^']*'$", "", verdict.reason
    )  # numbers, and paths of this machine
    return f"fails, {seconds:.1f} s: {why.removesuffix(': ')}"


def main():
    print("| program | what it tries | bubblewrap | unprotected |\n| --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder, stage(Path(folder)) as places:
        for name, (tries, _) in PROGRAMS.items():
            results = [outcome(name, mode, places) for mode in ("bubblewrap", "unprotected")]
            print(f"| {name} | {tries} | {' | '.join(results)} |", flush=True)


main()
